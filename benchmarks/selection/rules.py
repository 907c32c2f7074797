"""The rules for choosing a timestep, as functions of features that were computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from aselect_hf import selection
from aselect_hf.selection import criteria
from aselect_hf.selection.uncertainty import mean_iou_of

IMAGES, AUGMENTED, NOISY, RATIOS, LABELLED = "images", "augmented views", "noise views", "hfr", "labelled"
"""What a rule sees: image means with the stored noise `(images, width)`; random crops, or fresh noise of the same
image, `(images, views, width)`; HFR of image and control `(images, 2)`; labeled images or tokens `(rows, width)`."""
NEIGHBOURS = 5
FEW_IMAGES, NUM_UNLABELLED, NUM_LABELLED = (selection.RULES[name].num_images for name in ("hfr", "consensus", "ridge"))


@dataclass(frozen=True)
class Rule:
    """How a rule scores a feature at a timestep.

    Args:
        source: which of the arrays above it sees.
        score: of `(values, labels, images)`, the last two `None` without labels; higher is better. `images` says of
            which image every row is, where rows are tokens.
        num_images: that it looks at by default.
        passes: runs of the network an image and timestep.
        together: `score` is of all candidates at once, a list of their values, and gives a list.
    """

    source: str
    score: Callable[..., Any]
    num_images: int
    passes: int = 1
    together: bool = False


def score_of_classes(truth: np.ndarray, predicted: np.ndarray, images: np.ndarray | None) -> float:
    """Accuracy, or the mean IoU of tokens where `images` are given."""
    if images is None:
        return float((truth == predicted).mean())
    return mean_iou_of(truth, predicted)


def _ridge(x: np.ndarray, labels: np.ndarray, images: np.ndarray | None) -> float:
    return score_of_classes(labels, criteria.ridge_predictions(x, labels, groups=images).classes, images)


def _knn(x: np.ndarray, labels: np.ndarray, images: np.ndarray | None) -> float:
    return score_of_classes(labels, criteria.knn_predictions(x, labels, NEIGHBOURS, groups=images), images)


RULES = {
    "hfr": Rule(RATIOS, lambda x, *_: float((x[:, 0] - x[:, 1]).mean()), FEW_IMAGES, 2),
    "hfr, uncorrected": Rule(RATIOS, lambda x, *_: float(x[:, 0].mean()), FEW_IMAGES),
    "consensus": Rule(IMAGES, lambda cells, *_: criteria.consensus(cells).scores, NUM_UNLABELLED, together=True),
    "rankme": Rule(IMAGES, lambda x, *_: criteria.rankme(x), NUM_UNLABELLED),
    "alpha_req": Rule(IMAGES, lambda x, *_: criteria.alpha_req(x), NUM_UNLABELLED),
    "lidar": Rule(AUGMENTED, lambda x, *_: criteria.lidar(x), NUM_UNLABELLED, 2),
    "retrieval": Rule(AUGMENTED, lambda x, *_: criteria.view_retrieval(x), NUM_UNLABELLED, 2),
    "snr": Rule(NOISY, lambda x, *_: criteria.signal_to_noise(x), NUM_UNLABELLED, 2),
    "ridge": Rule(LABELLED, _ridge, NUM_LABELLED),
    "knn": Rule(LABELLED, _knn, NUM_LABELLED),
    "logme": Rule(LABELLED, lambda x, labels, _: criteria.logme(x, labels), NUM_LABELLED),
}
AUDITED = ("hfr", "consensus", "logme", "fixed t = 100")


@dataclass(frozen=True)
class Combination:
    """A rule made of the scores of others.

    Args:
        parts: names in `RULES`; of the same samples.
        combine: of their scores `(samples, timesteps)` each, to scores of the same shape.
    """

    parts: tuple[str, ...]
    combine: Callable[[list[np.ndarray]], np.ndarray]


def ranks(scores: np.ndarray) -> np.ndarray:
    """0 for the best timestep of every sample."""
    return (-scores).argsort(axis=1, kind="stable").argsort(axis=1)


def _shortlist(scores: list[np.ndarray]) -> np.ndarray:
    """The second rule, among the first one's best five."""
    first, second = (x[: min(map(len, scores))] for x in scores)
    return np.where(ranks(first) < SHORTLIST, second, -np.inf)


SHORTLIST = 5
COMBINATIONS = {"shortlist": Combination(("retrieval", "ridge"), _shortlist)}
