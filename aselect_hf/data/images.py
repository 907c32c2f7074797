"""Decoding of single images - files, bytes, arrays, rows of data sets - to 8-bit pixels, with errors that name them."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.modeling.image_processing_aselect_dit import make_image_processor
from aselect_hf.modeling.pixels import eight_bit_image

logger = logging.get_logger(__name__)

ONE_PICTURE = ("MPO", "PSD")  # formats whose other frames are previews or layers of the first
TOLERANCE = 0.01  # by which values of pixel tensors may leave [-1, 1]


def read_image(item: Any, name: str) -> Image.Image | torch.Tensor:
    """Read an item as an 8-bit image of mode L or RGB (see `eight_bit_image`); tensors become float pixels.

    Args:
        item: PIL image, array, path, the bytes of a file, a tensor (uint8 is scaled to [-1, 1]), or a row with one.
        name: how errors refer to the item if it has no path.

    Raises:
        ValueError: the item cannot be decoded, holds NaN, or has values of an unknown range; the message names it.
    """
    image, name = open_image(item, name)
    return _pixel_tensor(image, name) if isinstance(image, torch.Tensor) else eight_bit_image(image, name)


def open_image(item: Any, name: str) -> tuple[Any, str]:
    """Return an item and its name (its path, else `name`); files are decoded and turned upright, in their own mode.

    Raises:
        ValueError: the item is not an image, or its decoder failed.
    """
    if isinstance(item, dict) and len(item) == 1:
        item = next(iter(item.values()))
    if isinstance(item, torch.Tensor | np.ndarray):
        return item, name
    if isinstance(item, list | tuple):
        return np.asarray(item), name
    if isinstance(item, dict):
        path, content = item.get("path"), item.get("bytes")
    else:
        path, content = (item, None) if isinstance(item, str | Path) else (None, item)
    name = str(path or name)
    if content is None and path is None:
        raise ValueError(f"{name} is missing: it has neither a path nor content")
    if not isinstance(content, bytes | Image.Image | None):
        raise ValueError(f"{name} must be an image, tensor, array, path or bytes, got {type(content).__name__}")
    try:
        if isinstance(content, Image.Image):
            content.load()
            return content, name
        with Image.open(str(path) if content is None else io.BytesIO(content)) as image:
            if getattr(image, "is_animated", False) and image.format not in ONE_PICTURE:
                logger.warning_once("Only the first frame or page of animated and multi-page images is used.")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image, name
    except Exception as error:  # decoders raise anything on broken files: struct.error, SyntaxError, EOFError, ...
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)
        raise ValueError(f"{name} cannot be read as an image ({reason})") from error


def check_range(tensors: torch.Tensor | Sequence[torch.Tensor], name: str) -> None:
    """Warn once if a set of pixel tensors does not seem to lie in [-1, 1].

    Raises:
        ValueError: the values seem to lie in 0..255.
    """
    if len(tensors) == 0 or not tensors[0].is_floating_point():
        return
    extremes = [torch.stack(tensor.aminmax()) for tensor in ([tensors] if torch.is_tensor(tensors) else tensors)]
    low, high = (float(x) for x in (min(low for low, _ in extremes), max(high for _, high in extremes)))
    found = f"{name}: the pixel tensors lie in {low:.3g}..{high:.3g}, but models take [-1, 1]"
    if low >= 0 and high > 2:
        raise ValueError(f"{found}: give x / 127.5 - 1, or uint8 tensors")
    if low >= 0:
        logger.warning_once(f"{found}. If they are images in [0, 1], give x * 2 - 1.")
    elif max(-low, high) > 1 + TOLERANCE:
        logger.warning_once(f"{found}. They are used unchanged.")


class ImagePixels:
    """Turns lists of images into pixel values for a model, see `image_pixels`; can be pickled to worker processes."""

    def __init__(self, config: NoisyBackboneConfig, whole_image: bool) -> None:
        self.config, self.whole_image = config, whole_image

    @cached_property
    def processor(self) -> BaseImageProcessor:
        return make_image_processor(self.config, self.whole_image)

    def __call__(self, images: list[Any]) -> torch.Tensor:
        shapes = {tuple(image.shape) for image in images if isinstance(image, torch.Tensor)}
        if not shapes:
            return self.processor(images, return_tensors="pt")["pixel_values"]
        if len(shapes) > 1 or not all(isinstance(image, torch.Tensor) for image in images):
            raise ValueError(
                "tensors are taken as pixel values: give only tensors of one size, or no tensors; "
                f"found tensors of {', '.join(map(str, sorted(shapes)))}"
            )
        return torch.stack(images)

    def of_pairs(self, pairs: list[tuple[Any, Any]]) -> torch.Tensor:
        """Collate `(image, label)` pairs to pixel values."""
        return self([image for image, *_ in pairs])


def image_pixels(config: NoisyBackboneConfig, *, whole_image: bool = False) -> ImagePixels:
    """Make a function that turns a list of images into pixel values `(batch, channels, height, width)` in [-1, 1].

    Tensors pass through unchanged, because they are taken as pixel values.

    Args:
        whole_image: resize the whole image to a square instead of cropping its center, see `make_image_processor`.
            `resize_mask(mask, config.image_size)` resizes a mask alike.
    """
    return ImagePixels(config, whole_image)


def plain_dataset(dataset: datasets.Dataset) -> datasets.Dataset:
    """Remove a data set's format (pandas, torch, ...), so that rows come as they are stored.

    Raises:
        ValueError: the data set has a transform; its output may be random and could not be cached.
    """
    kind = dataset.format["type"]
    if kind == "custom":
        raise ValueError(
            "the data set has a transform (with_transform), but images are preprocessed for the model here: pass "
            "dataset.with_format(None), or first apply the transform with map"
        )
    return dataset if kind is None else dataset.with_format(None)


def undecoded(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    """One column of images in a form that `open_image` reads; nested lists become arrays of their own dtype."""
    images = dataset.select_columns([column])
    feature = images.features[column]
    if isinstance(feature, datasets.Image):
        return images.cast_column(column, datasets.Image(decode=False))
    return images if isinstance(feature, datasets.Value) else images.with_format("numpy", dtype=_dtype(feature))


def undecoded_stream(stream: datasets.IterableDataset, on_error: str) -> datasets.IterableDataset:
    """A stream of undecoded images for `open_image`; with `on_error="skip"`, without those that cannot be read."""
    features = stream.features or {}
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    for column in columns:
        stream = stream.cast_column(column, datasets.Image(decode=False))
    return stream.filter(partial(_is_readable, columns)) if on_error == "skip" else stream


def fingerprint_images(items: Iterable[Any]) -> str:
    """Hash of images: the content of images in memory; the path, size and times of files.

    The times include the change time (ctime), which cannot be set back when a file is replaced.
    """
    digest = hashlib.sha256()
    if isinstance(items, datasets.Dataset):
        digest.update(items._fingerprint.encode())
        items = _paths(items)
    for item in items:
        for part in _identity(item):
            digest.update(part)
    return digest.hexdigest()


def common_folder(items: Iterable[Any]) -> str:
    """The deepest folder that holds all files that items refer to; empty if there are none, or none in common."""
    paths = _paths(items) if isinstance(items, datasets.Dataset) else (_path_of(item) for item in items)
    folders = {os.path.dirname(path) for path in paths if path and "://" not in path}
    try:
        return os.path.commonpath(folders) if folders else ""
    except ValueError:  # absolute and relative paths, or several drives
        return ""


def stored_name(item: Any, folder: str) -> str | None:
    """The name of an item's file: below `folder`, if it is there, or else without any folder; `None` without a name."""
    path = _path_of(item)
    if not path:
        return None
    inner = path.partition("::")[0]  # a file in an archive
    if "://" in inner:
        return inner.partition("://")[2]
    if folder and Path(path).is_relative_to(folder):
        return str(Path(path).relative_to(folder))
    return Path(path).name if os.path.isabs(path) else path


