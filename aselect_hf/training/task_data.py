"""The splits of one run of a task script, with labels or masks of the same classes."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
from transformers.utils import logging

from aselect_hf.data.classes import is_labeled, present_names
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import DEFAULT_CACHE
from aselect_hf.data.splits import share_classes, share_mask_classes, split_train_validation
from aselect_hf.tasks import Task
from aselect_hf.training.arguments import TaskDataArguments
from aselect_hf.training.split_reader import SplitReader, given_classes

logger = logging.get_logger(__name__)


@dataclass
class TaskData:
    """The splits of one run. With a `stream`, `train` holds its first images, to choose the timestep on."""

    train: ImageData
    validation: ImageData
    test: ImageData | None
    stream: datasets.IterableDataset | None
    label_names: list[str]

    def describe(self) -> str:
        train = "streamed" if self.stream is not None else f"{len(self.train):,}"
        test = f", {len(self.test):,} test" if self.test is not None else ""
        return f"images: {train} train, {len(self.validation):,} validation{test}; {len(self.label_names)} classes"


def load_task_data(args: TaskDataArguments, task: Task, seed: int) -> TaskData:
    """Training, validation and (if requested) test images, with labels or masks of the same classes.

    Classes are those of all training images, before a sample is taken.

    Raises:
        ValueError: no data, no labels, or a split with a class that the training images do not have.
    """
    reader, stream = SplitReader(args, task, seed), None
    if not reader.source:
        raise ValueError("give --dataset_name or --train_dir")
    if args.streaming:
        if not (args.validation_dir or args.validation_split):
            raise ValueError("streaming needs --validation_split or --validation_dir: a stream cannot be split")
        stream = reader.open_stream(args.train_split)
        train = reader.beginning(args.train_split, stream, args.num_streamed_images)
        _check_stream(train, stream, reader)
    else:
        train = reader.read(args.train_split)
    splits = {"training": train} | reader.held_out()
    splits = _with_masks(splits, args, seed) if task.dense else _with_labels(splits, args, seed)
    train = splits["training"]
    names = (train.mask_names or []) if task.dense else train.class_names
    present = names if task.dense or args.streaming else present_names(train.labels, names)
    if len(present) < 2:
        raise ValueError(f"the training images have {len(present)} class(es); at least 2 are needed")
    if stream is not None and not task.dense:
        stream = stream.filter(is_labeled, input_columns=[reader.label_column])
    return TaskData(train, splits["validation"], splits.get("test"), stream, names)


def _with_labels(splits: dict[str, ImageData], args: TaskDataArguments, seed: int) -> dict[str, ImageData]:
    return _sampled(share_classes(splits, given_classes(args.classes), whole=not args.streaming), args, seed)


def _with_masks(splits: dict[str, ImageData], args: TaskDataArguments, seed: int) -> dict[str, ImageData]:
    cache_dir = (args.latents_dir or DEFAULT_CACHE) if args.cache_latents else None
    training = splits["training"].with_known_mask_classes(progress=True, cache_dir=cache_dir)
    splits = _sampled(splits | {"training": training}, args, seed)
    return share_mask_classes(splits, cache_dir=cache_dir, whole=not args.streaming)


def _sampled(splits: dict[str, ImageData], args: TaskDataArguments, seed: int) -> dict[str, ImageData]:
    """Random samples of the requested sizes. Without validation images, some training images are held out."""
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


def _check_stream(data: ImageData, stream: datasets.IterableDataset, reader: SplitReader) -> None:
    """Refuse a stream of unknown classes, since its beginning may lack some."""
    if reader.args.max_train_samples is not None:
        logger.warning_once("max_train_samples is ignored with --streaming; max_train_steps limits what is read")
    feature = (stream.features or {}).get(reader.label_column)
    boolean = isinstance(feature, datasets.Value) and feature.dtype == "bool"
    if reader.args.classes or data.mask_classes or isinstance(feature, datasets.ClassLabel) or boolean:
        return
    kind = "masks" if reader.task.dense else f"labels ({feature})"
    raise ValueError(
        f"the classes of a stream must be known before it is read, but its {kind} have no names: give --classes with "
        "their names or number, such as --classes 10, or do not use --streaming"
    )
