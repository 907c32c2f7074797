"""RankMe, alpha-ReQ and LogME from means and products of features, whose size does not depend on the number of rows.

Means and centered products are in float64 and are merged pairwise (Chan, Golub & LeVeque 1979), so that large means do
not cancel digits. Scores equal those of `criteria` on the rows themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from aselect_hf.selection.criteria import RESOLUTION, effective_rank, evidences, power_law, roots


@dataclass
class Moments:
    """What is known of rows `(rows, width)` of features with targets.

    Args:
        count: number of rows.
        mean: `(width,)`.
        products: `(width, width)`, centered: the sum of outer products of the rows less their mean.
        class_counts: `(classes,)`; no classes without labels.
        class_sums: `(classes, width)`, sums of the rows of each class.
    """

    count: int
    mean: np.ndarray
    products: np.ndarray
    class_counts: np.ndarray
    class_sums: np.ndarray

    @classmethod
    def empty(cls, width: int, num_classes: int = 0) -> Moments:
        sums = np.zeros((num_classes, width))
        return cls(0, np.zeros(width), np.zeros((width, width)), np.zeros(num_classes, dtype=np.int64), sums)

    @classmethod
    def of(cls, rows: torch.Tensor, targets: np.ndarray | None = None, num_classes: int = 0) -> Moments:
        """Of rows on any device; `targets` `(rows,)` are in `0..num_classes - 1`."""
        values = rows.double() if rows.device.type != "mps" else rows.cpu().double()
        mean = values.mean(dim=0)
        centered = values - mean
        one_hot = np.eye(num_classes)[[] if targets is None else targets]  # (rows, classes)
        weights = torch.from_numpy(one_hot).to(values.device)
        sums = weights.T @ values if num_classes else values[:0]
        arrays = [x.cpu().numpy() for x in (mean, centered.T @ centered, sums)]
        return cls(len(rows), arrays[0], arrays[1], one_hot.sum(axis=0).astype(np.int64), arrays[2])

    @staticmethod
    def bytes(width: int, num_classes: int = 0) -> int:
        """Size in memory."""
        return 8 * (width**2 + width * (1 + num_classes))

    def __add__(self, other: Moments) -> Moments:
        if not self.count or not other.count:
            return self if self.count else other
        count, difference = self.count + other.count, other.mean - self.mean
        products = np.outer(difference, difference)
        products *= self.count * other.count / count
        products += self.products
        products += other.products
        return Moments(
            count,
            self.mean + difference * (other.count / count),
            products,
            self.class_counts + other.class_counts,
            self.class_sums + other.class_sums,
        )

    def correlations(self) -> tuple[np.ndarray, np.ndarray]:
        """`X^T X` of the standardized features, and the factor of each channel: 0 for a constant one."""
        deviation = np.sqrt(np.diag(self.products) / self.count)
        varies = deviation > RESOLUTION * np.abs(self.mean)
        factors = np.where(varies, 1 / np.where(varies, deviation, 1.0), 0.0)
        return self.products * factors * factors[:, None], factors

    def principal(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Right singular vectors `(width, rank)` and singular values of the standardized features, and the factors."""
        gram, factors = self.correlations()
        return *roots(gram, max(self.count, len(gram))), factors

    def projected(self, basis: np.ndarray, factors: np.ndarray) -> np.ndarray:
        """Centered indicators of the classes in a basis `(width, rank)` of standardized rows: `(rank, classes)`."""
        sums = (self.class_sums - self.class_counts[:, None] * self.mean) * factors
        return (sums @ basis).T


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all rows together."""
    return reduce(Moments.__add__, parts)


def rankme(moments: Moments) -> float:
    """See `criteria.rankme`."""
    return effective_rank(moments.principal()[1])


def alpha_req(moments: Moments) -> float:
    """See `criteria.alpha_req`."""
    return power_law(moments.principal()[1] ** 2)


def logme(moments: Moments) -> float:
    """See `criteria.logme`; there must be more rows than channels. Classes without rows do not count.

    Raises:
        ValueError: rows of fewer than 2 classes.
    """
    present = moments.class_counts > 0
    if present.sum() < 2:
        raise ValueError("labels must be of at least 2 classes")
    vectors, scales, factors = moments.principal()
    counts = moments.class_counts[present].astype(float)
    projected = moments.projected(vectors / scales, factors)[:, present]
    squares = counts - counts**2 / moments.count
    return float(evidences(projected, squares, scales, moments.count).mean())
