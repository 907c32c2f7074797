"""Standard errors of scores over images, and the mean IoU of tokens with each image's part in it.

If each image is right or wrong by itself, the standard error is that of the mean over images, the limit of a bootstrap
with classifiers and whitening held fixed. For the mean IoU of tokens it comes from a bootstrap over images. For other
scores it comes from a jackknife over 10 random tenths of the images, because duplicates in a bootstrap lower a rank and
retrieve each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

JACKKNIFE_GROUPS = 10
RESAMPLES = 500


class Evidence(NamedTuple):
    """How certain a score is.

    Args:
        standard_error: over images.
        per_image: `(images,)`, if the score is their mean.
    """

    standard_error: float
    per_image: np.ndarray | None = None


def of_outcomes(outcomes: np.ndarray) -> Evidence:
    """The evidence of a mean over images, from the outcomes `(images,)`."""
    return Evidence(float(outcomes.std(ddof=1) / len(outcomes) ** 0.5), outcomes)


def binomial_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent images."""
    return (share * (1 - share) / count) ** 0.5


@dataclass
class Jackknife:
    """Standard errors of a score by leaving out one group of images at a time.

    Args:
        group_of: `(rows,)`, the group of each row's image.
        num_groups: at least 2.
    """

    group_of: np.ndarray
    num_groups: int

    @classmethod
    def of(cls, num_rows: int, seed: int, images: np.ndarray | None = None, strata: np.ndarray | None = None) -> Self:
        """At most 10 random groups of images.

        Args:
            images: the image of each row (default: each row is an image).
            strata: the class of each image; every group gets its share of each class.
        """
        images = np.arange(num_rows) if images is None else images
        num_images = int(images.max()) + 1
        shuffled = np.random.default_rng(seed).permutation(num_images)
        order = shuffled if strata is None else shuffled[np.argsort(strata[shuffled], kind="stable")]
        num_groups = min(JACKKNIFE_GROUPS, num_images)
        group_of = np.empty(num_images, dtype=np.int64)
        group_of[order] = np.arange(num_images) % num_groups
        return cls(group_of[images], num_groups)

    def evidence(self, score: Callable[[np.ndarray], float]) -> Evidence:
        """The standard error of `score`, a function of the indices of the rows that are kept."""
        left = np.array([score(np.flatnonzero(self.group_of != group)) for group in range(self.num_groups)])
        return Evidence(self.error(left))

    def error(self, left: np.ndarray) -> float:
        """The standard error, from the scores `(groups,)` without each group."""
        return float(np.sqrt((self.num_groups - 1) * left.var()))


def class_score(truth: np.ndarray, predicted: np.ndarray, images: np.ndarray | None) -> float:
    """Accuracy of images, or the mean IoU of tokens if `images` holds the image of each."""
    return float((truth == predicted).mean()) if images is None else mean_iou_of(truth, predicted)


def iou_counts(truth: np.ndarray, predicted: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Numbers of samples in the intersection and union of truth and prediction: `(images, classes, 2)`."""
    shape = (1 + images.max(), 1 + max(truth.max(), predicted.max()))
    hit, true, guessed = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    np.add.at(hit, (images[truth == predicted], truth[truth == predicted]), 1)
    np.add.at(true, (images, truth), 1)
    np.add.at(guessed, (images, predicted), 1)
    return np.stack([hit, true + guessed - hit], axis=-1)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union, averaged over classes with a union: `(..., classes, 2)` to `(...)`."""
    intersection, union = counts[..., 0], counts[..., 1]
    present = union > 0
    return (intersection / np.maximum(union, 1)).sum(axis=-1) / present.sum(axis=-1)


def mean_iou_of(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The mean IoU of all samples together."""
    return float(mean_iou(iou_counts(truth, predicted, np.zeros_like(truth)).sum(axis=0)))


def iou_influence(counts: np.ndarray) -> np.ndarray:
    """Each image's part in the mean IoU, `(images, classes, 2)` to `(images,)`; the mean of the parts is the mean IoU.

    These are the jackknife's pseudo-values (Tukey 1958). Images can be resampled as if the parts were their scores.
    """
    count, whole = len(counts), counts.sum(axis=0)
    parts = count * mean_iou(whole) - (count - 1) * mean_iou(whole - counts)
    return parts - parts.mean() + mean_iou(whole)


def iou_error(counts: np.ndarray, seed: int) -> float:
    """Standard error of the mean IoU by bootstrap over images, from counts `(images, classes, 2)`."""
    num_images = len(counts)
    draws = np.random.default_rng(seed).multinomial(num_images, [1 / num_images] * num_images, size=RESAMPLES)
    return float(mean_iou(np.tensordot(draws, counts, axes=1)).std(ddof=1))
