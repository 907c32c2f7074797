"""What judges a candidate's features: a score, and how sure it is.

Standard errors are over images. Where every image is right or wrong by itself (`retrieval`, `ridge`, `knn`): of the
mean over images, which is what a bootstrap of them tends to, classifiers and whitening held fixed. For the mean IoU of
tokens: by bootstrap of images, as in the grid. Elsewhere: the jackknife over 10 random tenths of the images, because a
bootstrap's duplicates lower a rank, and are found by their copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from aselect_hf.selection.grid import iou_counts, iou_error, iou_influence, mean_iou
from aselect_hf.selection.probe import fit_in_parallel

JACKKNIFE_GROUPS = 10


class Evidence(NamedTuple):
    """How sure a score is.

    Args:
        standard_error: over images.
        per_image: `(images,)`, where the score is their mean.
    """

    standard_error: float
    per_image: np.ndarray | None = None


@dataclass
class Judge:
    """A criterion for candidates, whose features are `(rows, views, columns)` each.

    Args:
        name: of the method.
        score_name: what the score is.
        scores: of all candidates, of all features, together; higher is better.
        evidence: called for candidates of the chosen feature only, after `scores`, so it may cost more than a score.
        together: whether the score of a candidate depends on the other candidates.
    """

    name: str
    score_name: str
    scores: Callable[[list[np.ndarray]], Iterable[float]]
    evidence: Callable[[np.ndarray], Evidence]
    together: bool = False


def predictor(
    method: str,
    labels: np.ndarray,
    images: np.ndarray | None,
    seed: int,
    predict: Callable[[np.ndarray], np.ndarray],
) -> Judge:
    """A judge by left-out predictions: accuracy of images, or mean IoU of tokens.

    Args:
        images: which image every token is of; `None` where samples are images.
    """
    if images is None:
        return Judge(
            method,
            f"leave-one-out accuracy ({method})",
            one_by_one(lambda x: float((predict(x[:, 0]) == labels).mean())),
            lambda x: of_outcomes((predict(x[:, 0]) == labels).astype(float)),
        )

    def counts_of(x: np.ndarray) -> np.ndarray:
        return iou_counts(labels, predict(x[:, 0]), images)

    def evidence(x: np.ndarray) -> Evidence:
        counts = counts_of(x)
        return Evidence(iou_error(counts, seed), iou_influence(counts))

    return Judge(
        method,
        f"leave-one-image-out mean IoU (tokens, {method})",
        one_by_one(lambda x: float(mean_iou(counts_of(x).sum(axis=0)))),
        evidence,
    )


def one_by_one(score: Callable[[np.ndarray], float]) -> Callable[[list[np.ndarray]], Iterable[float]]:
    return lambda cells: fit_in_parallel(partial(score, cell) for cell in cells)


def of_outcomes(outcomes: np.ndarray) -> Evidence:
    return Evidence(float(outcomes.std(ddof=1) / len(outcomes) ** 0.5), outcomes)


def jackknifed(
    method: str,
    score_name: str,
    score: Callable[[np.ndarray, np.ndarray], float],
    num_rows: int,
    seed: int,
    images: np.ndarray | None = None,
    strata: np.ndarray | None = None,
) -> Judge:
    """A judge by `score(values, rows)`, whose error is the jackknife's over groups of images (alike in `strata`)."""
    images = np.arange(num_rows) if images is None else images
    num_images = int(images.max()) + 1
    shuffled = np.random.default_rng(seed).permutation(num_images)
    order = shuffled if strata is None else shuffled[np.argsort(strata[shuffled], kind="stable")]
    num_groups = min(JACKKNIFE_GROUPS, num_images)
    group_of = np.empty(num_images, dtype=np.int64)
    group_of[order] = np.arange(num_images) % num_groups
    group_of = group_of[images]

    def evidence(x: np.ndarray) -> Evidence:
        left = np.array([score(x, np.flatnonzero(group_of != group)) for group in range(num_groups)])
        return Evidence(float(np.sqrt((num_groups - 1) * left.var())))

    return Judge(method, score_name, one_by_one(lambda x: score(x, np.arange(num_rows))), evidence)