def _path_of(item: Any) -> str | None:
    if isinstance(item, dict) and len(item) == 1:
        item = next(iter(item.values()))
    if isinstance(item, dict):
        return item.get("path")
    return str(item) if isinstance(item, str | Path) else getattr(item, "filename", None) or None


def _dtype(feature: Any) -> str | None:
    """Dtype of the numbers in an array or in nested lists, which numpy's format would widen."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    return getattr(feature, "dtype", None)


def _is_readable(columns: list[str], row: dict[str, Any]) -> bool:
    try:
        for column in columns:
            open_image(row[column], f"an image of column {column!r}")
    except ValueError as error:
        print(f"skipped: {error}")
        return False
    return True


def _pixel_tensor(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.dtype == torch.uint8:
        return tensor.float() / 127.5 - 1
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is a tensor of {tensor.dtype}: give uint8 values in 0..255 or floats in [-1, 1]")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite pixels")
    return tensor


def _paths(dataset: datasets.Dataset) -> Iterator[str]:
    """Paths of files that an undecoded column refers to without holding their content."""
    column = dataset.column_names[0]
    if isinstance(dataset.features[column], datasets.Image):
        contents = (pc.struct_field(chunk, "bytes") for chunk in dataset.data.column(column).chunks)
        if not any(content.null_count for content in contents):
            return  # without reading rows, which may hold many gigabytes
    elif getattr(dataset.features[column], "dtype", None) not in ("string", "large_string"):
        return
    for rows in dataset.with_format(None).iter(1000):
        for item in rows[column]:
            if isinstance(item, str):
                yield item
            elif isinstance(item, dict) and item["bytes"] is None and item["path"]:
                yield item["path"]


def _identity(item: Any) -> Iterator[Any]:
    if isinstance(item, dict):
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
    if isinstance(item, str | Path):
        yield str(item).encode()
        try:
            status = os.stat(item)
        except OSError:  # a URL or a missing file: reading it reports that
            return
        yield f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode()
        return
    if isinstance(item, bytes):
        yield item
        return
    kind = item.mode if isinstance(item, Image.Image) else str(getattr(item, "dtype", type(item)))
    yield f"{kind} {tuple(np.shape(item))}".encode()
    yield np.ascontiguousarray(item).tobytes()
