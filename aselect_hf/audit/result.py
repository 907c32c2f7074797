"""The outcome of an audit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from aselect_hf.audit.picture import plot_audit
from aselect_hf.audit.regret import Regret
from aselect_hf.files import Record, as_path, atomic_file, write_json
from aselect_hf.selection import TimestepSelection


@dataclass
class Audit(Record):
    """A verdict on a timestep that a rule has picked.

    Args:
        verdict: `"any timestep"`, `"trust"`, `"uncertain"` or `"do not trust"`.
        sentence: the verdict and its reason.
        warnings: what else a user should know.
        method: the rule that picked. `"hfr"` stands for the whole corrected curve; HFR otherwise is
            `"hfr, uncorrected"` or `"hfr, searched"`.
        checked_by: the rule that checks: `"ridge"` with labels or masks, else `"consensus"`, or `"hfr"` if `method` is
            `"consensus"` or `"consensus_rank"`.
        timestep: the pick.
        selections: the selections of `"hfr"` (always), `method` and `checked_by`, by name.
        pick_shares: for each timestep of `"hfr"`, how often the rule picks it from bootstrap samples of the images;
            their sum is 1. `None` if the rule has no scores of single images.
        regret: regret of the pick by the probe's curve, in points; `None` without labels.
        chance: accuracy of always answering the most common class; `None` without labels, and for masks.
        untrained: the probe's score on the same network with random weights, at the timestep where the probe is best
            on the trained network; `None` without labels.
        rank_correlation: Spearman's rank correlation of the curves of `method` and `checked_by`; `None` if the rule
            that picked has no curve, or is the check.
        tolerance: points that the pick may lose.
    """

    verdict: str
    sentence: str
    warnings: list[str]
    method: str
    checked_by: str
    timestep: int
    selections: dict[str, TimestepSelection]
    pick_shares: list[float] | None
    regret: Regret | None
    chance: float | None
    untrained: float | None
    rank_correlation: float | None
    tolerance: float

    kind = "audit"

    @property
    def picked(self) -> TimestepSelection:
        """The selection under audit."""
        return self.selections[self.method]

    @property
    def hfr(self) -> TimestepSelection:
        """The corrected HFR of every candidate, whichever rule picked."""
        return self.selections["hfr"]

    @property
    def checked(self) -> TimestepSelection:
        """The selection by the rule that checks."""
        return self.selections[self.checked_by]

    def describe(self) -> str:
        """The verdict with its sentence, then the warnings, one line each."""
        return "\n".join([f"{self.verdict}: {self.sentence}", *(f"warning: {warning}" for warning in self.warnings)])

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON, whole or not at all; `load` reads it back equal."""
        return write_json(path, dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        fields = {entry.name: content[entry.name] for entry in dataclasses.fields(cls)}
        selections = {name: TimestepSelection.from_dict(each) for name, each in fields["selections"].items()}
        regret = Regret(**fields["regret"]) if fields["regret"] else None
        return cls(**fields | {"selections": selections, "regret": regret})

    def plot(self, path: str | Path) -> Path:
        """Draw the audit, see `plot_audit`; whole or not at all."""
        with atomic_file(path) as temporary:
            plot_audit(self, temporary)
        return as_path(path)
