"""Classes: what a label is, which images have none, and one numbering for all splits of a data set."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

UNLABELLED = -1
"""The class of an image that has no label, as in test splits on the Hub."""
IGNORE_INDEX = -100
"""What PyTorch's losses leave out by default: no label either."""
ACCEPTED = "accepted is one class per image: an integer, text, a boolean or a ClassLabel; -1, None, NaN: no label"
FLOATS = ("floating", "mixed-integer-float")
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
            f"{what} have {described_classes(unknown)}, which {whose} lack (they are {listed(names)}): "
            "leave these out, or add them there"
        )
    return [numbers[name] for name in found]


def described_classes(names: Sequence[str]) -> str:
    """Names of classes in a sentence, after "the class" or "the classes"."""
    return f"the class{'es' if len(names) > 1 else ''} {listed(names)}"


def _described(value: Any) -> str:
    """A label that is no class, with an example."""
    shown = textwrap.shorten(str(value), 60)
    if isinstance(value, Mapping):
        return f"structs such as {shown}"
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, bytes | str):
        return f"lists such as {shown} (several classes an image, or one-hot vectors: take their argmax)"
    return f"{type(value).__name__} such as {shown}, or values of several kinds"
