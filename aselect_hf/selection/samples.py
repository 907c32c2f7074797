"""The images that a rule is given: as many as it uses, with the labels or masks that it needs."""

from __future__ import annotations

import numpy as np
import torch

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.splits import share_classes, share_mask_classes
from aselect_hf.tasks import CLASSIFICATION, SEGMENTATION, Task, find_task

LEAST_PER_CLASS = 2
"""Images of a class that a leave-one-out probe needs. A random sample holds as many of every class if it can."""


def resolve_task(images: ImageData, task: str | None) -> Task:
    """The task of this name (default: segmentation if the images have masks, else classification)."""
    if task is not None:
        return find_task(task)
    return CLASSIFICATION if images.masks is None else SEGMENTATION


def check_truth(data: ImageData, task: Task, purpose: str) -> None:
    """Refuse images without the labels or masks of a task.

    Args:
        purpose: beginning of the message, which says what needs them.
    """
    if task.needs == "labels" and data.labels is None:
        raise ValueError(f"{purpose} labels; {data.name} has none: {data.no_labels}")
    if task.needs == "masks" and data.masks is None:
        raise ValueError(f"{purpose} masks; {data.name} has none")


def sample_for(
    task: Task | None, data: ImageData, held_out: ImageData | None, num_images: int | None, seed: int, on_error: str
) -> tuple[ImageData, ImageData | None]:
    """A random sample for a task, and the held-out images; the classes of both are matched if the task needs them."""
    splits = {"training": data} | ({"validation": held_out} if held_out is not None else {})
    needs = None if task is None else task.needs
    if needs == "labels" and all(each.labels is not None for each in splits.values()):
        splits = share_classes(splits)
    per_class = LEAST_PER_CLASS if needs == "labels" else 0
    splits["training"] = splits["training"].sample(num_images, seed, per_class=per_class)
    splits = {name: each.readable(on_error) for name, each in splits.items()}
    if needs == "masks" and all(each.masks is not None for each in splits.values()):
        splits = share_mask_classes(splits)
    return splits["training"], splits.get("validation")


def refuse_copies(data: ImageData) -> None:
    """Refuse several images that are all the same, because they cannot tell one timestep from another.

    Raises:
        ValueError: all are the same. Decoding stops at the first image that differs.
    """
    if len(data) < 2:
        return
    first = data.decode(0)
    equal = torch.equal if isinstance(first, torch.Tensor) else np.array_equal
    if all(equal(first, data.decode(index)) for index in range(1, len(data))):
        raise ValueError(
            f"no timestep can be chosen: all {len(data)} images of {data.name} are the same; "
            "give different images, or set the timestep with method 'fixed'"
        )
