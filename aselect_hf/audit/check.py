"""A pick of a timestep, and the runs that check it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from aselect_hf.audit.regret import Regret, estimate_regret, paired_regret, unpaired_deviations
from aselect_hf.audit.suspicions import shares_of_picks
from aselect_hf.data.classes import has_classes
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.selection import TimestepSelection, default_timesteps, select_timestep
from aselect_hf.selection.rule import WITHOUT_LABELS
from aselect_hf.selection.samples import LEAST_PER_CLASS

NUM_AUDITED = 1000
"""Labeled images by default: with 500, the regret's errors are as large as what is to be told (`docs/evidence.md`)."""
LEAST_CURVE = 3
"""Timesteps that two rules must both have scored, for their curves to be compared."""


@dataclass(frozen=True)
class Check:
    """A pick, and what was run to check it.

    Args:
        name: of the rule that picked, see `Audit.method`.
        rule: that checks.
        labelled: whether it does so by labels or masks.
        grid: timesteps of the curves.
        picked, hfr, checked: of the pick, of HFR, and of `rule`; the same ones where these rules are the same.
        seed: of every bootstrap.
    """

    name: str
    rule: str
    labelled: bool
    grid: list[int]
    picked: TimestepSelection
    hfr: TimestepSelection
    checked: TimestepSelection
    seed: int

    @cached_property
    def shares(self) -> np.ndarray | None:
        """See `Audit.pick_shares`."""
        return shares_of_picks(self.picked, self.grid, self.seed)

    @cached_property
    def correlation(self) -> float | None:
        """See `Audit.rank_correlation`."""
        return None if self.checked is self.picked else rank_correlation(self.picked, self.checked)

    @cached_property
    def regret(self) -> Regret:
        """Of the pick."""
        return self.regret_at(self.picked.timestep)

    def regret_at(self, timestep: int) -> Regret:
        """Regret of a timestep by the curve of the rule that checks."""
        return regret_by(self.checked, self.grid.index(timestep), self.seed)


def audited_images(images: Any, num_images: int, seed: int, on_error: str) -> tuple[ImageData, bool, list[str]]:
    """Random images, whether their labels (or masks) can check, and a warning of what is left out."""
    data, warnings = ImageData.of(images, num_images), []
    labelled = data.masks is not None or has_classes(data.labels)
    if labelled and data.masks is None:
        if unlabelled := data.num_unlabelled:
            warnings.append(f"{unlabelled:,} of {len(data):,} images have no label: not used")
        data = data.labelled()
    data = data.sample(num_images, seed, per_class=LEAST_PER_CLASS if labelled else 0)
    return data.readable(on_error), labelled, warnings


def check_pick(
    model: ASelectDiTModel,
    data: ImageData,
    labelled: bool,
    picked: TimestepSelection,
    run: dict[str, Any],
    pool_size: int,
) -> Check:
    """Run HFR and the rule that checks on the timesteps of `run`, unless the pick is theirs.

    Args:
        run: arguments of `select_timestep` for every rule.
    """
    grid = run["timesteps"]
    name = rule_name(picked, grid)
    hfr = picked if name == "hfr" else select_timestep(model, data, method="hfr", **run)
    rule = "ridge" if labelled else "hfr" if picked.method == WITHOUT_LABELS else WITHOUT_LABELS
    if rule == "hfr":
        checked = hfr
    elif rule == name and picked.timesteps == grid:
        checked = picked
    else:
        num_images = (run["num_images"] or NUM_AUDITED) if labelled else run["num_images"]
        checked = select_timestep(model, data, method=rule, pool_size=pool_size, **run | {"num_images": num_images})
    return Check(name, rule, labelled, grid, picked, hfr, checked, run["seed"])


def audited_timesteps(
    model: ASelectDiTModel, picked: TimestepSelection, timesteps: Sequence[int] | int | None
) -> list[int]:
    """Where the curves are taken: at the timesteps that the rule scored; where not all, at its candidates besides.

    Raises:
        ValueError: they are fewer than 2.
    """
    grid = set(picked.timesteps) | {picked.timestep}
    if not picked.scored_all:
        schedule = model.noise_schedule
        if timesteps is None:
            grid |= set(default_timesteps(schedule))
        else:
            grid |= set(default_timesteps(schedule, timesteps) if isinstance(timesteps, int) else timesteps)
    if len(grid) < 2:
        raise ValueError(f"timesteps must be at least 2 to compare, got {len(grid)}")
    return sorted(grid)


def rule_name(picked: TimestepSelection, grid: list[int]) -> str:
    """See `Audit.method`."""
    if picked.method != "hfr":
        return picked.method
    if not picked.options.get("noise_correction", True):
        return "hfr, uncorrected"
    return "hfr" if picked.timesteps == grid and picked.scored_all else "hfr, searched"


def regret_by(checked: TimestepSelection, pick: int, seed: int) -> Regret:
    """Regret of the pick by another rule's curve; paired where that rule scores single images."""
    if checked.per_image_scores is None:
        deviations = unpaired_deviations(checked.standard_errors, pick, seed)
        return estimate_regret(checked.timesteps, checked.scores, deviations, pick)
    outcomes = np.array(checked.per_image_scores)
    span = float(np.ptp(outcomes)) if checked.method == "hfr" else 1.0
    return paired_regret(checked.timesteps, outcomes, pick, seed, span)


def rank_correlation(one: TimestepSelection, other: TimestepSelection) -> float | None:
    """Spearman's, from -1 to 1, over timesteps that both scored; 0 of a constant curve, `None` of fewer than 3."""
    curves = [dict(zip(each.timesteps, each.scores, strict=False)) for each in (one, other)]
    common = sorted(set(curves[0]) & set(curves[1]))
    if len(common) < LEAST_CURVE:
        return None
    first, second = ([curve[t] for t in common] for curve in curves)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(spearmanr(first, second).statistic)
