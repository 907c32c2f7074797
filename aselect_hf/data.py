"""Images from anywhere - tensors, PIL lists, folders, `datasets`, data loaders - as batches of pixel values."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader

from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.image_processing_aselect_dit import make_image_processor

SAMPLE_DIR = Path(__file__).parent / "sample"
SAMPLE_DATA, SAMPLE_MODEL = SAMPLE_DIR / "data", SAMPLE_DIR / "model"
ON_ERROR = ("stop", "skip")


class ImageData:
    """A random-access collection of images with optional integer labels.

    Args:
        items: tensors `(channels, height, width)`, PIL images, image paths, or undecoded `datasets` images.
        labels: one integer per item.
        label_names: names of the classes.
        name: what to call the collection in reports and errors.
        fingerprint: identifies the content, for caches; computed from the items where not given.
    """

    def __init__(
        self,
        items: Sequence[Any] | torch.Tensor | datasets.Dataset,
        labels: np.ndarray | None = None,
        label_names: list[str] | None = None,
        name: str = "images",
        fingerprint: str | None = None,
    ) -> None:
        if len(items) == 0:
            raise ValueError(f"{name} holds no images")
        if labels is not None and len(labels) != len(items):
            raise ValueError(f"{name}: {len(labels)} labels for {len(items)} images")
        self.items, self.labels, self.label_names, self.name = items, labels, label_names, name
        self._fingerprint = fingerprint

    @classmethod
    def of(cls, images: Any, num_images: int | None = None, **columns: Any) -> ImageData:
        """Wrap whatever a user has: see `select_timestep` for the accepted types.

        Args:
            num_images: how many images to take from a data loader, which has no random access; default all.
            columns: `image_column`, `label_column` and `split` for data sets.
        """
        if isinstance(images, cls):
            return images
        if isinstance(images, str | Path):
            return cls.of(load_images(images, columns.pop("split", None)), **columns | {"name": str(images)})
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
        items: Any = self.items
        items = items.select(rows) if isinstance(items, datasets.Dataset) else [items[row] for row in rows]
        labels = None if self.labels is None else self.labels[rows]
        return ImageData(items, labels, self.label_names, self.name)

    def sample(self, num_images: int | None, seed: int) -> ImageData:
        """A random subset, the same for the same seed; everything where there are no more than `num_images`."""
        if num_images is None or num_images >= len(self):
            return self
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        return self.subset(np.random.default_rng(seed).permutation(len(self))[:num_images])

    def readable(self, on_error: str) -> ImageData:
        """With `on_error="skip"`, without the images that cannot be decoded; with `"stop"`, unchanged.

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
                self.decode(index)
            except ValueError as error:
                print(f"skipped: {error}")
            else:
                keep.append(index)
        if not keep:
            raise ValueError(f"none of the {len(self)} images of {self.name} can be read")
        return self if len(keep) == len(self) else self.subset(keep)

    def decode(self, index: int) -> Any:
        """One item as a PIL image or tensor.

        Raises:
            ValueError: the file is empty, truncated or not an image; the message names it.
        """
        item = self.items[index]
        if isinstance(item, dict):
            item = next(iter(item.values()))
        if isinstance(item, Image.Image | torch.Tensor):
            return item
        path, content = (item.get("path"), item.get("bytes")) if isinstance(item, dict) else (item, None)
        try:
            image = Image.open(io.BytesIO(content) if content is not None else str(path))
            image.load()
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            label = path or f"image {index} of {self.name}"
            raise ValueError(f"{label} cannot be read as an image ({error})") from error
        return image

    def batches(self, config: ASelectDiTConfig, batch_size: int, segmentation: bool = False) -> Iterator[torch.Tensor]:
        """Pixel values `(batch, channels, height, width)` in [-1, 1] as the model wants them, in order.

        Tensors pass through unchanged: they are taken to be pixel values already. `segmentation` is that of
        `make_image_processor`.
        """
        processor = None
        for start in range(0, len(self), batch_size):
            images = [self.decode(index) for index in range(start, min(start + batch_size, len(self)))]
            if isinstance(images[0], torch.Tensor):
                yield torch.stack(images)
            else:
                processor = processor or make_image_processor(config, segmentation)
                yield processor(images, return_tensors="pt")["pixel_values"]

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
        cls, dataset: datasets.Dataset, image_column: str = "image", label_column: str = "label", name: str = "images"
    ) -> ImageData:
        if image_column not in dataset.column_names:
            raise ValueError(f"the data set has no column {image_column!r}; it has {', '.join(dataset.column_names)}")
        labels = label_names = None
        if label_column in dataset.column_names:
            values = np.asarray(dataset[label_column][:])
            feature = dataset.features[label_column]
            label_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
            if values.dtype.kind not in "iu":
                names, values = np.unique(values, return_inverse=True)
                label_names = [str(label) for label in names]
            labels = values.astype(np.int64)
        images = dataset.select_columns([image_column])
        if isinstance(images.features[image_column], datasets.Image):
            images = images.cast_column(image_column, datasets.Image(decode=False))
        return cls(images, labels, label_names, name, fingerprint=f"{dataset._fingerprint}-{image_column}")

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


def load_images(source: str | Path, split: str | None = None, config_name: str | None = None) -> datasets.Dataset:
    """Load one split of a data set.

    Args:
        source: `"sample"` (shipped with the package), a folder of images, of parquet files or written by
            `save_to_disk`, or a data set id on the Hub.
        split: its name; default `"train"`, or the only one there is.

    Raises:
        ValueError: nothing is there, or it has no such split; the message lists what there is.
    """
    path = SAMPLE_DATA if source == "sample" else Path(source)
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path) if path.exists() else str(source), config_name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"cannot load images from {str(source)!r}: it is neither 'sample', a folder of images or parquet files, "
            f"nor a data set reachable on the Hub ({str(error).splitlines()[0]})"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    name = split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else "train")
    if name not in loaded:
        raise ValueError(f"{str(source)!r} has no split {name!r}; it has {', '.join(loaded)}")
    return loaded[name]
