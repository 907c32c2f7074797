"""A way to choose t, described once: help, cards, tables, the command line and the benchmark read it from here.

A new rule is one file in `aselect_hf/selection/rules/`: a function under the decorator `rule`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from aselect_hf.tasks import TASKS

if TYPE_CHECKING:
    from aselect_hf.selection.result import TimestepSelection

AUTO = "auto"
WITH_LABELS, WITHOUT_LABELS = "logme", "consensus"
"""The rules that `method="auto"` stands for, with labels of two classes and without; `docs/evidence.md` says why."""

Labels = Literal["none", "few", "all"]
Seen = Literal["images", "augmented views", "noise views", "ratios", "labeled rows", "scores"]
Select = Callable[..., "TimestepSelection"]


@dataclass(frozen=True)
class Criterion:
    """How a rule scores what it sees, as a function of arrays; higher is better.

    Args:
        score: `score(values)`; for `"labeled rows"`, `score(values, labels, images)`.
        sees: what `values` are, of one candidate. `"images"`: `(images, width)`, with the stored noise.
            `"augmented views"`, `"noise views"`: `(images, views, width)`, of random crops or of fresh noise.
            `"ratios"`: `(images, 2)`, HFR of the image and of its noise. `"labeled rows"`: `(rows, width)`, of images,
            or of tokens, then `images` says which image each row is of. `"scores"`: curves of the rule's parts.
        score_name: what a score is.
        together: whether a score depends on the other candidates: `values` is then a list with those of all, and so
            is what `score` returns.
    """

    score: Callable[..., Any]
    sees: Seen
    score_name: str
    together: bool = False


@dataclass(frozen=True)
class Rule:
    """Everything that anybody needs to know of a way to choose t.

    Args:
        name: what `method=` calls it.
        select: of `SelectionInputs`; its options are its keyword-only parameters.
        labels: the labels that it needs: `"none"`, `"few"` (of at most `num_images` images), or `"all"` that there are.
        explanation: what it does, in one sentence.
        num_images: images that it looks at by default; `None` for all.
        runs: of the network by default, per image and timestep.
        criterion: how it scores arrays, where it scores one candidate at a time or all together.
        chooses_feature: whether its scores can be compared between features, so that it can choose one.
        audited: whether a comparison audits its pick.
        even_in_log_snr: whether its default candidates are even in log-SNR, rather than dense at low noise.
        tasks: what its labels may be.
        parts: names of its options that name other rules.
        aliases: former names of its options, and the present ones.
    """

    name: str
    select: Select
    labels: Labels
    explanation: str
    num_images: int | None
    runs: int = 1
    criterion: Criterion | None = None
    chooses_feature: bool = False
    audited: bool = True
    even_in_log_snr: bool = False
    tasks: tuple[str, ...] = tuple(TASKS)
    parts: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """What a caller may choose, by name."""
        parameters = inspect.signature(self.select).parameters
        return {name: each for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}

    def renamed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options under their present names.

        Raises:
            ValueError: one is given under both names.
        """
        for old, new in self.aliases.items():
            if {old, new} <= set(options):
                raise ValueError(f"{old} is the former name of {new}: give one of the two")
        return {self.aliases.get(name, name): value for name, value in options.items()}


RULES: dict[str, Rule] = {}
"""By name; import it from `aselect_hf.selection.rules`, which fills it."""


def rule(name: str, **description: Any) -> Callable[[Select], Select]:
    """Register the function below as a rule.

    Args:
        description: the fields of `Rule`. `name`, `labels` and `explanation` must be literal strings, because the
            command line reads them, and the options from the function's signature and docstring, without importing it.

    Raises:
        ValueError: another function has the name.
    """

    def register(select: Select) -> Select:
        known = RULES.get(name)
        if known is not None and known.select.__module__ != select.__module__:
            raise ValueError(f"rule {name!r} of {select.__module__} exists already in {known.select.__module__}")
        RULES[name] = Rule(name, select, **description)
        return select

    return register
