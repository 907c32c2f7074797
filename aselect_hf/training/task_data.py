"""Batches for the task scripts: images encoded once where possible, class labels or masks beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from aselect_hf.data.classes import is_labelled, present_names, share_classes, share_mask_classes
from aselect_hf.data.image_data import LABEL_COLUMN, ImageData, split_train_validation
from aselect_hf.data.images import image_pixels, undecoded_stream
from aselect_hf.data.latent_cache import DEFAULT_CACHE, LatentCache, cached_latents
from aselect_hf.data.masks import MaskClasses, resize_mask
from aselect_hf.data.sources import load_images, load_mask_names
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.training.arguments import TaskDataArguments

logger = logging.get_logger(__name__)

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
    """Training, validation and (where asked for) test images, with labels or masks of the same classes.

    Classes are those of all training images, before a sample is taken.

    Raises:
        ValueError: no data, no labels, or a split with a class that the training images do not have.
    """
    source = args.train_dir or args.dataset_name
    if not source:
        raise ValueError("give --dataset_name or --train_dir")
    if args.streaming and not (args.validation_dir or args.validation_split):
        raise ValueError("streaming needs --validation_split or --validation_dir: a stream cannot be split")
    stream = _open_stream(source, args.train_split, args, segmentation, seed) if args.streaming else None
    if stream is None:
        train = _load(source, args.train_split, args, segmentation)
    else:
        train = _beginning(source, args.train_split, stream, args.num_streamed_images, args, segmentation)
        _check_stream(train, stream, args, segmentation)
    splits = {"training": train} | _held_out(source, args, segmentation, seed)
    mask_cache = (args.cache_dir or DEFAULT_CACHE) if args.cache_latents else None
    if segmentation:
        splits["training"] = train.with_known_mask_classes(progress=True, cache_dir=mask_cache)
    else:
        splits = share_classes(splits, given_classes(args.classes), whole=stream is None)
    splits = _sampled(splits, args, seed)
    if segmentation:
        splits = share_mask_classes(splits, cache_dir=mask_cache, whole=stream is None)
    train = splits["training"]
    names = (train.mask_names or []) if segmentation else train.class_names
    present = names if segmentation or stream is not None else present_names(train.labels, names)
    if len(present) < 2:
        raise ValueError(f"the training images have {len(present)} class(es); at least 2 are needed")
    if stream is not None and not segmentation:
        stream = stream.filter(is_labelled, input_columns=[_label_column(args)])
    return TaskData(train, splits["validation"], splits.get("test"), stream, names)


def given_classes(values: list[str] | None) -> list[str] | None:
    """What `--classes` says: names, or the numbers below a count."""
    if values is not None and len(values) == 1 and values[0].isdecimal():
        return [str(number) for number in range(int(values[0]))]
    return values


def given_mask_classes(values: list[str] | None) -> list[str] | dict[int, str] | None:
    """What `--classes` says of masks: as `given_classes`, or names by pixel value."""
    pairs = [value.partition("=") for value in values or []]
    if pairs and all(number.isdecimal() and equals for number, equals, _ in pairs):
        return {int(number): name for number, _, name in pairs}
    return given_classes(values)


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
        config: NoisyBackboneConfig,
        segmentation: bool,
        latents: LatentCache | None = None,
        random_flip: bool = False,
        whole_masks: bool = False,
    ) -> None:
        self.tokens: np.memmap | None = None
        self.data, self.latents, self.segmentation, self.whole_masks = data, latents, segmentation, whole_masks
        self.random_flip = random_flip
        self.flipped = random_flip and latents is not None and config.vae_config is not None
        self.config = config

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        return index

    def __getstate__(self) -> dict[str, Any]:
        """Without the features, which a worker opens again: pickling a memory map copies all of it."""
        file = None if self.tokens is None else self.tokens.filename
        return self.__dict__ | {"tokens": file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file = state["tokens"]
        self.__dict__ |= state | {"tokens": None if file is None else np.load(file, mmap_mode="r")}

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
            pixels = image_pixels(self.config, segmentation=self.segmentation)
            batch["pixel_values"] = pixels([self.data.decode(index) for index in indices])
        if self.segmentation:
            masks = [self.data.mask(index) for index in indices]
            batch["labels"] = torch.stack([resize_mask(mask, self.config.image_size or 0) for mask in masks])
            if self.whole_masks:
                batch["masks"] = [torch.from_numpy(mask) for mask in masks]
        else:
            assert self.data.labels is not None
            batch["labels"] = torch.from_numpy(self.data.labels[indices])
        return batch


def stream_collate(
    config: NoisyBackboneConfig, args: TaskDataArguments, segmentation: bool, data: TaskData
) -> Callable[[list[dict[str, Any]]], Batch]:
    """Batches of rows of a streamed data set, with the classes of its training images."""
    assert data.stream is not None
    features = data.stream.features
    classes = data.train.mask_classes if segmentation else data.label_names
    return partial(_collate_rows, config, args, segmentation, features, classes)


def _collate_rows(
    config: NoisyBackboneConfig,
    args: TaskDataArguments,
    segmentation: bool,
    features: datasets.Features | None,
    classes: Any,
    rows: list[dict[str, Any]],
) -> Batch:
    data = _of_rows(rows, features, args, segmentation)
    data = data.with_mask_classes(classes) if segmentation else data.with_classes(classes)
    return TaskDataset(data, config, segmentation).collate(list(range(len(rows))))


def encode_once(
    model: NoisyBackbone, data: ImageData, args: TaskDataArguments, segmentation: bool, batch_size: int, flipped: bool
) -> LatentCache | None:
    """Latents of every image from the cache on disk, or `None` where images are to be prepared anew each time."""
    if not args.cache_latents:
        return None
    return cached_latents(
        model, data, flipped=flipped, segmentation=segmentation, batch_size=batch_size, cache_dir=args.cache_dir,
        num_workers=args.dataloader_num_workers,
    )  # fmt: skip


def _columns(args: TaskDataArguments, segmentation: bool) -> dict[str, Any]:
    columns: dict[str, Any]
    if segmentation:
        columns = {"mask_column": args.mask_column_name, "reduce_labels": args.reduce_labels}
        columns["mask_names"] = given_mask_classes(args.classes)
    else:
        columns = {"label_column": args.label_column_name}
    return {"image_column": args.image_column_name} | columns


def _label_column(args: TaskDataArguments) -> str:
    return args.label_column_name or LABEL_COLUMN


def _load(source: str, split: str | None, args: TaskDataArguments, segmentation: bool) -> ImageData:
    name = f"{source} ({split})" if split else source
    columns = _columns(args, segmentation)
    data = ImageData.of(
        source, split=split, config_name=args.dataset_config_name, masks=segmentation, name=name, **columns
    )
    return _checked(data.readable(args.on_error), segmentation)


def _held_out(source: str, args: TaskDataArguments, segmentation: bool, seed: int) -> dict[str, ImageData]:
    """Validation and test images, where they are asked for."""
    splits = {}
    if args.validation_dir:
        splits["validation"] = _load(args.validation_dir, None, args, segmentation)
    elif args.validation_split:
        splits["validation"] = _split(source, args.validation_split, args.max_eval_samples, args, segmentation, seed)
    if args.test_split:
        splits["test"] = _split(source, args.test_split, args.max_test_samples, args, segmentation, seed)
    return splits


def _sampled(splits: dict[str, ImageData], args: TaskDataArguments, seed: int) -> dict[str, ImageData]:
    """Random samples of the sizes asked for; where there are no validation images, they are taken from training's."""
    train = splits["training"]
    if not args.streaming:
        train = train.sample(args.max_train_samples, seed, per_class=1)
    if "validation" in splits:
        sampled = {"training": train, "validation": splits["validation"]}
    else:
        train, validation = split_train_validation(train, args.train_val_split, seed)
        sampled = {"training": train, "validation": validation}
    sampled["validation"] = sampled["validation"].sample(args.max_eval_samples, seed, per_class=1)
    if "test" in splits:
        sampled["test"] = splits["test"].sample(args.max_test_samples, seed, per_class=1)
    return sampled


