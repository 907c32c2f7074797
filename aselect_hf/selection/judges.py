"""Judges score candidates by their features, and say how certain each score is.

A candidate is one feature at one timestep, an array `(rows, views, columns)`; a row is an image or a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from aselect_hf.selection.probe import fit_in_parallel
from aselect_hf.selection.rule import Rule
from aselect_hf.selection.uncertainty import (
    Evidence,
    Jackknife,
    iou_counts,
    iou_error,
    iou_influence,
    mean_iou,
    of_outcomes,
)

SINGLE_VIEW = ("images", "labeled rows")


class Judged(NamedTuple):
    """The scores of all candidates.

    Args:
        scores: one per candidate; higher is better.
        evidence: returns the evidence of a candidate's score. It is called for the chosen feature only, so it may cost
            more than a score.
    """

    scores: Iterable[float]
    evidence: Callable[[np.ndarray], Evidence]


@dataclass
class Judge:
    """A way to score all candidates of all features.

    Args:
        rule: name of the rule.
        score_name: what a score is called.
        judge: scores a list of candidates.
        together: whether the score of a candidate depends on the other candidates.
    """

    rule: str
    score_name: str
    judge: Callable[[list[np.ndarray]], Judged]
    together: bool = False


def seen(rule: Rule, candidate: np.ndarray) -> np.ndarray:
    """The part of a candidate that the criterion of a rule scores, see `Criterion.sees`."""
    return candidate[:, 0] if rule.criterion is not None and rule.criterion.sees in SINGLE_VIEW else candidate


def by_jackknife(
    rule: Rule, jackknife: Jackknife, labels: np.ndarray | None = None, images: np.ndarray | None = None
) -> Judge:
    """Judge by the criterion of a rule, with standard errors by the jackknife.

    Args:
        labels, images: the label and image of each row, for a criterion of labeled rows.
    """
    criterion = rule.criterion
    assert criterion is not None

    def score(candidate: np.ndarray, rows: np.ndarray | slice = slice(None)) -> float:
        values = seen(rule, candidate)[rows]
        if labels is None:
            return float(criterion.score(values))
        return float(criterion.score(values, labels[rows], None if images is None else images[rows]))

    def evidence(candidate: np.ndarray) -> Evidence:
        return jackknife.evidence(partial(score, candidate))

    return _one_by_one(rule.name, criterion.score_name, score, evidence)


def by_outcomes(rule: Rule, outcomes: Callable[[np.ndarray], np.ndarray]) -> Judge:
    """Judge by the mean over images of `outcomes`, which takes a candidate and returns `(images,)`."""
    criterion = rule.criterion
    assert criterion is not None

    def score(candidate: np.ndarray) -> float:
        return float(outcomes(seen(rule, candidate)).mean())

    def evidence(candidate: np.ndarray) -> Evidence:
        return of_outcomes(outcomes(seen(rule, candidate)))

    return _one_by_one(rule.name, criterion.score_name, score, evidence)


def by_token_classes(
    rule: Rule, predict: Callable[[np.ndarray], np.ndarray], labels: np.ndarray, images: np.ndarray, seed: int
) -> Judge:
    """Judge by the mean IoU of predicted classes of tokens.

    Args:
        predict: predicts each token of a candidate from the tokens of other images: `(tokens,)`.
        images: the image of each token.
        seed: seed of the bootstrap.
    """

    def counts_of(candidate: np.ndarray) -> np.ndarray:
        return iou_counts(labels, predict(seen(rule, candidate)), images)

    def score(candidate: np.ndarray) -> float:
        return float(mean_iou(counts_of(candidate).sum(axis=0)))

    def evidence(candidate: np.ndarray) -> Evidence:
        counts = counts_of(candidate)
        return Evidence(iou_error(counts, seed), iou_influence(counts))

    score_name = f"leave-one-image-out mean IoU (tokens, {rule.name})"
    return _one_by_one(rule.name, score_name, score, evidence)


def _one_by_one(
    rule: str, score_name: str, score: Callable[[np.ndarray], float], evidence: Callable[[np.ndarray], Evidence]
) -> Judge:
    """Judge each candidate by itself."""
    return Judge(rule, score_name, lambda each: Judged(fit_in_parallel(partial(score, x) for x in each), evidence))
