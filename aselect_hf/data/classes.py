"""Classes: what a label is, which images have none, and one numbering for all splits of a data set."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from transformers.utils import logging

from aselect_hf.data.masks import MaskClasses
from aselect_hf.modeling.image_processing_aselect_dit import IGNORED

if TYPE_CHECKING:
    from aselect_hf.data.image_data import ImageData

logger = logging.get_logger(__name__)

UNLABELLED = -1
"""The class of an image that has no label, as in test splits on the Hub."""
IGNORE_INDEX = -100
"""What PyTorch's losses leave out by default: no label either."""
ACCEPTED = "accepted is one class per image: an integer, text, a boolean or a ClassLabel; -1, None, NaN: no label"
FLOATS = ("floating", "mixed-integer-float")
BINARY_MASKS = (
    'divide the masks by 255, or name both values, as {"0": "background", "255": "foreground"} in an id2label.json '
    "beside the images, as mask_names, or in training as --classes 0=background 255=foreground"
)
SHOWN = 5
"""Names that a message lists before it only counts."""


def read_labels(
    values: Any, names: Sequence[str] | None = None, what: str = "the labels"
) -> tuple[np.ndarray, list[str] | None]:
    """Classes of images, from any list, array, tensor or column of labels.

    Integers stay as they are, and so do floats that are whole numbers: pandas turns integers beside missing values into
    those. Text, booleans and other floats are numbered by their sorted names. `-1`, `-100`, `None`, NaN and empty text
    mean that an image has no label.

    Args:
        values: one label per image.
        names: of all classes, in order; `values` are then numbers of names, or names themselves.
        what: what to call the labels in errors.

    Returns:
        `(images,)` int64, `UNLABELLED` where there is no label; and the names of the classes, `None` for integers.

    Raises:
        ValueError: several classes an image, continuous numbers, or another kind of value; a class without a name.
    """
    column = _column(values)
    labelled = ~(column.isna() | column.map(lambda value: isinstance(value, str) and not value)).to_numpy(bool)
    found = column[labelled]
    kind = pd.api.types.infer_dtype(found)
    labels = np.full(len(column), UNLABELLED)
    if kind in FLOATS and (found.astype(float) % 1 == 0).all():
        kind = "integer"
    if kind == "integer":
        labels[labelled] = _integers(found, names, what)
    elif kind in ("string", "boolean", *FLOATS):
        if kind in FLOATS and found.nunique() > 2 * len(found) ** 0.5:
            raise ValueError(f"{what} are continuous, such as {found.iloc[0]:g} (a regression target); {ACCEPTED}")
        if names is None:
            names = ["False", "True"] if kind == "boolean" else [_name(value) for value in sorted(found.unique())]
        labels[labelled] = _numbers([_name(value) for value in found], names, what, "their names")
    elif kind != "empty":
        raise ValueError(f"{what} hold {_described(found.iloc[0])}; {ACCEPTED}")
    return labels, None if names is None else list(names)


def is_labelled(value: Any) -> bool:
    """Whether one label is none of those that mean that there is none."""
    return value is not None and value == value and value not in (UNLABELLED, IGNORE_INDEX, "")


def match_labels(
    labels: np.ndarray,
    own: Sequence[str] | None,
    names: Sequence[str],
    what: str = "the images",
    whose: str = "the given names",
) -> np.ndarray:
    """Labels numbered by `own` names, numbered by `names` instead; images without a label keep `UNLABELLED`.

    Args:
        own: names of the labels; `None`: each integer is its own name, or where `names` are no integers, the number of
            one of them.
        what, whose: what to call images and `names` in the error.

    Raises:
        ValueError: images have a class that is not in `names`.
    """
    if own is None and not all(name.removeprefix("-").isdecimal() for name in names):
        own = [*names, *map(str, range(len(names), 1 + int(labels.max(initial=0))))]
    known = labels != UNLABELLED
    present, index = np.unique(labels[known], return_inverse=True)
    found = [str(number) if own is None else own[number] for number in present]
    matched = np.full(len(labels), UNLABELLED)
    matched[known] = np.array(_numbers(found, names, what, whose), dtype=np.int64)[index]
    return matched


def present_names(labels: np.ndarray | None, names: Sequence[str] | None) -> list[str]:
    """Names of the classes that images have, in order; integers without names are their own."""
    if labels is None:
        return []
    return [str(number) if names is None else names[number] for number in np.unique(labels[labels != UNLABELLED])]


def has_classes(labels: np.ndarray | Sequence[int] | None, num_classes: int = 2, num_images: int = 2) -> bool:
    """Whether so many classes have so many images each: 2 with 2 is what a leave-one-out probe needs."""
    if labels is None:
        return False
    present = np.asarray(labels)
    counts = np.unique(present[present != UNLABELLED], return_counts=True)[1]
    return int((counts >= num_images).sum()) >= num_classes


def listed(names: Sequence[Any], counts: Sequence[int] | None = None) -> str:
    """Names for a message, in quotes; of many, the first few and how many more; with `counts`, the rarest first."""
    shown = [f"'{name}'" for name in names]
    if counts is not None:
        shown = [f"{shown[at]} {counts[at]:,}" for at in sorted(range(len(shown)), key=counts.__getitem__)]
    more = f" and {len(shown) - SHOWN:,} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def stratified_sample(labels: np.ndarray, num: int, seed: int, per_class: int = 1) -> np.ndarray:
    """Indices of `num` random images in random order, of every class its share.

    Args:
        labels: `(images,)`, the class of each.
        per_class: so many images of every class (or all that it has) come before the shares; where there is no room for
            all classes, random ones are left out.
    """
    generator = np.random.default_rng(seed)
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = generator.permutation(len(labels))
    order = order[np.argsort(classes[order], kind="stable")]  # by class, in random order within it
    ranks = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of an image within its class
    turns = np.repeat(generator.permutation(len(sizes)), sizes)  # of a class among all
    reserved = ranks < per_class
    shares = np.where(reserved, 0, (ranks + 0.5) / np.repeat(sizes, sizes))
    return generator.permutation(order[np.lexsort((turns, shares, ~reserved))[:num]])


