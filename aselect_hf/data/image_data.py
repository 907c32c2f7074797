"""Images from any source - tensors, PIL lists, folders, `datasets`, data loaders - with their labels and masks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from aselect_hf.data.classes import UNLABELED, listed, match_labels, present_names, read_labels, stratified_sample
from aselect_hf.data.images import (
    check_range,
    fingerprint_images,
    image_pixels,
    open_image,
    plain_dataset,
    read_image,
    undecoded,
)
from aselect_hf.data.masks import MaskClasses, mask_pixels
from aselect_hf.data.sources import SAMPLE_DATA, SAMPLE_MODEL, find_mask_column, load_images, load_mask_names
from aselect_hf.files import as_path, read_json, sealed, write_json
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.modeling.image_processing_aselect_dit import reduced

logger = logging.get_logger(__name__)

ON_ERROR = ("stop", "skip")
LABEL_COLUMN = "label"
LABEL_KEYS = ("labels", "label")
NOT_GIVEN = "none were given"

__all__ = ["SAMPLE_DATA", "SAMPLE_MODEL", "ImageData", "image_pixels", "load_images"]


class ImageData:
    """A random-access collection of images with optional labels and segmentation masks.

    Args:
        items: tensors `(channels, height, width)`, PIL images, arrays, image paths, contents of image files, or
            undecoded `datasets` images.
        labels: one per item, see `aselect_hf.data.classes.read_labels`.
        label_names: class names, in order (default: the integers or the sorted names in `labels`).
        name: how reports and errors refer to the collection.
        fingerprint: identifies the content in caches (default: computed from the items).
        masks: one per item, of the same size as its image: PIL images of one channel, paths, undecoded `datasets`
            images, or integer arrays `(height, width)`. Values are classes, and 255 is ignored.
        mask_names: class names of the masks, in order (after `reduce_labels`), or by pixel value (before it).
        reduce_labels: shift the classes in the masks by -1; 0 becomes ignored.

    Attributes:
        labels: `(images,)` int64, -1 for an image without a label; `None` if no image has one.
        no_labels: why there are no labels, for messages.

    Raises:
        ValueError: there are no items, the number of labels or masks differs from theirs, or labels are not classes.
            Reading an item raises it if a file cannot be read or a mask does not fit; the message names the item.
    """

    def __init__(
        self,
        items: Sequence[Any] | torch.Tensor | datasets.Dataset,
        labels: Any = None,
        label_names: list[str] | None = None,
        name: str = "images",
        fingerprint: str | None = None,
        masks: Sequence[Any] | torch.Tensor | datasets.Dataset | None = None,
        mask_names: Sequence[str] | Mapping[int, str] | None = None,
        reduce_labels: bool = False,
    ) -> None:
        if len(items) == 0:
            raise ValueError(f"{name} holds no images")
        if masks is not None and len(masks) != len(items):
            raise ValueError(f"{name}: {len(masks)} masks for {len(items)} images")
        self.items, self.name, self.masks, self.reduce_labels = items, name, masks, reduce_labels
        self.mask_classes = MaskClasses.named(mask_names, reduce_labels) if mask_names else None
        self.labels: np.ndarray | None = None
        self.label_names, self.no_labels = label_names, NOT_GIVEN
        if labels is not None:
            self._label(*read_labels(labels, label_names, f"the labels of {name}"))
        self._fingerprint = fingerprint
        self.rows: Sequence[int] = range(len(items))  # the numbers of the images in errors, kept in subsets
        self._mask_values: dict[int, list[int]] = {}  # by row, shared with subsets, so that no mask is read twice

    @classmethod
    def of(
        cls,
        images: Any,
        num_images: int | None = None,
        *,
        split: str | None = None,
        config_name: str | None = None,
        masks: bool = False,
        **columns: Any,
    ) -> ImageData:
        """Wrap images of any accepted type, see `select_timestep`.

        Args:
            num_images: number of images to take from a data loader, which has no random access (default: all).
            split, config_name, masks: for a folder or Hub id, see `load_images`.
            columns: for data sets: `image_column="image"`; `label_column` (default: `label`, if present);
                `mask_column` (default: the first of `mask`, `annotation`, `segmentation`, `label` that holds images);
                `mask_names` (default: `load_mask_names` of the folder or Hub id); `reduce_labels=False`; `name`.
        """
        if isinstance(images, cls):
            return images
        if isinstance(images, str | Path):
            data = cls.of(load_images(images, split, config_name, masks=masks), **{"name": str(images)} | columns)
            if data.masks is not None and data.mask_classes is None and (names := load_mask_names(images)):
                if images == "sample" and isinstance(names, list):
                    names = dict(enumerate(names))  # by pixel value: labels begin at 1 in these masks
                data.mask_classes = MaskClasses.named(names, data.reduce_labels)
            return data
        if isinstance(images, datasets.DatasetDict):
            raise ValueError(f"images is a DatasetDict; pass one of its splits: {', '.join(images)}")
        if isinstance(images, datasets.Dataset):
            return cls._of_dataset(images, **columns)
        if isinstance(images, DataLoader):
            return cls._of_loader(images, num_images)
        if isinstance(images, torch.Tensor):
            if images.ndim != 4:
                raise ValueError(f"images must be (batch, channels, height, width), got {tuple(images.shape)}")
            check_range(images, "images")
            return cls(images)
        if isinstance(images, list | tuple):
            if all(isinstance(image, torch.Tensor) for image in images):
                check_range(images, "images")
            return cls(images)
        raise TypeError(
            "images must be a pixel tensor, a list of PIL images, arrays or paths, a datasets.Dataset, a folder, a Hub "
            f"id or a DataLoader; got {type(images).__name__}"
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image | torch.Tensor, int | None]:
        """One decoded image with its label (`None`: no label)."""
        label = UNLABELED if self.labels is None else int(self.labels[index])
        return self.decode(index), None if label == UNLABELED else label

    def subset(self, indices: Iterable[int]) -> ImageData:
        """The images at `indices`, in that order."""
        rows = [int(index) for index in indices]
        if not rows:
            raise ValueError(f"{self.name} holds no images")
        taken = self._changed(items=_take(self.items, rows), rows=[self.rows[row] for row in rows], _fingerprint=None)
        taken.masks = None if self.masks is None else _take(self.masks, rows)
        if self.labels is not None:
            taken._label(self.labels[rows], self.label_names)
        return taken

    def sample(self, num_images: int | None, seed: int, *, per_class: int = 0) -> ImageData:
        """A random subset that depends on the seed only; the whole collection if it has at most `num_images` images.

        Args:
            per_class: if positive and there are labels, every class keeps its share, and at least `per_class` images
                if there is room (`stratified_sample`). With 0 the labels play no role.
        """
        if num_images is None or num_images >= len(self):
            return self
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        if per_class and self.labels is not None:
            return self.subset(stratified_sample(self.labels, num_images, seed, per_class))
        return self.subset(np.random.default_rng(seed).permutation(len(self))[:num_images])

    def labeled(self) -> ImageData:
        """The images that have a label; a warning counts those that have none.

        Raises:
            ValueError: no image has a label.
        """
        if self.labels is None:
            raise ValueError(f"{self.name} has no labels: {self.no_labels}")
        if not self.num_unlabeled:
            return self
        logger.warning_once(f"{self.num_unlabeled:,} of {len(self):,} images of {self.name} have no label: not used")
        return self.subset(np.flatnonzero(self.labels != UNLABELED))

    @property
    def num_unlabeled(self) -> int:
        """How many images have no label."""
        return len(self) if self.labels is None else int((self.labels == UNLABELED).sum())

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; without names, the integers that occur as labels."""
        if self.label_names is not None:
            return self.label_names
        return present_names(self.labels, None)

    def with_classes(self, names: Sequence[str], what: str | None = None, whose: str = "the given names") -> ImageData:
        """The same images with their labels numbered by `names`, see `aselect_hf.data.classes.match_labels`."""
        labels = self.labels
        if labels is not None and self.label_names != list(names):
            labels = match_labels(labels, self.label_names, names, what or f"images of {self.name}", whose)
        return self._changed(labels=labels, label_names=list(names))

    def with_mask_classes(self, classes: MaskClasses) -> ImageData:
        """The same images with other classes for the values in their masks."""
        return self._changed(mask_classes=classes)

    def with_known_mask_classes(self, progress: bool = False, cache_dir: str | Path | None = None) -> ImageData:
        """The same images with known mask classes, read from the masks if necessary; see `mask_pixel_values`."""
        if self.mask_classes is not None:
            return self
        values = self.mask_pixel_values(progress, cache_dir)
        return self.with_mask_classes(MaskClasses.found(values, self.reduce_labels))

    def describe_classes(self) -> str:
        """How many images every class has, for messages."""
        if self.labels is None:
            return f"no labels ({self.no_labels})"
        counts = np.unique(self.labels[self.labels != UNLABELED], return_counts=True)[1]
        names = present_names(self.labels, self.label_names)
        return "images by class: " + listed(names, counts.tolist())

    def _label(self, labels: np.ndarray, names: list[str] | None) -> None:
        """Set the labels and names that `read_labels` returned."""
        if len(labels) != len(self):
            raise ValueError(f"{self.name}: {len(labels)} labels for {len(self)} images")
        self.labels, self.label_names = labels, names
        if not (labels != UNLABELED).any():
            self.labels, self.no_labels = None, f"all {len(labels):,} are missing (-1, None or NaN)"

    def _changed(self, **attributes: Any) -> ImageData:
        changed = copy.copy(self)
        changed.__dict__.update(attributes)
        return changed

    def readable(self, on_error: str) -> ImageData:
        """With `on_error="skip"`, drop images that cannot be read or whose masks cannot; with `"stop"`, change nothing.

        Raises:
            ValueError: no image can be read.
        """
        check_on_error(on_error)
        if on_error == "stop":
            return self
        keep = []
        for index in range(len(self)):
            try:
                self.decode(index) if self.masks is None else self.pair(index)
            except ValueError as error:
                print(f"skipped: {error}")
            else:
                keep.append(index)
        if not keep:
            raise ValueError(f"none of the {len(self)} images of {self.name} can be read")
        return self if len(keep) == len(self) else self.subset(keep)

    def decode(self, index: int) -> Any:
        """One item as an upright 8-bit PIL image (mode L or RGB) or pixel tensor; see `read_image`.

        Raises:
            ValueError: the item cannot be decoded, holds NaN, or has values of an unknown range; the message names it.
        """
        return read_image(self.items[index], f"image {self.rows[index]} of {self.name}")

    def mask(self, index: int) -> np.ndarray:
        """Classes of one image's pixels, `(height, width)` int64; 255 is ignored.

        Raises:
            ValueError: see `pair`.
        """
        return self.pair(index)[1]

    def pair(self, index: int) -> tuple[Any, np.ndarray]:
        """One decoded image with its mask.

        Raises:
            ValueError: there are no masks, the image or the mask cannot be read, the mask has colors instead of
                classes, differs in size from its image (both upright), or holds a class without a name.
        """
        if self.masks is None:
            raise ValueError(f"{self.name} has no masks")
        image = self.decode(index)
        pixels, name = self._mask_pixels(index)
        size = tuple(image.shape[-2:]) if isinstance(image, torch.Tensor) else (image.height, image.width)
        if pixels.shape != size:
            raise ValueError(f"{name} is {pixels.shape[0]} x {pixels.shape[1]} pixels, its image {size[0]} x {size[1]}")
        if self.mask_classes is not None:
            return image, self.mask_classes.of(pixels, name)
        return image, reduced(pixels) if self.reduce_labels else pixels

    @property
    def mask_names(self) -> list[str] | None:
        """Names of the classes in the masks; `None` if they are not known."""
        return None if self.mask_classes is None else self.mask_classes.names

    def num_mask_classes(self) -> int:
        """Number of classes in the masks: of their names or, if absent, of the values that are not ignored."""
        return len(self.with_known_mask_classes().mask_names or [])

    def mask_pixel_values(self, progress: bool = False, cache_dir: str | Path | None = None) -> list[int]:
        """All pixel values that occur in the masks, ascending. Every mask is read once.

        Args:
            cache_dir: folder in which to cache the values for a data set's masks, by fingerprint (default: no cache).
        """
        if cache_dir is None or not isinstance(self.masks, datasets.Dataset):
            return self._read_mask_values(progress)
        file = as_path(cache_dir) / f"masks-{ImageData(self.masks, name=self.name).fingerprint}.json"
        values = _remembered(file)
        if values is None:
            values = self._read_mask_values(progress)
            write_json(file, sealed({"values": values}))
        return values

    def _read_mask_values(self, progress: bool) -> list[int]:
        rows = tqdm(range(len(self)), desc=f"classes in the masks of {self.name}", unit="mask", disable=not progress)
        for row in rows:
            if self.rows[row] not in self._mask_values:
                self._mask_values[self.rows[row]] = np.unique(self._mask_pixels(row)[0]).tolist()
        return sorted({value for row in self.rows for value in self._mask_values[row]})

    def _mask_pixels(self, index: int) -> tuple[np.ndarray, str]:
        """Pixel values of a mask `(height, width)`, and its name."""
        assert self.masks is not None
        mask, name = self.masks[index], f"mask {self.rows[index]} of {self.name}"
        if not isinstance(mask, np.ndarray):
            mask, name = open_image(mask, name)
        return mask_pixels(mask, name), name

    def batches(
        self, config: NoisyBackboneConfig, batch_size: int, *, whole_image: bool = False, num_workers: int = 0
    ) -> Iterator[torch.Tensor]:
        """Pixel values `(batch, channels, height, width)` of all images, in order; see `image_pixels`.

        Args:
            num_workers: processes that decode ahead (0: decode in this process).
        """
        loader: DataLoader = DataLoader(
            self,  # type: ignore[arg-type]
            batch_size=batch_size,
            collate_fn=image_pixels(config, whole_image=whole_image).of_pairs,
            num_workers=num_workers,
            generator=torch.Generator(),  # leaves the caller's random state alone
        )
        yield from loader

    @property
    def fingerprint(self) -> str:
        """Hash that changes with the content of the images; see `fingerprint_images`."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_images(self.items)
        return self._fingerprint

    @classmethod
    def _of_dataset(
        cls,
        dataset: datasets.Dataset,
        image_column: str = "image",
        label_column: str | None = None,
        mask_column: str | None = None,
        mask_names: Sequence[str] | Mapping[int, str] | None = None,
        reduce_labels: bool = False,
        name: str = "images",
    ) -> ImageData:
        dataset = plain_dataset(dataset)
        if image_column not in dataset.column_names:
            raise ValueError(f"the data set has no column {image_column!r}; it has {', '.join(dataset.column_names)}")
        mask_column = find_mask_column(dataset.features, image_column, mask_column)
        masks = None if mask_column is None else undecoded(dataset, mask_column)
        if masks is None and (reduce_labels or mask_names):
            raise ValueError(f"{name} has no column of masks, which reduce_labels and mask_names need")
        data = cls(
            undecoded(dataset, image_column), name=name, masks=masks, mask_names=mask_names,
            reduce_labels=reduce_labels,
        )  # fmt: skip
        data._read_label_column(dataset, label_column)
        return data

    def _read_label_column(self, dataset: datasets.Dataset, column: str | None) -> None:
        """Read a data set's labels; problems with a column that the user did not name are kept for `no_labels`.

        Raises:
            ValueError: a column that the user named does not exist, or does not hold classes.
        """
        name = column or LABEL_COLUMN
        feature = dataset.features.get(name)
        try:
            if feature is None or isinstance(feature, datasets.Image):
                there = "holds images instead of classes" if feature else "does not exist"
                raise ValueError(
                    f"label_column {name!r} of {self.name} {there}; its columns are {', '.join(dataset.column_names)}"
                )
            names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
            values = dataset.with_format(None)[name][:]
            self._label(*read_labels(values, names, f"the labels in column {name!r} of {self.name}"))
        except ValueError as error:
            if column is not None:
                raise
            self.no_labels = str(error)

    @classmethod
    def _of_loader(cls, loader: DataLoader, num_images: int | None) -> ImageData:
        pixels: list[torch.Tensor] = []
        labels: list[Any] = []
        count = 0
        for batch in loader:
            if isinstance(batch, dict):
                batch = (batch.get("pixel_values"), next((batch[key] for key in LABEL_KEYS if key in batch), None))
            images, *rest = batch if isinstance(batch, list | tuple) else (batch,)
            if not isinstance(images, torch.Tensor) or images.ndim != 4:
                raise ValueError("a DataLoader must yield tensors (batch, channels, height, width), pairs (images, "
                                 "labels), or dicts with 'pixel_values'")  # fmt: skip
            pixels.append(images)
            if rest and rest[0] is not None:
                labels += rest[0].tolist() if isinstance(rest[0], torch.Tensor) else rest[0]
            count += len(images)
            if num_images is not None and count >= num_images:
                break
        data = cls(torch.cat(pixels)[:num_images], name="data loader")
        check_range(data.items, "data loader")
        data.no_labels = "its batches are neither (images, labels) pairs nor dicts with 'labels' or 'label'"
        if labels:
            try:
                data._label(*read_labels(labels[:num_images], what="the labels of the data loader"))
            except ValueError as error:
                data.no_labels = str(error)
        return data


def check_on_error(on_error: str) -> None:
    """Check the choice to `"stop"` at an image that cannot be read, or to `"skip"` it.

    Raises:
        ValueError: `on_error` is neither.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}; got {on_error!r}")


def _take(items: Any, rows: list[int]) -> Any:
    return items.select(rows) if isinstance(items, datasets.Dataset) else [items[row] for row in rows]


def _remembered(file: Path) -> list[int] | None:
    """Pixel values that `mask_pixel_values` wrote; `None` if the file is absent or damaged."""
    try:
        record = read_json(file)
        return record["values"] if record == sealed({"values": record["values"]}) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
