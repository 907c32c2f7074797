"""Class labels: how they are read, which images have none, and one numbering for all splits of a data set."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

UNLABELED = -1
"""The class of an image that has no label, as in test splits on the Hub."""
IGNORE_INDEX = -100
"""The target that PyTorch's losses ignore by default; here it also means that an image has no label."""
ACCEPTED = "give one class per image: an integer, text, a boolean or a ClassLabel (-1, None or NaN: no label)"
FLOATS = ("floating", "mixed-integer-float")
SHOWN = 5
"""How many names a message lists; it only counts the rest."""


def read_labels(
    values: Any, names: Sequence[str] | None = None, what: str = "the labels"
) -> tuple[np.ndarray, list[str] | None]:
    """Convert a list, array, tensor or column of labels to class numbers.

    Integers are kept. Floats that are whole numbers are read as integers, because pandas stores integers with missing
    values as floats. Text, booleans and other floats are numbered in the order of their sorted names. `-1`, `-100`,
    `None`, NaN and empty text mean that an image has no label.

    Args:
        values: one label per image.
        names: names of all classes, in order. `values` then hold indices of names, or the names themselves.
        what: how errors refer to the labels.

    Returns:
        `(images,)` int64, `UNLABELED` for images without a label; and the class names, `None` for unnamed integers.

    Raises:
        ValueError: an image has several classes, a value is not a class, or a class has no name.
    """
    column = _column(values)
    labeled = ~(column.isna() | column.map(lambda value: isinstance(value, str) and not value)).to_numpy(bool)
    found = column[labeled]
    kind = pd.api.types.infer_dtype(found)
    labels = np.full(len(column), UNLABELED)
    if kind in FLOATS and (found.astype(float) % 1 == 0).all():
        kind = "integer"
    if kind == "integer":
        labels[labeled] = _integers(found, names, what)
    elif kind in ("string", "boolean", *FLOATS):
        if kind in FLOATS and found.nunique() > 2 * len(found) ** 0.5:
            raise ValueError(f"{what} are continuous numbers such as {found.iloc[0]:g}, not classes; {ACCEPTED}")
        if names is None:
            names = ["False", "True"] if kind == "boolean" else [_name(value) for value in sorted(found.unique())]
        labels[labeled] = _numbers([_name(value) for value in found], names, what, "their names")
    elif kind != "empty":
        raise ValueError(f"{what} hold {_described(found.iloc[0])}; {ACCEPTED}")
    return labels, None if names is None else list(names)


def is_labeled(value: Any) -> bool:
    """Whether a value is a label, and not one of the values that mean "no label"."""
    return value is not None and value == value and value not in (UNLABELED, IGNORE_INDEX, "")


def match_labels(
    labels: np.ndarray,
    own: Sequence[str] | None,
    names: Sequence[str],
    what: str = "the images",
    whose: str = "the given names",
) -> np.ndarray:
    """Renumber labels from their `own` names to `names`; images without a label keep `UNLABELED`.

    Args:
        own: class names that the labels index. If `None`, each integer is its own name; if `names` are not integers,
            it is an index into `names`.
        what, whose: how the error refers to the images and to `names`.

    Raises:
        ValueError: an image has a class that is not in `names`.
    """
    if own is None and not all(name.removeprefix("-").isdecimal() for name in names):
        own = [*names, *map(str, range(len(names), 1 + int(labels.max(initial=0))))]
    known = labels != UNLABELED
    present, index = np.unique(labels[known], return_inverse=True)
    found = [str(number) if own is None else own[number] for number in present]
    matched = np.full(len(labels), UNLABELED)
    matched[known] = np.array(_numbers(found, names, what, whose), dtype=np.int64)[index]
    return matched


def present_names(labels: np.ndarray | None, names: Sequence[str] | None) -> list[str]:
    """Names of the classes that images have, in order; the name of an unnamed integer is the integer itself."""
    if labels is None:
        return []
    return [str(number) if names is None else names[number] for number in np.unique(labels[labels != UNLABELED])]


def has_classes(labels: np.ndarray | Sequence[int] | None, num_classes: int = 2, num_images: int = 2) -> bool:
    """Whether `num_classes` classes have `num_images` images each (a leave-one-out probe needs 2 classes with 2)."""
    if labels is None:
        return False
    present = np.asarray(labels)
    counts = np.unique(present[present != UNLABELED], return_counts=True)[1]
    return int((counts >= num_images).sum()) >= num_classes


def listed(names: Sequence[Any], counts: Sequence[int] | None = None) -> str:
    """Quote names for a message: the first `SHOWN`, and how many more there are; with `counts`, the rarest first."""
    shown = [f"'{name}'" for name in names]
    if counts is not None:
        shown = [f"{shown[at]} {counts[at]:,}" for at in sorted(range(len(shown)), key=counts.__getitem__)]
    more = f" and {len(shown) - SHOWN:,} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def stratified_sample(labels: np.ndarray, num: int, seed: int, per_class: int = 1) -> np.ndarray:
    """Draw indices of `num` random images in random order; each class keeps its share of the images.

    Args:
        labels: `(images,)`, class of each image.
        per_class: images of each class (or all, if it has fewer) that are drawn before the shares are. If there is no
            room for all classes, random classes are left out.
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


def _column(values: Any) -> pd.Series:
    """Labels as a column; if images have several classes each, its rows are lists."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray) and values.ndim == 1:
        return pd.Series(values)
    return pd.Series([*values], dtype=object)


def _name(value: Any) -> str:
    """A label as text; a whole number has the same name as an integer and as a float."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _integers(found: pd.Series, names: Sequence[str] | None, what: str) -> np.ndarray:
    lowest, highest = int(found.min()), int(found.max())
    if highest > np.iinfo(np.int64).max:
        raise ValueError(f"{what} hold {highest}, which does not fit in 64 bits; {ACCEPTED}")
    numbers = found.to_numpy().astype(np.int64)
    numbers[numbers == IGNORE_INDEX] = UNLABELED
    if names is not None and not UNLABELED <= numbers.min() <= numbers.max() < len(names):
        number = highest if highest >= len(names) else lowest
        raise ValueError(f"{what} hold the class {number}, but only {len(names)} classes have names: {listed(names)}")
    return numbers


def _numbers(found: Sequence[str], names: Sequence[str], what: str, whose: str) -> list[int]:
    """The index in `names` of every name that was found."""
    numbers = {name: number for number, name in reversed([*enumerate(names)])}  # the first of equal names wins
    if unknown := sorted({name for name in found if name not in numbers}):
        raise ValueError(
            f"{what} have {described_classes(unknown)}, which {whose} lack (known: {listed(names)}): "
            "remove these images, or add the missing classes"
        )
    return [numbers[name] for name in found]


def described_classes(names: Sequence[str]) -> str:
    """Class names for use in a sentence, preceded by "the class" or "the classes"."""
    return f"the class{'es' if len(names) > 1 else ''} {listed(names)}"


def _described(value: Any) -> str:
    """Describe labels that are not classes, with an example."""
    shown = textwrap.shorten(str(value), 60)
    if isinstance(value, Mapping):
        return f"structs such as {shown}"
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, bytes | str):
        return f"lists such as {shown} (several classes per image, or one-hot vectors: take their argmax)"
    return f"{type(value).__name__} such as {shown}, or values of several kinds"
