"""Batches for the task scripts: images, encoded once if possible, with class labels or masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.images import image_pixels
from aselect_hf.data.latent_cache import LatentCache
from aselect_hf.data.masks import resize_mask
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.tasks import Task
from aselect_hf.training.arguments import TaskDataArguments
from aselect_hf.training.latents import cached_inputs
from aselect_hf.training.split_reader import SplitReader
from aselect_hf.training.task_data import TaskData

Batch = dict[str, Any]


class TaskDataset(Dataset):
    """Indices of a split's images, which `collate` turns into batches.

    Args:
        latents: images encoded once; `None` to prepare every image when it is drawn.
        random_flip: also deliver features of mirrored images, see `keep_features`.
        whole_masks: also deliver the masks at their own resolution, for evaluation.

    Attributes:
        tokens: features to deliver instead of inputs, see `keep_features`.
    """

    def __init__(
        self,
        data: ImageData,
        config: NoisyBackboneConfig,
        task: Task,
        latents: LatentCache | None = None,
        random_flip: bool = False,
        whole_masks: bool = False,
    ) -> None:
        self.tokens: np.memmap | None = None
        self.data, self.latents, self.task, self.whole_masks = data, latents, task, whole_masks
        self.random_flip = random_flip
        self.config = config

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        return index

    def __getstate__(self) -> dict[str, Any]:
        """Replace the features by their file: pickling a memory map would copy all of it."""
        file = None if self.tokens is None else self.tokens.filename
        return self.__dict__ | {"tokens": file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        file = state["tokens"]
        self.__dict__ |= state | {"tokens": None if file is None else np.load(file, mmap_mode="r")}

    def collate(self, indices: list[int]) -> Batch:
        """Inputs and `labels` of some items: `(batch,)` classes, or `(batch, side, side)` masks."""
        batch = self._inputs(indices)
        if self.task.dense:
            masks = [self.data.mask(index) for index in indices]
            batch["labels"] = torch.stack([resize_mask(mask, self.config.image_size or 0) for mask in masks])
            if self.whole_masks:
                batch["masks"] = [torch.from_numpy(mask) for mask in masks]
        else:
            assert self.data.labels is not None
            batch["labels"] = torch.from_numpy(self.data.labels[indices])
        return batch

    def _inputs(self, indices: list[int]) -> Batch:
        """The most processed inputs available: features, latents, or pixels."""
        if self.tokens is not None:
            kept = zip(("tokens", "flipped_tokens"), self.tokens, strict=False)
            return {name: torch.from_numpy(tokens[indices]) for name, tokens in kept}
        if self.latents is not None:
            return cached_inputs(self.latents, indices)
        pixels = image_pixels(self.config, whole_image=self.task.whole_image)
        return {"pixel_values": pixels([self.data.decode(index) for index in indices])}


def stream_collate(
    config: NoisyBackboneConfig, args: TaskDataArguments, task: Task, data: TaskData
) -> Callable[[list[dict[str, Any]]], Batch]:
    """Collate rows of a streamed data set, with the classes of its training images."""
    assert data.stream is not None
    classes = data.train.mask_classes if task.dense else data.label_names
    return partial(_collate_rows, config, SplitReader(args, task), data.stream.features, classes)


def _collate_rows(
    config: NoisyBackboneConfig,
    reader: SplitReader,
    features: datasets.Features | None,
    classes: Any,
    rows: list[dict[str, Any]],
) -> Batch:
    data = reader.of_rows(rows, features)
    data = data.with_mask_classes(classes) if reader.task.dense else data.with_classes(classes)
    return TaskDataset(data, config, reader.task).collate(list(range(len(rows))))
