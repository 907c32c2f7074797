"""Splits of a data set: one numbering of classes for all of them, and holding out a part for validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers.utils import logging

from aselect_hf.data.classes import described_classes, listed, present_names, stratified_sample
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.masks import IGNORED, MaskClasses

logger = logging.get_logger(__name__)

BINARY_MASKS = (
    'divide the masks by 255, or name both values: {"0": "background", "255": "foreground"} in an id2label.json '
    "beside the images or as mask_names, or --classes 0=background 255=foreground in training"
)


def share_classes(
    splits: Mapping[str, ImageData], names: Sequence[str] | None = None, *, whole: bool = True
) -> dict[str, ImageData]:
    """Number the classes of all splits as in the first one, matched by name, and drop images without a label.

    The name of an unnamed integer is the integer itself: ids 0, 1000, 2000 become classes 0, 1, 2 with the names "0",
    "1000", "2000". Warnings report images that are dropped and classes without images.

    Args:
        splits: splits by the names that messages use, the training images first.
        names: class names, in order (default: those of the first split).
        whole: whether the first split holds all training images. The beginning of a stream does not.

    Raises:
        ValueError: a split has no labels, or has a class that the first split does not have; the message names it.
    """
    first = next(iter(splits))
    labeled = {split: data.labeled() for split, data in splits.items()}
    whose = "the given names" if names else f"the {first} images"
    names = list(names or labeled[first].class_names)
    shared = {
        split: data.with_classes(names, f"the {split} images ({data.name})", whose) for split, data in labeled.items()
    }
    if whole and len(splits) > 1:
        _report_absent(shared, names)
    return shared


def share_mask_classes(
    splits: Mapping[str, ImageData],
    progress: bool = True,
    cache_dir: str | Path | None = None,
    *,
    whole: bool = True,
) -> dict[str, ImageData]:
    """Number the mask classes of all splits as in the first one, matched by name.

    The classes are those with names or, without names, the pixel values in the first split's masks. Every mask is read
    once. Values other than 0, 1, 2, ... become classes 0, 1, 2, ... named by value. Warnings report absent classes.

    Args:
        splits: splits by the names that messages use, the training images first.
        cache_dir: see `ImageData.mask_pixel_values`.
        whole: see `share_classes`.

    Raises:
        ValueError: masks hold only 0 and 255 (ignored), or a class that the first split does not have.
    """
    first = next(iter(splits))
    values = {split: data.mask_pixel_values(progress, cache_dir) for split, data in splits.items()}
    declared = splits[first].mask_classes
    classes = declared or MaskClasses.found(values[first], splits[first].reduce_labels)
    shared = {}
    for split, data in splits.items():
        masks = f"the {split} masks ({data.name})"
        own = classes if declared is None else data.mask_classes or classes
        if {*values[split]} == {0, IGNORED} and IGNORED not in own.values:
            raise ValueError(f"{masks} hold only 0 and {IGNORED}, and {IGNORED} marks ignored pixels: {BINARY_MASKS}")
        if not own.names:
            raise ValueError(f"all pixels of {data.name} are ignored")
        names = dict(zip(own.values, own.names, strict=True))
        unknown = [str(value) for value in own.unknown(values[split])]
        unknown += [name for value, name in names.items() if value in values[split] and name not in classes.names]
        if unknown:
            whose = f"the {first} masks have" if split != first else "the named classes are"
            raise ValueError(f"{masks} hold {described_classes(unknown)}, but {whose} {listed(classes.names)}")
        absent = [name for value, name in names.items() if value not in values[split]]
        if absent and (whole or split != first):
            logger.warning_once(f"no pixel of {masks} has {described_classes(absent)}")
        shared[split] = data.with_mask_classes(own.ordered_as(classes.names))
    return shared


def _report_absent(splits: Mapping[str, ImageData], names: Sequence[str]) -> None:
    """Warn of classes without training images, of trained classes that another split lacks, and of untrained ones."""
    first, *others = splits
    present = {split: set(present_names(data.labels, names)) for split, data in splits.items()}
    for split in splits:
        expected = names if split == first else [name for name in names if name in present[first]]
        if absent := [name for name in expected if name not in present[split]]:
            logger.warning_once(f"no {split} image ({splits[split].name}) has {described_classes(absent)}")
    for split in others:
        if unlearned := [name for name in names if name in present[split] and name not in present[first]]:
            logger.warning_once(
                f"{split} images have {described_classes(unlearned)}, which no {first} image has: "
                "the predictions for these images are always wrong"
            )


def split_train_validation(data: ImageData, share: float, seed: int) -> tuple[ImageData, ImageData]:
    """Hold out a random `share` of the images; if there are labels, every class keeps its share.

    One image of every class stays in the training part. A warning names classes of which no image is held out.

    Raises:
        ValueError: `share` is not between 0 and 1, or there are too few images to split.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    labels = np.zeros(len(data)) if data.labels is None else data.labels
    kept = stratified_sample(labels, len(np.unique(labels)), seed)
    rest = np.setdiff1d(np.arange(len(data)), kept)
    num_held_out = math.ceil(len(data) * share)
    if len(rest) < max(num_held_out, 1):
        raise ValueError(
            f"cannot hold out {share} of the {len(data)} images of {data.name}: one image of every class must stay for "
            f"training, which leaves {len(rest)}"
        )
    held_out = rest[stratified_sample(labels[rest], num_held_out, seed)]
    train, validation = (data.subset(sorted(part)) for part in (set(range(len(data))) - {*held_out}, held_out))
    if data.labels is not None:
        without = [name for name in present_names(train.labels, data.label_names)
                   if name not in present_names(validation.labels, data.label_names)]  # fmt: skip
        if without:
            logger.warning_once(
                f"{data.name}: too few images of {listed(without)} to hold any out; all of them are used for training"
            )
    return train, validation
