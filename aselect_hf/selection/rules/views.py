"""Several views of every image, each with its own noise: ICR, LiDAR, retrieval, signal to noise.

`scoring.select_without_labels` lists the errors.
"""

from __future__ import annotations

import numpy as np

from aselect_hf.selection import criteria
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.judges import by_outcomes
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.selection.rule import RULES, Criterion, rule
from aselect_hf.selection.scoring import select_without_labels


def invariance(views: np.ndarray) -> float:
    """One minus ICR, so that higher is better."""
    return 1 - criteria.icr(views)


@rule(
    "icr",
    labels="none",
    explanation="Takes the timestep whose features change least with crops and noise of one image, against "
    "those between images (ICR).",
    num_images=256,
    runs=2,
    criterion=Criterion(invariance, "augmented views", "1 - ICR"),
)
def select_icr(inputs: SelectionInputs, *, num_views: int = 2, pool_size: int = 1) -> TimestepSelection:
    """Score each candidate by `criteria.icr` on random crops and flips.

    Args:
        num_views: Views of every image, at least 2, the same at every timestep (default: 2).
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
    """
    return select_without_labels(inputs, "icr", num_views=num_views, pool_size=pool_size)


@rule(
    "lidar",
    labels="none",
    explanation="Takes the timestep whose features have the highest effective rank between images, "
    "measured against that between crops of one image (LiDAR).",
    num_images=256,
    runs=4,
    criterion=Criterion(criteria.lidar, "augmented views", "LiDAR (effective rank)"),
)
def select_lidar(inputs: SelectionInputs, *, num_views: int = 4, pool_size: int = 1) -> TimestepSelection:
    """Score each candidate by `criteria.lidar` on random crops and flips.

    Args:
        num_views: Views of every image, at least 2, the same at every timestep (default: 4).
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
    """
    return select_without_labels(inputs, "lidar", num_views=num_views, pool_size=pool_size)


@rule(
    "retrieval",
    labels="none",
    explanation="Takes the timestep at which an image is most often found again among other crops of all images.",
    num_images=256,
    runs=2,
    criterion=Criterion(criteria.view_retrieval, "augmented views", "images found among other views"),
)
def select_retrieval(inputs: SelectionInputs, *, num_views: int = 2, pool_size: int = 1) -> TimestepSelection:
    """Score each candidate by `criteria.retrieved` on random crops and flips.

    Args:
        num_views: Views of every image, at least 2, the same at every timestep (default: 2).
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
    """
    judge = by_outcomes(RULES["retrieval"], criteria.retrieved)
    views = {"num_views": num_views, "pool_size": pool_size}
    return select_without_labels(inputs, "retrieval", **views, judge=judge)


@rule(
    "snr",
    labels="none",
    explanation="Takes the timestep whose features vary most between images, rather than with the noise of one image.",
    num_images=256,
    runs=2,
    criterion=Criterion(criteria.signal_to_noise, "noise views", "share of variance between images"),
)
def select_snr(inputs: SelectionInputs, *, num_views: int = 2, pool_size: int = 1) -> TimestepSelection:
    """Score each candidate by `criteria.signal_to_noise` on the same images under different noise.

    Args:
        num_views: Views of every image, at least 2, the same at every timestep (default: 2).
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
    """
    return select_without_labels(inputs, "snr", num_views=num_views, pool_size=pool_size)
