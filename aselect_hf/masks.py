"""Segmentation masks: from image files to classes, to the model's resolution, to one class a token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

IGNORED = 255
"""The class of pixels (and tokens) that neither training nor scores look at."""


def read_mask(mask: Any, reduce_labels: bool, name: str) -> np.ndarray:
    """Classes of the pixels, `(height, width)` int64, `IGNORED` where there is none.

    Args:
        mask: PIL image of one channel (the indices of a palette image, else the values), or an integer array.
        reduce_labels: shift classes by -1, so that class 0 is ignored, as Segformer's `do_reduce_labels`.
        name: of the mask, for errors.

    Raises:
        ValueError: colours instead of classes, or negative values.
    """
    if isinstance(mask, Image.Image) and not (mask.mode in ("1", "L", "P", "I") or mask.mode.startswith("I;16")):
        raise ValueError(
            f"{name} has mode {mask.mode}: a mask must have one channel whose integers are classes "
            "(a PNG of mode L, P, I or I;16)"
        )
    classes = np.asarray(mask)
    if classes.ndim != 2 or classes.dtype.kind not in "biu":
        raise ValueError(f"{name} must be integers (height, width), got {classes.dtype} {classes.shape}")
    classes = classes.astype(np.int64)
    if classes.min() < 0:
        raise ValueError(f"{name} holds the negative class {classes.min()}; ignored pixels are {IGNORED}")
    if reduce_labels:
        classes = np.where((classes == 0) | (classes == IGNORED), IGNORED, classes - 1)
    return classes


def resize_mask(mask: np.ndarray, size: int | tuple[int, int]) -> torch.Tensor:
    """The mask at `size` (side of a square, or `(height, width)`), int64: the class at the centre of every pixel."""
    resized = interpolate(torch.from_numpy(mask)[None, None].double(), size=size, mode="nearest-exact")
    return resized[0, 0].long()


def token_labels(mask: np.ndarray, grid_size: tuple[int, int]) -> np.ndarray:
    """The commonest class of every patch, `(height * width,)` of the patch grid, row-major, int64.

    Ignored pixels are left out; a patch of nothing else is `IGNORED`. Of equally common classes the smallest is taken.

    Args:
        mask: `(height, width)`, multiples of `grid_size`.
    """
    height, width = grid_size
    cells = mask.reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
    patches = cells.swapaxes(1, 2).reshape(height * width, -1)
    counted = patches != IGNORED
    num_classes = 1 + patches.max(where=counted, initial=0)
    slots = np.arange(len(patches))[:, None] * num_classes + patches
    counts = np.bincount(slots[counted], minlength=len(patches) * num_classes).reshape(-1, num_classes)
    return np.where(counted.any(axis=1), counts.argmax(axis=1), IGNORED)