def _split(
    source: str, split: str, count: int | None, args: TaskDataArguments, segmentation: bool, seed: int
) -> ImageData:
    """A held-out split; of a streamed data set, `count` rows at random from its shuffled stream."""
    if not args.streaming:
        return _load(source, split, args, segmentation)
    return _beginning(source, split, _open_stream(source, split, args, segmentation, seed), count, args, segmentation)


def _open_stream(
    source: str, split: str, args: TaskDataArguments, segmentation: bool, seed: int
) -> datasets.IterableDataset:
    """A split's rows in random order: data sets are often sorted by class.

    The order depends on the seed, the buffer and the number of the pass (`set_epoch`), so that a resumed run, which
    reads the current pass again up to where it was, gets the very same batches.
    """
    stream = load_images(source, split, args.dataset_config_name, masks=segmentation, streaming=True)
    return undecoded_stream(stream, args.on_error).shuffle(seed=seed, buffer_size=args.shuffle_buffer_size)


def _beginning(
    source: str,
    split: str,
    stream: datasets.IterableDataset,
    count: int | None,
    args: TaskDataArguments,
    segmentation: bool,
) -> ImageData:
    """The first `count` rows of a shuffled stream, in memory; all of them without a count."""
    rows = list(stream.take(count) if count else stream)
    data = _of_rows(rows, stream.features, args, segmentation, f"the stream of {source} ({split})")
    names = (given_mask_classes(args.classes) or load_mask_names(source)) if segmentation else None
    return data.with_mask_classes(MaskClasses.named(names, args.reduce_labels)) if names else data


