"""Tokens as samples, for rules that learn from masks."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
from tqdm.auto import tqdm

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.masks import resize_mask, token_labels
from aselect_hf.modeling.image_processing_aselect_dit import IGNORED
from aselect_hf.selection.inputs import SelectionInputs


class ChosenTokens(NamedTuple):
    """The images to use, and for each token its index over these images (see `token_features`), class and image."""

    data: ImageData
    tokens: np.ndarray
    labels: np.ndarray
    images: np.ndarray


def choose_tokens(inputs: SelectionInputs, data: ImageData, max_tokens: int) -> ChosenTokens:
    """At most `max_tokens` random tokens that are not ignored; images without such tokens are left out.

    Raises:
        ValueError: all tokens are ignored, or `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    config = inputs.model.config
    rows = tqdm(range(len(data)), desc=f"masks of {data.name}", unit="image", disable=not inputs.progress)
    masks = (resize_mask(data.mask(row), cast(int, config.image_size)).numpy() for row in rows)
    labels = np.concatenate([token_labels(mask, config.grid_size) for mask in masks])
    chosen = np.flatnonzero(labels != IGNORED)
    if len(chosen) > max_tokens:
        chosen = np.sort(np.random.default_rng(inputs.seed).permutation(chosen)[:max_tokens])
    if not len(chosen):
        raise ValueError(f"all pixels of {data.name} are ignored")
    used, images = np.unique(chosen // config.num_patches, return_inverse=True)
    tokens = images * config.num_patches + chosen % config.num_patches
    return ChosenTokens(data if len(used) == len(data) else data.subset(used), tokens, labels[chosen], images)
