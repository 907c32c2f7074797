"""The description of a rule, a way to choose t. Help, cards, tables, the command line and the benchmark read it.

A new rule is one file in `aselect_hf/selection/rules/` with a function under the decorator `rule`.
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
WITH_LABELS, WITHOUT_LABELS = "logme", "consensus_rank"
"""The rules of `method="auto"`, with labels of two classes and without; `docs/evidence.md` says why."""
CHECK_WITHOUT_LABELS = "consensus"
"""The rule that an audit without labels asks about the pick of a rule that does not look for clusters."""
BY_CLUSTERS = (WITHOUT_LABELS, CHECK_WITHOUT_LABELS)
"""Rules that look for clusters; an audit without labels asks HFR about their picks."""

Labels = Literal["none", "few", "all"]
Seen = Literal["images", "augmented views", "noise views", "ratios", "sequence ratios", "labeled rows", "scores"]
Select = Callable[..., "TimestepSelection"]


@dataclass(frozen=True)
class Criterion:
    """How a rule scores arrays; higher is better.

    Args:
        score: `score(values)`; for `"labeled rows"`, `score(values, labels, images)`.
        sees: what the `values` of a candidate are. `"images"`: `(images, width)`, with the stored noise.
            `"augmented views"`, `"noise views"`: `(images, views, width)`, of random crops or of fresh noise.
            `"ratios"`: `(images, 2)`, HFR of the image and of its noise. `"sequence ratios"`: `(images,)`, HFR over the
            token sequence, of sampled latents. `"labeled rows"`: `(rows, width)`, one row per image or per token; for
            tokens, `images` holds the image of each. `"scores"`: curves of other rules.
        score_name: what a score is called.
        together: whether a score depends on the other candidates. If so, `score` takes a list with the values of all
            candidates and returns all scores.
        of_moments: the same score from `moments.Moments` of the rows, if they are enough, for large numbers of rows.
    """

    score: Callable[..., Any]
    sees: Seen
    score_name: str
    together: bool = False
    of_moments: Callable[[Any], float] | None = None


@dataclass(frozen=True)
class Rule:
    """Everything that the rest of the package needs to know about a way to choose t.

    Args:
        name: value of `method=`.
        select: function of `SelectionInputs`; its keyword-only parameters are the rule's options.
        labels: the labels that it needs: `"none"`, `"few"` (of at most `num_images` images), or `"all"`.
        explanation: what it does, in one sentence.
        num_images: default number of images; `None` for all.
        runs: default number of network runs per image and timestep.
        criterion: how it scores arrays; `None` if it trains (`grid`, `gate`) or scores nothing (`fixed`).
        chooses_feature: whether its scores are comparable between features, so that it can choose one. Those of rules
            without labels are not: what they chose was worse than the checkpoint's own feature.
        audited: whether a comparison may audit its pick.
        even_in_log_snr: whether its default candidates are even in log-SNR instead of dense at low noise.
        tasks: names of the tasks whose labels it can use.
        parts: its options that name other rules.
        aliases: former names of its options, with the present ones.
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
        """The options that a caller may set, by name."""
        parameters = inspect.signature(self.select).parameters
        return {name: each for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY}

    def renamed(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options under their present names.

        Raises:
            ValueError: an option is given under both names.
        """
        for old, new in self.aliases.items():
            if {old, new} <= set(options):
                raise ValueError(f"{old} is the former name of {new}: give one of the two")
        return {self.aliases.get(name, name): value for name, value in options.items()}


RULES: dict[str, Rule] = {}
"""All rules by name. Import it from `aselect_hf.selection.rules`, which fills it."""


def rule(name: str, **description: Any) -> Callable[[Select], Select]:
    """Register the decorated function as a rule.

    Args:
        description: the fields of `Rule`. `name`, `labels` and `explanation` must be literal strings: the command line
            reads them, and the options in the signature and docstring, from the source.

    Raises:
        ValueError: a function of another module has the name.
    """

    def register(select: Select) -> Select:
        known = RULES.get(name)
        if known is not None and known.select.__module__ != select.__module__:
            raise ValueError(f"rule {name!r} of {select.__module__} exists already in {known.select.__module__}")
        RULES[name] = Rule(name, select, **description)
        return select

    return register