def _of_rows(
    rows: list[dict[str, Any]],
    features: datasets.Features | None,
    args: TaskDataArguments,
    segmentation: bool,
    name: str = "the stream",
) -> ImageData:
    target = (args.mask_column_name or "mask") if segmentation else _label_column(args)
    if not rows:
        raise ValueError(f"{name} holds no images")
    if missing := [column for column in (args.image_column_name, target) if column not in rows[0]]:
        raise ValueError(f"{name} has no column {missing[0]!r}; it has {', '.join(rows[0])}")
    images, targets = ([row[column] for row in rows] for column in (args.image_column_name, target))
    if segmentation:
        return ImageData(images, masks=targets, reduce_labels=args.reduce_labels, name=name)
    feature = (features or {}).get(target)
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return ImageData(images, targets, names, name=name)


def _check_stream(
    data: ImageData, stream: datasets.IterableDataset, args: TaskDataArguments, segmentation: bool
) -> None:
    """Refuse a stream of unknown classes: its beginning may lack some."""
    if args.max_train_samples is not None:
        logger.warning_once("max_train_samples is not used with --streaming; max_train_steps says how much is read")
    feature = (stream.features or {}).get(_label_column(args))
    boolean = isinstance(feature, datasets.Value) and feature.dtype == "bool"
    if args.classes or data.mask_classes or isinstance(feature, datasets.ClassLabel) or boolean:
        return
    kind = "masks" if segmentation else f"labels ({feature})"
    raise ValueError(
        f"the classes of a stream must be known before it is read, and its {kind} have no names: give --classes with "
        "their names or number, such as --classes 10, or leave --streaming"
    )


def _checked(data: ImageData, segmentation: bool) -> ImageData:
    if segmentation and data.masks is None:
        raise ValueError(f"{data.name} has no masks: name their column with --mask_column_name")
    if not segmentation and data.labels is None:
        raise ValueError(f"{data.name} has no labels: {data.no_labels}; --label_column_name names another column")
    return data
