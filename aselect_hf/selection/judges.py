"""What judges candidates by their features: scores, and how sure each one is.

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
    """What a judge says.

    Args:
        scores: one per candidate; higher is better.
        evidence: of a candidate's score. It is called for the chosen feature only, so it may cost more than a score.
    """

    scores: Iterable[float]
    evidence: Callable[[np.ndarray], Evidence]


@dataclass
class Judge:
    """A way to judge all candidates, of all features, together.

    Args:
        rule: its name.
        score_name: what the score is.
        judge: of all candidates.
        together: whether the score of a candidate depends on the other candidates.
    """

    rule: str
    score_name: str
    judge: Callable[[list[np.ndarray]], Judged]
    together: bool = False


def seen(rule: Rule, candidate: np.ndarray) -> np.ndarray:
    """What the criterion of a rule sees of a candidate, see `Criterion.sees`."""
    return candidate[:, 0] if rule.criterion is not None and rule.criterion.sees in SINGLE_VIEW else candidate


def one_by_one(score: Callable[[np.ndarray], float], candidates: list[np.ndarray]) -> Iterable[float]:
    return fit_in_parallel(partial(score, candidate) for candidate in candidates)


def by_jackknife(
    rule: Rule, jackknife: Jackknife, labels: np.ndarray | None = None, images: np.ndarray | None = None
) -> Judge:
    """By the criterion of a rule; standard errors are the jackknife's.

    Args:
        labels, images: of every row, where the criterion is of labeled rows.
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

    return Judge(rule.name, criterion.score_name, lambda each: Judged(one_by_one(score, each), evidence))


def by_outcomes(rule: Rule, outcomes: Callable[[np.ndarray], np.ndarray]) -> Judge:
    """By the mean of what every image adds to the score, `outcomes` of a candidate: `(images,)`."""
    criterion = rule.criterion
    assert criterion is not None

    def score(candidate: np.ndarray) -> float:
        return float(outcomes(seen(rule, candidate)).mean())

    def evidence(candidate: np.ndarray) -> Evidence:
        return of_outcomes(outcomes(seen(rule, candidate)))

    return Judge(rule.name, criterion.score_name, lambda each: Judged(one_by_one(score, each), evidence))


def by_token_classes(
    rule: Rule, predict: Callable[[np.ndarray], np.ndarray], labels: np.ndarray, images: np.ndarray, seed: int
) -> Judge:
    """By the mean IoU of predicted classes of tokens.

    Args:
        predict: of a candidate's tokens, each by those of other images: `(tokens,)`.
        images: which image every token is of.
        seed: of the bootstrap.
    """

    def counts_of(candidate: np.ndarray) -> np.ndarray:
        return iou_counts(labels, predict(seen(rule, candidate)), images)

    def score(candidate: np.ndarray) -> float:
        return float(mean_iou(counts_of(candidate).sum(axis=0)))

    def evidence(candidate: np.ndarray) -> Evidence:
        counts = counts_of(candidate)
        return Evidence(iou_error(counts, seed), iou_influence(counts))

    score_name = f"leave-one-image-out mean IoU (tokens, {rule.name})"
    return Judge(rule.name, score_name, lambda each: Judged(one_by_one(score, each), evidence))
