"""Labeled rows for rules that learn from a few labels. A row is an image or a token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from aselect_hf.data.classes import has_classes
from aselect_hf.data.feature_cache import KeptRows, pooled_rows, token_rows
from aselect_hf.data.image_data import ImageData
from aselect_hf.selection.feature_sweep import Views, stored_noise_view
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.samples import check_truth, resolve_task
from aselect_hf.selection.scoring import LEAST_IMAGES, check_count
from aselect_hf.selection.tokens import choose_tokens


@dataclass
class LabeledRows:
    """The labeled rows of a task.

    Args:
        data: the images of the rows.
        labels: `(rows,)`.
        images: `(rows,)`, the image of each token; `None` if rows are images.
        options: for the record of the selection.
    """

    inputs: SelectionInputs
    data: ImageData
    rows: KeptRows
    labels: np.ndarray
    images: np.ndarray | None
    options: dict[str, Any]

    @cached_property
    def views(self) -> Views:
        """The images, in memory."""
        return stored_noise_view(self.inputs, self.data, whole_image=self.rows.whole_image)


def labeled_rows(name: str, inputs: SelectionInputs, task: str | None, pool_size: int, max_tokens: int) -> LabeledRows:
    """The labeled rows of a task, with the stored noise; segmentation reads whole images.

    Args:
        name: name of the rule, for messages.

    Raises:
        ValueError: fewer than 3 images, no labels or masks, or fewer than 2 classes with 2 images each.
    """
    check_count(name, inputs)
    learned, model, data = resolve_task(inputs.images, task), inputs.model, inputs.images
    check_truth(data, learned, f"{name} needs a few")
    options: dict[str, Any] = {"task": learned.name}
    if not learned.dense:
        labels, images = np.asarray(data.labels), None
        if not has_classes(labels):
            raise ValueError(
                f"{name} needs at least 2 classes with 2 images each; {data.name} has fewer "
                f"({data.describe_classes()}): label more images, or choose a rule without labels"
            )
        rows = pooled_rows(model, len(data), pool_size)
        options["pool_size"] = pool_size
    else:
        chosen = choose_tokens(inputs, data, max_tokens)
        data, labels, images = chosen.data, chosen.labels, chosen.images
        if len(np.unique(labels)) < 2 or len(data) < LEAST_IMAGES:
            raise ValueError(f"{name} needs tokens of 2 classes in {LEAST_IMAGES} images; {data.name} has fewer")
        rows = token_rows(model, data, chosen.tokens)
        options["tokens"] = len(labels)
    return LabeledRows(inputs, data, rows, labels, images, options)
