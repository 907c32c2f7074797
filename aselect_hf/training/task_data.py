"""Batches for the task scripts: images encoded once where possible, class labels or masks beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from aselect_hf.data import ImageData, image_pixels, split_train_validation
from aselect_hf.latent_cache import LatentCache, cached_latents
from aselect_hf.masks import resize_mask
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.sources import load_images, load_mask_names
from aselect_hf.training.arguments import TaskDataArguments

Batch = dict[str, Any]


@dataclass
class TaskData:
    """The splits of one run. `stream` takes the place of `train` where images are streamed; `train` is then what was
    read from its beginning to choose a timestep on."""

    train: ImageData
    validation: ImageData
    test: ImageData | None
    stream: datasets.IterableDataset | None
    label_names: list[str]

    def describe(self) -> str:
        train = "streamed" if self.stream is not None else f"{len(self.train):,}"
        test = f", {len(self.test):,} test" if self.test is not None else ""
        return f"images: {train} train, {len(self.validation):,} validation{test}; {len(self.label_names)} classes"


def load_task_data(args: TaskDataArguments, segmentation: bool, seed: int) -> TaskData:
    """Training, validation and (where asked for) test images with their labels.

    Raises:
        ValueError: no data, no labels, or splits whose classes differ.
    """
    source = args.train_dir or args.dataset_name
    if not source:
        raise ValueError("give --dataset_name or --train_dir")
    stream = None
    if args.streaming:
        stream = load_images(source, args.train_split, args.dataset_config_name, masks=segmentation, streaming=True)
        train = _beginning(source, stream, args.num_streamed_images, args, segmentation)
    else:
        train = _load(source, args.train_split, args, segmentation)
        train = _first(train, args.max_train_samples)
    if args.validation_dir:
        validation = _load(args.validation_dir, None, args, segmentation)
    elif args.validation_split:
        validation = _split(source, args.validation_split, args, segmentation)
    else:
        if stream is not None:
            raise ValueError("streaming needs --validation_split or --validation_dir: a stream cannot be split")
        train, validation = split_train_validation(train, args.train_val_split, seed)
    validation = _first(validation, args.max_eval_samples)
    test = None
    if args.test_split:
        test = _first(_split(source, args.test_split, args, segmentation), args.max_test_samples)
    names = class_names(train, segmentation)
    for name, data in (("validation", validation), ("test", test)):
        if data is not None and not segmentation and data.label_names != train.label_names:
            raise ValueError(f"the {name} images have classes {data.label_names}, the training images {names}")
    if len(names) < 2:
        raise ValueError(f"the training images have {len(names)} class(es); at least 2 are needed")
    return TaskData(train, validation, test, stream, names)


class TaskDataset(Dataset):
    """Indexed items of a split; `collate` makes batches of them, from encoded latents or from the images themselves.

    Args:
        latents: what the DiT sees, encoded once; `None` to prepare every image when it is drawn.
        random_flip: also deliver what mirrored images look like, where that is not the mirrored latents.
        whole_masks: also deliver the masks at their own resolution, for evaluation.

    Attributes:
        tokens: features in place of inputs, see `keep_features`.
    """

    def __init__(
        self,
        data: ImageData,
        config: ASelectDiTConfig,
        segmentation: bool,
        latents: LatentCache | None = None,
        random_flip: bool = False,
        whole_masks: bool = False,
    ) -> None:
        self.tokens: np.ndarray | None = None
        self.data, self.latents, self.segmentation, self.whole_masks = data, latents, segmentation, whole_masks
        self.random_flip = random_flip
        self.flipped = random_flip and latents is not None and config.vae_config is not None
        self.side = config.image_size or 0
        self.pixels = image_pixels(config, segmentation=segmentation)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> Batch:
        batch: Batch = {}
        if self.tokens is not None:
            for name, tokens in zip(("tokens", "flipped_tokens"), self.tokens, strict=False):
                batch[name] = torch.from_numpy(tokens[indices])
        elif self.latents is not None:
            batch["latents"] = self.latents.gather(indices)
            if self.flipped:
                batch["flipped_latents"] = self.latents.gather(indices, [True] * len(indices))
        else:
            batch["pixel_values"] = self.pixels([self.data.decode(index) for index in indices])
        if self.segmentation:
            masks = [self.data.mask(index) for index in indices]
            batch["labels"] = torch.stack([resize_mask(mask, self.side) for mask in masks])
            if self.whole_masks:
                batch["masks"] = [torch.from_numpy(mask) for mask in masks]
        else:
            assert self.data.labels is not None
            batch["labels"] = torch.from_numpy(self.data.labels[indices])
        return batch


def stream_collate(
    config: ASelectDiTConfig, args: TaskDataArguments, segmentation: bool
) -> Callable[[list[dict[str, Any]]], Batch]:
    """Batches of rows of a streamed data set."""

    def collate(rows: list[dict[str, Any]]) -> Batch:
        data = _of_rows(rows, args, segmentation)
        return TaskDataset(data, config, segmentation).collate(list(range(len(rows))))

    return collate


def encode_once(
    model: ASelectDiTModel, data: ImageData, args: TaskDataArguments, segmentation: bool, batch_size: int, flipped: bool
) -> LatentCache | None:
    """Latents of every image from the cache on disk, or `None` where images are to be prepared anew each time."""
    if not args.cache_latents:
        return None
    return cached_latents(
        model, data, flipped=flipped, segmentation=segmentation, batch_size=batch_size, cache_dir=args.cache_dir,
        num_workers=args.dataloader_num_workers,
    )  # fmt: skip


def _columns(args: TaskDataArguments, segmentation: bool) -> dict[str, Any]:
    if segmentation:
        columns = {"mask_column": args.mask_column_name, "reduce_labels": args.reduce_labels}
    else:
        columns = {"label_column": args.label_column_name}
    return {"image_column": args.image_column_name} | columns


def _load(source: str, split: str | None, args: TaskDataArguments, segmentation: bool) -> ImageData:
    name = f"{source} ({split})" if split else source
    columns = _columns(args, segmentation)
    data = ImageData.of(
        source, split=split, config_name=args.dataset_config_name, masks=segmentation, name=name, **columns
    )
    return _checked(data, segmentation)


def _split(source: str, split: str, args: TaskDataArguments, segmentation: bool) -> ImageData:
    """A held-out split; of a streamed data set, its first `max_eval_samples` rows."""
    if not args.streaming:
        return _load(source, split, args, segmentation)
    stream = load_images(source, split, args.dataset_config_name, masks=segmentation, streaming=True)
    return _beginning(source, stream, args.max_eval_samples, args, segmentation)


def _beginning(
    source: str, stream: datasets.IterableDataset, count: int | None, args: TaskDataArguments, segmentation: bool
) -> ImageData:
    """The first `count` rows of a stream, in memory; all of them without a count."""
    data = _of_rows(list(stream.take(count) if count else stream), args, segmentation)
    label = (stream.features or {}).get(args.label_column_name)
    if isinstance(label, datasets.ClassLabel):
        data.label_names = list(label.names)
    if segmentation:
        data.mask_names = load_mask_names(source)
    return data


def _of_rows(rows: list[dict[str, Any]], args: TaskDataArguments, segmentation: bool) -> ImageData:
    name = "the stream"
    target = (args.mask_column_name or "mask") if segmentation else args.label_column_name
    if missing := [column for column in (args.image_column_name, target) if column not in rows[0]]:
        raise ValueError(f"{name} has no column {missing[0]!r}; it has {', '.join(rows[0])}")
    images, targets = ([row[column] for row in rows] for column in (args.image_column_name, target))
    if segmentation:
        return ImageData(images, masks=targets, reduce_labels=args.reduce_labels, name=name)
    labels = np.array(targets)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels of a stream must be integers, got {targets[0]!r} in column {target!r}")
    return ImageData(images, labels.astype(np.int64), name=name)


def _checked(data: ImageData, segmentation: bool) -> ImageData:
    if segmentation and data.masks is None:
        raise ValueError(f"{data.name} has no masks: name their column with --mask_column_name")
    if not segmentation and data.labels is None:
        raise ValueError(f"{data.name} has no labels: name their column with --label_column_name")
    return data


def _first(data: ImageData, count: int | None) -> ImageData:
    return data if count is None else data.subset(range(min(count, len(data))))


def class_names(data: ImageData, segmentation: bool) -> list[str]:
    """Names of the classes, or their numbers."""
    if segmentation:
        return data.mask_names or [str(index) for index in range(data.num_mask_classes())]
    assert data.labels is not None
    return data.label_names or [str(index) for index in range(int(data.labels.max()) + 1)]
