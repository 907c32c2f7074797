"""Which of the goals the default rules reach: points lost, every checkpoint counted once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from aselect_hf.selection.rule import WITH_LABELS, WITHOUT_LABELS
from benchmarks.selection.curves import Content, lost, scores_of, table
from benchmarks.selection.left_out import FIGURES, Loss, choices, judged

BASELINE = "hfr"


class Wanted(NamedTuple):
    """Goals of a default rule.

    Args:
        rule: the default.
        choice: the line of `left_out` that chooses it on other checkpoints.
        most: by name of `FIGURES`, the points that may be lost; what is not there is no goal.
    """

    rule: str
    choice: str
    most: dict[str, float]


WANTED = (
    Wanted(WITHOUT_LABELS, "`consensus` alone, or with a second rule", dict(zip(FIGURES, (0.5, 2, 5, 1), strict=True))),
    Wanted(WITH_LABELS, "a rule with labels", {"mean": 0.3, "worst checkpoint": 1.5, "of 64 images": 0.6}),
)


def goals(contents: list[Content]) -> str:
    """What is wanted, what the default rule loses, and what its choice loses with one checkpoint left out."""
    rows = []
    for rule, choice, most in WANTED:
        shipped = Loss.of(contents, lambda content, kind, rule=rule: scores_of(content, rule, kind))
        losses = {name: Loss.of(contents, scores) for name, scores in choices(contents)[choice].items()}
        chosen = judged(losses, [[checkpoint] for checkpoint in shipped.usual])[0].figures()
        for goal, limit in most.items():
            cells = [f"{found[goal]:.2f}" for found in (shipped.figures(), chosen)]
            rows.append([f"`{rule}`", goal, f"{limit:g}", *cells, "yes" if chosen[goal] <= limit else "no"])
    return table(["default rule", "goal", "at most", "the rule", "chosen without the checkpoint", "met"], rows)


def worse_than_baseline(contents: list[Content]) -> str:
    """The pairs on which a default rule loses more than HFR, by a tenth, on the mean and on the worst sample."""
    sentences = []
    for rule in (each.rule for each in WANTED):
        pairs = [content["pair"] for content in contents if _is_worse(content, rule)]
        where = f"{len(pairs)} of {len(contents)} pairs ({', '.join(pairs)})" if pairs else "no pair"
        sentences.append(f"`{rule}` on {where}")
    return ", ".join(sentences)


def _is_worse(content: Content, rule: str) -> bool:
    ours, theirs = (lost(content, scores_of(content, name, "usual")) for name in (rule, BASELINE))
    return bool(np.round(ours.mean() - theirs.mean(), 1) > 0 and np.round(ours.max() - theirs.max(), 1) > 0)
