"""Which rules of the package are measured: those with a criterion, of features that were computed once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from aselect_hf.selection.rule import Criterion, Rule
from aselect_hf.selection.rule_table import by_labels
from aselect_hf.selection.rules.consensus_rank import sum_of_scaled
from aselect_hf.selection.rules.hfr import hfr_score

UNCORRECTED = "hfr, uncorrected"
MEASURED: dict[str, Rule] = {}
"""Rules that score features."""
COMBINED: dict[str, Rule] = {}
"""Rules that score what others have scored."""
SUMS = {"consensus_rank": ("consensus", "rankme")}
"""Rules that add the scores of others, of the same features."""

for rule in by_labels():
    if rule.criterion is not None:
        (COMBINED if rule.parts or rule.name in SUMS else MEASURED)[rule.name] = rule
    if rule.name == "hfr":
        score = partial(hfr_score, noise_correction=False)
        MEASURED[UNCORRECTED] = replace(rule, name=UNCORRECTED, criterion=Criterion(score, "ratios", "HFR"))


def criterion_of(rule: Rule) -> Criterion:
    """The criterion of a rule that has one."""
    assert rule.criterion is not None
    return rule.criterion


def parts_of(rule: Rule) -> list[str]:
    """Names of the rules that a combined one is made of by default."""
    if rule.name in SUMS:
        return [*SUMS[rule.name]]
    return [rule.options[name].default for name in rule.parts]


def combine(rule: Rule, scores: list[np.ndarray]) -> np.ndarray:
    """Scores of a combined rule, from those of its parts, of the same samples: `(samples, timesteps)` each."""
    score = sum_of_scaled if rule.name in SUMS else criterion_of(rule).score
    return np.stack([score(*parts) for parts in zip(*scores, strict=False)])
