"""Choosing among scores so that every machine chooses the same.

Features differ in the last bits between processors, batch sizes and numbers of threads. Scores that differ only by
rounding therefore count as equal. All code that picks a maximum of such scores does it here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDING = 1e-5
"""Relative change of features and scores that counts as rounding (ours)."""

Scores = np.ndarray | Sequence[float]


def near_best(scores: Scores, scale: float | None = None) -> np.ndarray:
    """Which scores equal the highest, along the last axis; the shape of `scores`.

    Args:
        scale: what the tolerance of 1e-5 is relative to (default: the largest absolute score).
    """
    values = np.asarray(scores, dtype=float)
    size = np.abs(values).max(axis=-1, keepdims=True) if scale is None else scale
    return values >= values.max(axis=-1, keepdims=True) - ROUNDING * size


def best_of(scores: Scores, scale: float | None = None) -> int:
    """Index of the highest score; among equals (see `near_best`), the first.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"scores hold NaN or infinite values: {np.asarray(scores).tolist()}")
    return int(near_best(scores, scale).argmax())


def ranking(scores: Scores) -> list[int]:
    """Indices from the best to the worst score; equal scores (see `near_best`) keep their order."""
    values, left, order = np.asarray(scores, dtype=float), np.arange(len(scores)), []
    scale = float(np.abs(values).max(initial=0.0))
    while len(left):
        equal = near_best(values[left], scale)
        order += left[equal].tolist()
        left = left[~equal]
    return order
