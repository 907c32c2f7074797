"""How sure a score is, over images; and the mean IoU of tokens, with every image's part in it.

Where every image is right or wrong by itself, the standard error is that of the mean over images, which is what a
bootstrap of them tends to, classifiers and whitening held fixed. For the mean IoU of tokens it is by bootstrap of
images. Elsewhere it is the jackknife over 10 random tenths of the images, because a bootstrap's duplicates lower a
rank, and are found by their copies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

JACKKNIFE_GROUPS = 10
RESAMPLES = 500


class Evidence(NamedTuple):
    """How sure a score is.

    Args:
        standard_error: over images.
        per_image: `(images,)`, where the score is their mean.
    """

    standard_error: float
    per_image: np.ndarray | None = None


def of_outcomes(outcomes: np.ndarray) -> Evidence:
    """The evidence of a mean over images, from what each of them adds to it."""
    return Evidence(float(outcomes.std(ddof=1) / len(outcomes) ** 0.5), outcomes)


@dataclass
class Jackknife:
    """Standard errors of a score, from the rows of all images but those of one group.

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
            images: which image each row is of; by default each row is one.
            strata: a class of each image, to be alike in all groups.
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
        """The standard error of `score(rows)`, a function of the rows that are kept."""
        left = np.array([score(np.flatnonzero(self.group_of != group)) for group in range(self.num_groups)])
        return Evidence(float(np.sqrt((self.num_groups - 1) * left.var())))


def class_score(truth: np.ndarray, predicted: np.ndarray, images: np.ndarray | None) -> float:
    """Accuracy of images; or the mean IoU of tokens, where `images` say which image each one is of."""
    return float((truth == predicted).mean()) if images is None else mean_iou_of(truth, predicted)


def iou_counts(truth: np.ndarray, predicted: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Samples in the intersection and in the union of truth and prediction: `(images, classes, 2)`."""
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
    """Every image's part in the mean IoU of all, `(images, classes, 2)` to `(images,)`; their mean is the mean IoU.

    The jackknife's pseudo-values (Tukey 1958), so that images can be resampled as if they had scores of their own.
    """
    count, whole = len(counts), counts.sum(axis=0)
    parts = count * mean_iou(whole) - (count - 1) * mean_iou(whole - counts)
    return parts - parts.mean() + mean_iou(whole)


def iou_error(counts: np.ndarray, seed: int) -> float:
    """Standard error of the mean IoU of all images, by bootstrap over them: `(images, classes, 2)`."""
    num_images = len(counts)
    draws = np.random.default_rng(seed).multinomial(num_images, [1 / num_images] * num_images, size=RESAMPLES)
    return float(mean_iou(np.tensordot(draws, counts, axes=1)).std(ddof=1))
