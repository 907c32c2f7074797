"""Segmentation masks: from image files to classes, to the model's resolution, and to one class per token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from aselect_hf.modeling.image_processing_aselect_dit import IGNORED


@dataclass(frozen=True)
class MaskClasses:
    """The pixel values in masks that stand for classes.

    Args:
        names: class names, in order.
        values: pixel value of every class; -1 for a class that these masks cannot hold.
        reduce_labels: whether pixels of value 0 are ignored.

    Raises:
        ValueError: there are more than 255 classes; 255 marks ignored pixels.
    """

    names: list[str]
    values: list[int]
    reduce_labels: bool = False

    def __post_init__(self) -> None:
        if len(self.names) > IGNORED:
            raise ValueError(
                f"the masks hold {len(self.names):,} classes, but at most {IGNORED} are supported (are they instances?)"
            )

    @classmethod
    def named(cls, names: Sequence[str] | Mapping[int, str], reduce_labels: bool = False) -> MaskClasses:
        """From names for the values 0, 1, 2, ... (with `reduce_labels` 1, 2, 3, ...), or from names by value."""
        if not isinstance(names, Mapping):
            names = dict(enumerate(names, start=int(reduce_labels)))
        named = {int(value): str(name) for value, name in names.items() if not (reduce_labels and int(value) == 0)}
        return cls([named[value] for value in sorted(named)], sorted(named), reduce_labels)

    @classmethod
    def found(cls, values: Iterable[int], reduce_labels: bool = False) -> MaskClasses:
        """From the pixel values in masks. Classes 0, 1, 2, ... are named by number, other sets by pixel value."""
        kept = sorted({*values} - ignored_values(reduce_labels))
        if kept == [*range(reduce_labels, reduce_labels + len(kept))]:
            return cls.named([str(number) for number in range(len(kept))], reduce_labels)
        return cls([str(value) for value in kept], kept, reduce_labels)

    def of(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """Convert pixel values to classes, int64 of the same shape; ignored values become `IGNORED`.

        Args:
            name: how errors refer to the mask.

        Raises:
            ValueError: a value is neither a class nor ignored.
        """
        order = np.argsort(self.values)
        values = np.asarray(self.values)[order]
        at = np.searchsorted(values, pixels).clip(max=len(values) - 1)
        known = values[at] == pixels
        if unknown := self.unknown(np.unique(pixels[~known]).tolist()):
            raise ValueError(f"{name} holds the class {unknown[-1]}, but only {len(self.names)} classes have names")
        return np.where(known, order[at], IGNORED)

    def unknown(self, values: Iterable[int]) -> list[int]:
        """The given pixel values that are neither classes nor ignored."""
        return sorted({*values} - {*self.values} - ignored_values(self.reduce_labels))

    def ordered_as(self, names: Sequence[str]) -> MaskClasses:
        """The same values, with classes in the order of `names`."""
        if self.names == [*names]:  # names may repeat, which the dictionary below would lose
            return self
        values = dict(zip(self.names, self.values, strict=True))
        return MaskClasses([*names], [values.get(name, -1) for name in names], self.reduce_labels)


def ignored_values(reduce_labels: bool) -> set[int]:
    """Pixel values that are ignored unless they have a name."""
    return {IGNORED, 0} if reduce_labels else {IGNORED}


def mask_pixels(mask: Any, name: str) -> np.ndarray:
    """Read the pixel values of a mask, `(height, width)` int64.

    Args:
        mask: PIL image of one channel, or an integer array. The pixels of a palette image are its indices.
        name: how errors refer to the mask.

    Raises:
        ValueError: the mask has colors instead of classes, or negative values.
    """
    if isinstance(mask, Image.Image) and not (mask.mode in ("1", "L", "P", "I") or mask.mode.startswith("I;16")):
        raise ValueError(
            f"{name} has mode {mask.mode}: a mask must have one channel of integers, which are classes "
            "(for example a PNG of mode L, P, I or I;16)"
        )
    pixels = np.asarray(mask)
    if pixels.ndim != 2 or pixels.dtype.kind not in "biu":
        raise ValueError(f"{name} must be integers (height, width), got {pixels.dtype} {pixels.shape}")
    pixels = pixels.astype(np.int64)
    if pixels.min() < 0:
        raise ValueError(f"{name} holds the negative class {pixels.min()}; mark ignored pixels with {IGNORED}")
    return pixels


def resize_mask(mask: np.ndarray, size: int | tuple[int, int]) -> torch.Tensor:
    """Resize a mask to `size` (side of a square, or `(height, width)`), int64, by nearest neighbor at pixel centers."""
    resized = interpolate(torch.from_numpy(mask)[None, None].double(), size=size, mode="nearest-exact")
    return resized[0, 0].long()


def token_labels(mask: np.ndarray, grid_size: tuple[int, int]) -> np.ndarray:
    """The most common class of every patch, `(height * width,)` of the patch grid, row-major, int64.

    Ignored pixels do not count; a patch with no other pixels is `IGNORED`. If classes tie, the smallest wins.

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
