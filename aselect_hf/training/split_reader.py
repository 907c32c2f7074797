"""Splits of a data set for a task: read at once, or from the beginning of a stream."""

from __future__ import annotations

from typing import Any

import datasets

from aselect_hf.data.image_data import LABEL_COLUMN, ImageData
from aselect_hf.data.images import undecoded_stream
from aselect_hf.data.masks import MaskClasses
from aselect_hf.data.sources import load_images, load_mask_names
from aselect_hf.tasks import Task
from aselect_hf.training.arguments import TaskDataArguments


class SplitReader:
    """Reads images with the labels or masks that a task needs; `seed` is that of a stream's order."""

    def __init__(self, args: TaskDataArguments, task: Task, seed: int = 0) -> None:
        self.args, self.task, self.seed = args, task, seed
        self.source = args.train_dir or args.dataset_name or ""
        self.label_column = args.label_column_name or LABEL_COLUMN

    def read(self, split: str | None, source: str | None = None) -> ImageData:
        """All images of a split of `source` (default: the source of the training images).

        Raises:
            ValueError: the images have no labels, or no masks.
        """
        args, source = self.args, source or self.source
        target: dict[str, Any] = {"label_column": args.label_column_name}
        if self.task.dense:
            target = {"mask_column": args.mask_column_name, "reduce_labels": args.reduce_labels}
            target["mask_names"] = given_mask_classes(args.classes)
        data = ImageData.of(
            source,
            split=split,
            config_name=args.dataset_config_name,
            name=f"{source} ({split})" if split else source,
            masks=self.task.dense,
            image_column=args.image_column_name,
            **target,
        ).readable(args.on_error)
        if self.task.dense and data.masks is None:
            raise ValueError(f"{data.name} has no masks: name their column with --mask_column_name")
        if not self.task.dense and data.labels is None:
            raise ValueError(f"{data.name} has no labels: {data.no_labels}; set --label_column_name")
        return data

    def held_out(self) -> dict[str, ImageData]:
        """Validation and test images, if requested."""
        args, splits = self.args, {}
        if args.validation_dir:
            splits["validation"] = self.read(None, args.validation_dir)
        elif args.validation_split:
            splits["validation"] = self._held_out(args.validation_split, args.max_eval_samples)
        if args.test_split:
            splits["test"] = self._held_out(args.test_split, args.max_test_samples)
        return splits

    def open_stream(self, split: str) -> datasets.IterableDataset:
        """A split's rows in random order, since data sets are often sorted by class.

        The order depends only on the seed, the buffer and the pass (`set_epoch`), so a resumed run gets the same rows.
        """
        args = self.args
        stream = load_images(self.source, split, args.dataset_config_name, masks=self.task.dense, streaming=True)
        return undecoded_stream(stream, args.on_error).shuffle(seed=self.seed, buffer_size=args.shuffle_buffer_size)

    def beginning(self, split: str, stream: datasets.IterableDataset, count: int | None) -> ImageData:
        """The first `count` rows of a shuffled stream, in memory; all of them without a count."""
        rows = list(stream.take(count) if count else stream)
        data = self.of_rows(rows, stream.features, f"the stream of {self.source} ({split})")
        names = (given_mask_classes(self.args.classes) or load_mask_names(self.source)) if self.task.dense else None
        return data.with_mask_classes(MaskClasses.named(names, self.args.reduce_labels)) if names else data

    def of_rows(
        self, rows: list[dict[str, Any]], features: datasets.Features | None, name: str = "the stream"
    ) -> ImageData:
        """Rows of a stream as images, with the target that the task needs.

        Raises:
            ValueError: there are none, or a column is missing.
        """
        args = self.args
        target = (args.mask_column_name or "mask") if self.task.dense else self.label_column
        if not rows:
            raise ValueError(f"{name} holds no images")
        if missing := [column for column in (args.image_column_name, target) if column not in rows[0]]:
            raise ValueError(f"{name} has no column {missing[0]!r}; it has {', '.join(rows[0])}")
        images, targets = ([row[column] for row in rows] for column in (args.image_column_name, target))
        if self.task.dense:
            return ImageData(images, masks=targets, reduce_labels=args.reduce_labels, name=name)
        feature = (features or {}).get(target)
        names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        return ImageData(images, targets, names, name=name)

    def _held_out(self, split: str, count: int | None) -> ImageData:
        """A held-out split; of a streamed data set, `count` rows at random from its shuffled stream."""
        if not self.args.streaming:
            return self.read(split)
        return self.beginning(split, self.open_stream(split), count)


def given_classes(values: list[str] | None) -> list[str] | None:
    """Class names from `--classes`: those given, or the numbers below a count."""
    if values is not None and len(values) == 1 and values[0].isdecimal():
        return [str(number) for number in range(int(values[0]))]
    return values


def given_mask_classes(values: list[str] | None) -> list[str] | dict[int, str] | None:
    """Classes of masks from `--classes`: as `given_classes`, or names by pixel value."""
    pairs = [value.partition("=") for value in values or []]
    if pairs and all(number.isdecimal() and equals for number, equals, _ in pairs):
        return {int(number): name for number, _, name in pairs}
    return given_classes(values)
