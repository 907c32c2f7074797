"""Images from anywhere - tensors, PIL lists, folders, `datasets`, data loaders - with their labels and masks."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader

from aselect_hf.masks import IGNORED, read_mask
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.image_processing_aselect_dit import make_image_processor
from aselect_hf.sources import SAMPLE_DATA, SAMPLE_MODEL, find_mask_column, load_images, load_mask_names

ON_ERROR = ("stop", "skip")
SCANNED_MASKS = 256

__all__ = ["SAMPLE_DATA", "SAMPLE_MODEL", "ImageData", "image_pixels", "load_images", "split_train_validation"]


class ImageData:
    """A random-access collection of images with optional integer labels and segmentation masks.

    Args:
        items: tensors `(channels, height, width)`, PIL images, image paths, or undecoded `datasets` images.
        labels: one integer per item.
        label_names: names of the classes.
        name: what to call the collection in reports and errors.
        fingerprint: identifies the content, for caches; computed from the items where not given.
        masks: one per item, as large as its image: PIL images of one channel, paths, undecoded `datasets` images, or
            integer arrays `(height, width)`. Values are classes, 255 is ignored.
        mask_names: names of the classes in the masks (after `reduce_labels`).
        reduce_labels: shift the classes in the masks by -1; 0 becomes ignored.

    Raises:
        ValueError: no items, or another number of labels or masks; reading an item raises it for a file that cannot be
            read and for a mask that does not fit, by name.
    """

    def __init__(
        self,
        items: Sequence[Any] | torch.Tensor | datasets.Dataset,
        labels: np.ndarray | None = None,
        label_names: list[str] | None = None,
        name: str = "images",
        fingerprint: str | None = None,
        masks: Sequence[Any] | torch.Tensor | datasets.Dataset | None = None,
        mask_names: list[str] | None = None,
        reduce_labels: bool = False,
    ) -> None:
        if len(items) == 0:
            raise ValueError(f"{name} holds no images")
        for kind, values in (("labels", labels), ("masks", masks)):
            if values is not None and len(values) != len(items):
                raise ValueError(f"{name}: {len(values)} {kind} for {len(items)} images")
        self.items, self.labels, self.label_names, self.name = items, labels, label_names, name
        self.masks, self.mask_names, self.reduce_labels = masks, mask_names, reduce_labels
        self._fingerprint = fingerprint

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
        """Wrap whatever a user has: see `select_timestep` for the accepted types.

        Args:
            num_images: how many images to take from a data loader, which has no random access; default all.
            split, config_name, masks: for a folder or Hub id, see `load_images`.
            columns: for data sets, `image_column="image"`; `label_column="label"`; `mask_column`, default the first of
                `mask`, `annotation`, `segmentation`, `label` that holds images; `mask_names`, default those of
                `load_mask_names` for a folder or Hub id; `reduce_labels=False`; `name`.
        """
        if isinstance(images, cls):
            return images
        if isinstance(images, str | Path):
            data = cls.of(load_images(images, split, config_name, masks=masks), **{"name": str(images)} | columns)
            if data.masks is not None and data.mask_names is None:
                names = load_mask_names(images)
                data.mask_names = names[1:] if names and images == "sample" and data.reduce_labels else names
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
            return cls(images)
        if isinstance(images, list | tuple):
            return cls(images)
        raise TypeError(
            "images must be a pixel tensor, a list of PIL images or paths, a datasets.Dataset, a folder, a Hub id "
            f"or a DataLoader; got {type(images).__name__}"
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image | torch.Tensor, int | None]:
        """One decoded image with its label."""
        return self.decode(index), None if self.labels is None else int(self.labels[index])

    def subset(self, indices: Iterable[int]) -> ImageData:
        """The images at `indices`, in that order."""
        rows = [int(index) for index in indices]
        labels = None if self.labels is None else self.labels[rows]
        masks = None if self.masks is None else _take(self.masks, rows)
        return ImageData(
            _take(self.items, rows), labels, self.label_names, self.name,
            masks=masks, mask_names=self.mask_names, reduce_labels=self.reduce_labels,
        )  # fmt: skip

    def sample(self, num_images: int | None, seed: int) -> ImageData:
        """A random subset, the same for the same seed; everything where there are no more than `num_images`."""
        if num_images is None or num_images >= len(self):
            return self
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        return self.subset(np.random.default_rng(seed).permutation(len(self))[:num_images])

    def readable(self, on_error: str) -> ImageData:
        """With `on_error="skip"`, without the images that cannot be read, or their masks; with `"stop"`, unchanged.

        Raises:
            ValueError: none can be decoded.
        """
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}; got {on_error!r}")
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
        """One item as a PIL image (turned upright, where its EXIF data say how) or tensor.

        Raises:
            ValueError: the file is empty, truncated or not an image; the message names it.
        """
        return _open(self.items[index], f"image {index} of {self.name}")[0]

    def mask(self, index: int) -> np.ndarray:
        """Classes of one image's pixels, `(height, width)` int64, 255 where they are to be ignored.

        Raises:
            ValueError: as `pair`.
        """
        return self.pair(index)[1]

    def pair(self, index: int) -> tuple[Any, np.ndarray]:
        """One decoded image with its mask.

        Raises:
            ValueError: there are no masks, one of the two cannot be read, the mask has colours instead of classes, is
                of another size than its image (both upright), or holds a class that has no name.
        """
        if self.masks is None:
            raise ValueError(f"{self.name} has no masks")
        image = self.decode(index)
        mask, name = self.masks[index], f"mask {index} of {self.name}"
        if not isinstance(mask, np.ndarray):
            mask, name = _open(mask, name)
        classes = read_mask(mask, self.reduce_labels, name)
        size = tuple(image.shape[-2:]) if isinstance(image, torch.Tensor) else (image.height, image.width)
        if classes.shape != size:
            raise ValueError(
                f"{name} is {classes.shape[0]} x {classes.shape[1]} pixels, its image {size[0]} x {size[1]}"
            )
        highest = classes.max(where=classes != IGNORED, initial=0)
        if self.mask_names is not None and highest >= len(self.mask_names):
            raise ValueError(f"{name} holds the class {highest}, but only {len(self.mask_names)} classes have names")
        return image, classes

    def num_mask_classes(self) -> int:
        """Classes in the masks: one a name, or else one more than the highest in (at most) 256 masks, evenly spaced."""
        if self.mask_names is not None:
            return len(self.mask_names)
        rows = np.unique(np.linspace(0, len(self) - 1, SCANNED_MASKS).astype(int))
        masks = (self.mask(int(row)) for row in rows)
        return 1 + max(int(mask.max(where=mask != IGNORED, initial=0)) for mask in masks)

    def batches(
        self, config: ASelectDiTConfig, batch_size: int, *, segmentation: bool = False, num_workers: int = 0
    ) -> Iterator[torch.Tensor]:
        """Pixel values `(batch, channels, height, width)` of all images, in order; see `image_pixels`.

        Args:
            num_workers: processes that decode ahead; 0 decodes when asked.
        """
        pixels = image_pixels(config, segmentation=segmentation)
        loader: DataLoader = DataLoader(
            self,  # type: ignore[arg-type]
            batch_size=batch_size,
            collate_fn=lambda pairs: pixels([image for image, _ in pairs]),
            num_workers=num_workers,
            generator=torch.Generator(),  # its own: the caller's random state is left alone
        )
        yield from loader

    @property
    def fingerprint(self) -> str:
        """Hash of the images' content (decoded where they are not files or data set rows)."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for index in range(len(self)):
                image = self.decode(index)
                kind = image.mode if isinstance(image, Image.Image) else str(image.dtype)
                digest.update(f"{kind} {tuple(np.shape(image))}".encode())
                digest.update(np.ascontiguousarray(image).tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @classmethod
    def _of_dataset(
        cls,
        dataset: datasets.Dataset,
        image_column: str = "image",
        label_column: str = "label",
        mask_column: str | None = None,
        mask_names: list[str] | None = None,
        reduce_labels: bool = False,
        name: str = "images",
    ) -> ImageData:
        if image_column not in dataset.column_names:
            raise ValueError(f"the data set has no column {image_column!r}; it has {', '.join(dataset.column_names)}")
        labels = label_names = None
        feature = dataset.features.get(label_column)
        if feature is not None and not isinstance(feature, datasets.Image):
            values = np.asarray(dataset[label_column][:])
            label_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
            if values.dtype.kind not in "iu":
                names, values = np.unique(values, return_inverse=True)
                label_names = [str(label) for label in names]
            labels = values.astype(np.int64)
        mask_column = find_mask_column(dataset.features, image_column, mask_column)
        masks = None if mask_column is None else _undecoded(dataset, mask_column)
        if masks is None and (reduce_labels or mask_names):
            raise ValueError(f"{name} has no column of masks; reduce_labels and mask_names are about masks")
        return cls(
            _undecoded(dataset, image_column), labels, label_names, name,
            fingerprint=f"{dataset._fingerprint}-{image_column}", masks=masks, mask_names=mask_names,
            reduce_labels=reduce_labels,
        )  # fmt: skip

    @classmethod
    def _of_loader(cls, loader: DataLoader, num_images: int | None) -> ImageData:
        pixels, labels, count = [], [], 0
        for batch in loader:
            if isinstance(batch, dict):
                batch = (batch.get("pixel_values"), batch.get("labels"))
            images, *rest = batch if isinstance(batch, list | tuple) else (batch,)
            if not isinstance(images, torch.Tensor) or images.ndim != 4:
                raise ValueError("a DataLoader must yield (batch, channels, height, width) tensors, (images, labels) "
                                 "pairs, or dicts with 'pixel_values'")  # fmt: skip
            pixels.append(images)
            if rest and rest[0] is not None:
                labels.append(torch.as_tensor(rest[0]))
            count += len(images)
            if num_images is not None and count >= num_images:
                break
        images = torch.cat(pixels)[:num_images]
        return cls(images, torch.cat(labels)[:num_images].numpy() if labels else None, name="data loader")


def image_pixels(config: ASelectDiTConfig, *, segmentation: bool = False) -> Callable[[list[Any]], torch.Tensor]:
    """What turns a list of images into pixel values `(batch, channels, height, width)` in [-1, 1] for a model.

    Tensors pass through unchanged: they are taken to be pixel values already.

    Args:
        segmentation: the whole image resized to a square, instead of its centre; see `make_image_processor`. A mask
            follows it by `resize_mask(mask, config.image_size)`.
    """
    processor = None

    def pixels(images: list[Any]) -> torch.Tensor:
        nonlocal processor
        if isinstance(images[0], torch.Tensor):
            return torch.stack(images)
        processor = processor or make_image_processor(config, segmentation=segmentation)
        return processor(images, return_tensors="pt")["pixel_values"]

    return pixels


def split_train_validation(data: ImageData, share: float, seed: int) -> tuple[ImageData, ImageData]:
    """Hold out a random `share` of the images, the same of every class where there are labels.

    Raises:
        ValueError: `share` not between 0 and 1, or too few images (of a class) to split.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    try:
        parts = train_test_split(np.arange(len(data)), test_size=share, stratify=data.labels, random_state=seed)
    except ValueError as error:
        raise ValueError(f"cannot hold out {share} of the {len(data)} images of {data.name}: {error}") from error
    train, held_out = (data.subset(sorted(part)) for part in parts)
    return train, held_out


def _take(items: Any, rows: list[int]) -> Any:
    return items.select(rows) if isinstance(items, datasets.Dataset) else [items[row] for row in rows]


def _undecoded(dataset: datasets.Dataset, column: str) -> datasets.Dataset:
    images = dataset.select_columns([column])
    if isinstance(images.features[column], datasets.Image):
        images = images.cast_column(column, datasets.Image(decode=False))
    return images


def _open(item: Any, name: str) -> tuple[Any, str]:
    """An item in memory as it is; a file or a data set's row decoded and upright; and its path, or else `name`."""
    if isinstance(item, dict) and len(item) == 1:
        item = next(iter(item.values()))
    if isinstance(item, Image.Image | torch.Tensor):
        return item, name
    path, content = (item.get("path"), item.get("bytes")) if isinstance(item, dict) else (item, None)
    name = str(path or name)
    try:
        image = Image.open(io.BytesIO(content) if content is not None else str(path))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{name} cannot be read as an image ({error})") from error
    return image, name