def share_classes(
    splits: Mapping[str, ImageData], names: Sequence[str] | None = None, *, whole: bool = True
) -> dict[str, ImageData]:
    """All splits with the classes of the first one, matched by name, without the images that have no label.

    The names of integers are those integers: ids 0, 1000, 2000 become the classes 0, 1, 2 with the names "0", "1000",
    "2000". Images that are left out and classes without images are reported.

    Args:
        splits: by what to call them in messages, the training images first.
        names: of all classes, in order; default: those of the first split.
        whole: whether the first split is all there is to train on; the beginning of a stream is not.

    Raises:
        ValueError: a split has no labels, or images of a class that the first one does not have; the message names it.
    """
    first = next(iter(splits))
    labelled = {split: data.labelled() for split, data in splits.items()}
    whose = "the given names" if names else f"the {first} images"
    names = list(names or labelled[first].class_names)
    shared = {
        split: data.with_classes(names, f"the {split} images ({data.name})", whose) for split, data in labelled.items()
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
    """All splits with the classes in the masks of the first one, or those that have names; matched by name.

    Every mask is read once. Pixel values other than 0, 1, 2, ... become the classes 0, 1, 2, ... with their value as
    name. Classes without pixels are reported.

    Args:
        splits: by what to call them in messages, the training images first.
        cache_dir: see `ImageData.mask_pixel_values`.
        whole: see `share_classes`.

    Raises:
        ValueError: masks hold nothing but 0 and 255 ("ignored"), or a class that the first split does not have.
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
            raise ValueError(f"{masks} hold nothing but 0 and {IGNORED}, and {IGNORED} means 'ignored': {BINARY_MASKS}")
        if not own.names:
            raise ValueError(f"all pixels of {data.name} are ignored")
        names = dict(zip(own.values, own.names, strict=True))
        unknown = [str(value) for value in own.unknown(values[split])]
        unknown += [name for value, name in names.items() if value in values[split] and name not in classes.names]
        if unknown:
            whose = f"the {first} masks have" if split != first else "the classes with names are"
            raise ValueError(f"{masks} hold {_classes(unknown)}, but {whose} {listed(classes.names)}")
        absent = [name for value, name in names.items() if value not in values[split]]
        if absent and (whole or split != first):
            logger.warning_once(f"no pixel of {masks} has {_classes(absent)}")
        shared[split] = data.with_mask_classes(own.ordered_as(classes.names))
    return shared


def _report_absent(splits: Mapping[str, ImageData], names: Sequence[str]) -> None:
    """Name the classes that training images lack, and those that others lack although training images have them."""
    first, *others = splits
    present = {split: set(present_names(data.labels, names)) for split, data in splits.items()}
    for split in splits:
        expected = names if split == first else [name for name in names if name in present[first]]
        if absent := [name for name in expected if name not in present[split]]:
            logger.warning_once(f"no {split} image ({splits[split].name}) has {_classes(absent)}")
    for split in others:
        if unlearned := [name for name in names if name in present[split] and name not in present[first]]:
            logger.warning_once(
                f"{split} images have {_classes(unlearned)}, which no {first} image has: predictions for them are "
                "always wrong"
            )


def _column(values: Any) -> pd.Series:
    """Labels as a column; what several classes an image are given as is a list in each row."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray) and values.ndim == 1:
        return pd.Series(values)
    return pd.Series([*values], dtype=object)


def _name(value: Any) -> str:
    """A label as text; a whole number the same whether its split has fractions beside it or not."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _integers(found: pd.Series, names: Sequence[str] | None, what: str) -> np.ndarray:
    lowest, highest = int(found.min()), int(found.max())
    if highest > np.iinfo(np.int64).max:
        raise ValueError(f"{what} hold {highest}, which has more than 64 bits; {ACCEPTED}")
    numbers = found.to_numpy().astype(np.int64)
    numbers[numbers == IGNORE_INDEX] = UNLABELLED
    if names is not None and not UNLABELLED <= numbers.min() <= numbers.max() < len(names):
        number = highest if highest >= len(names) else lowest
        raise ValueError(f"{what} hold the class {number}, but only {len(names)} classes have names: {listed(names)}")
    return numbers


def _numbers(found: Sequence[str], names: Sequence[str], what: str, whose: str) -> list[int]:
    """The number of every name that was found."""
    numbers = {name: number for number, name in reversed([*enumerate(names)])}  # of equal names, the first
    if unknown := sorted({name for name in found if name not in numbers}):
        raise ValueError(
            f"{what} have {_classes(unknown)}, which {whose} lack (they are {listed(names)}): leave these out, or add "
            "them there"
        )
    return [numbers[name] for name in found]


def _classes(names: Sequence[str]) -> str:
    return f"the class{'es' if len(names) > 1 else ''} {listed(names)}"


def _described(value: Any) -> str:
    """A label that is no class, with an example."""
    shown = textwrap.shorten(str(value), 60)
    if isinstance(value, Mapping):
        return f"structs such as {shown}"
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, bytes | str):
        return f"lists such as {shown} (several classes an image, or one-hot vectors: take their argmax)"
    return f"{type(value).__name__} such as {shown}, or values of several kinds"
