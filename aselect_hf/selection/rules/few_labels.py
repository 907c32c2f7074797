"""Rules for a few labels: leave-one-out ridge regression, nearest neighbors, LogME.

In classification a row is an image. In segmentation a row is a token, and all tokens of an image are left out together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from aselect_hf.selection import criteria, moments
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.judges import Judge, by_jackknife, by_outcomes, by_token_classes
from aselect_hf.selection.labeled import LabeledRows, labeled_rows
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.selection.rule import RULES, Criterion, rule
from aselect_hf.selection.scoring import KINDS, select_by_judge
from aselect_hf.selection.streamed_ridge import select_by_streamed_ridge
from aselect_hf.selection.streaming import select_by_moments
from aselect_hf.selection.uncertainty import Jackknife, class_score

MAX_TOKENS = 4000
NEIGHBORS = 5


def ridge_classes(values: np.ndarray, labels: np.ndarray, images: np.ndarray | None) -> np.ndarray:
    """The class of each row by ridge regression on the others."""
    return criteria.ridge_predictions(values, labels, groups=images).classes


def ridge_score(values: np.ndarray, labels: np.ndarray, images: np.ndarray | None) -> float:
    return class_score(labels, ridge_classes(values, labels, images), images)


def knn_classes(
    values: np.ndarray, labels: np.ndarray, images: np.ndarray | None, neighbors: int = NEIGHBORS
) -> np.ndarray:
    """The class of each row by its nearest others, or by all others if there are fewer than `neighbors`."""
    largest = 1 if images is None else int(np.bincount(images).max())
    return criteria.knn_predictions(values, labels, min(neighbors, len(labels) - largest), groups=images)


def knn_score(values: np.ndarray, labels: np.ndarray, images: np.ndarray | None) -> float:
    return class_score(labels, knn_classes(values, labels, images), images)


def logme_score(values: np.ndarray, labels: np.ndarray, images: np.ndarray | None) -> float:
    return criteria.logme(values, labels)


@rule(
    "ridge",
    labels="few",
    explanation="Takes the timestep whose features classify a few labeled images best, "
    "each by ridge regression on the others.",
    num_images=500,
    chooses_feature=True,
    criterion=Criterion(ridge_score, "labeled rows", "leave-one-out accuracy (ridge)"),
)
def select_ridge(
    inputs: SelectionInputs,
    *,
    task: str | None = None,
    pool_size: int = 1,
    max_tokens: int = MAX_TOKENS,
    kinds: Sequence[str] = KINDS,
) -> TimestepSelection:
    """Score each candidate by leave-one-out ridge regression: accuracy of images, or mean IoU of tokens.

    Args:
        task: "classification" or "segmentation" (default: segmentation if the images have masks).
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
        max_tokens: Maximum number of random tokens to learn from in segmentation (default: 4000).
        kinds: Kinds to choose among if `feature` is "auto" (default: query, key, value, attention, mlp, hidden).

    Raises:
        ValueError: no labels or masks, fewer than 2 classes with 2 images each, fewer than 3 images, NaN pixels, an
            unknown kind.
    """
    data = labeled_rows("ridge", inputs, task, pool_size, max_tokens)
    if data.images is None:
        found = select_by_streamed_ridge(RULES["ridge"], inputs, data.data, data.rows, data.labels, data.options)
        if found is not None:
            return found
    judge = _by_classes("ridge", data, partial(ridge_classes, labels=data.labels, images=data.images), inputs.seed)
    return select_by_judge(inputs, judge, data.views, data.rows, data.options, kinds)


@rule(
    "knn",
    labels="few",
    explanation="Takes the timestep whose features classify a few labeled images best, each by its nearest neighbors.",
    num_images=500,
    chooses_feature=True,
    criterion=Criterion(knn_score, "labeled rows", "leave-one-out accuracy (knn)"),
    aliases={"neighbours": "neighbors"},
)
def select_knn(
    inputs: SelectionInputs,
    *,
    neighbors: int = NEIGHBORS,
    task: str | None = None,
    pool_size: int = 1,
    max_tokens: int = MAX_TOKENS,
    kinds: Sequence[str] = KINDS,
) -> TimestepSelection:
    """Score each candidate by leave-one-out nearest neighbors: accuracy of images, or mean IoU of tokens.

    Args:
        neighbors: Maximum number of neighbors that vote (default: 5).
        task: "classification" or "segmentation" (default: segmentation if the images have masks).
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
        max_tokens: Maximum number of random tokens to learn from in segmentation (default: 4000).
        kinds: Kinds to choose among if `feature` is "auto" (default: query, key, value, attention, mlp, hidden).

    Raises:
        ValueError: `neighbors` below 1, and as `select_ridge`.
    """
    if neighbors < 1:
        raise ValueError(f"neighbors must be at least 1, got {neighbors}")
    data = labeled_rows("knn", inputs, task, pool_size, max_tokens)
    classes = partial(knn_classes, labels=data.labels, images=data.images, neighbors=neighbors)
    judge = _by_classes("knn", data, classes, inputs.seed)
    options = {"neighbors": neighbors} | data.options
    return select_by_judge(inputs, judge, data.views, data.rows, options, kinds)


@rule(
    "logme",
    labels="few",
    explanation="Takes the timestep whose features give the labels of a few images the highest evidence (LogME).",
    num_images=500,
    chooses_feature=True,
    criterion=Criterion(logme_score, "labeled rows", "LogME (log evidence per sample)", of_moments=moments.logme),
)
def select_logme(
    inputs: SelectionInputs,
    *,
    task: str | None = None,
    pool_size: int = 1,
    max_tokens: int = MAX_TOKENS,
    kinds: Sequence[str] = KINDS,
) -> TimestepSelection:
    """Score each candidate by `criteria.logme`, the log evidence of the labels of images or tokens.

    Args:
        task: "classification" or "segmentation" (default: segmentation if the images have masks).
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
        max_tokens: Maximum number of random tokens to learn from in segmentation (default: 4000).
        kinds: Kinds to choose among if `feature` is "auto" (default: query, key, value, attention, mlp, hidden).

    Raises:
        ValueError: as `select_ridge`.
    """
    data = labeled_rows("logme", inputs, task, pool_size, max_tokens)
    strata = data.labels if data.images is None else None
    jackknife = Jackknife.of(len(data.labels), inputs.seed, data.images, strata)
    found = select_by_moments(RULES["logme"], inputs, data.data, data.rows, jackknife, data.options, data.labels)
    if found is not None:
        return found
    judge = by_jackknife(RULES["logme"], jackknife, data.labels, data.images)
    return select_by_judge(inputs, judge, data.views, data.rows, data.options, kinds)


def _by_classes(name: str, data: LabeledRows, predict: partial[np.ndarray], seed: int) -> Judge:
    """Judge by predicted classes: accuracy of images, or mean IoU of tokens."""
    if data.images is not None:
        return by_token_classes(RULES[name], predict, data.labels, data.images, seed)
    return by_outcomes(RULES[name], lambda values: (predict(values) == data.labels).astype(float))
