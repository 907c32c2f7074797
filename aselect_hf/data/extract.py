"""Features of images, written to a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from aselect_hf.data.image_data import ImageData
from aselect_hf.files import as_path, atomic_file, reserved_space
from aselect_hf.modeling.noisy_backbone import NoisyBackbone


def write_features(
    model: NoisyBackbone,
    images: ImageData,
    output: str | Path,
    *,
    features: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    pool: bool = True,
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Write features of all images to a safetensors file, whole or not at all.

    The file holds one tensor per feature, `(images, timesteps, width)` or, without `pool`,
    `(images, timesteps, tokens, width)`; and `labels`, -1 for an image without a label. Its metadata hold the names of
    the classes as JSON, `label_names`: null where labels are integers of the data set's own.

    Args:
        features: names, as `blocks.4.query` (default: the model's own).
        timesteps: in this order (default: the model's own).
        pool: whether to average over tokens.
        batch_size: images per batch.

    Returns:
        The shape of every tensor, by name.

    Raises:
        ValueError: an unknown feature or timestep, or less room on the disk than the features need.
    """
    parts: dict[str, list[torch.Tensor]] = {}
    batches = images.batches(model.config, batch_size)
    with contextlib.ExitStack() as room:
        for batch in tqdm(batches, total=-(-len(images) // batch_size), unit="batch", disable=not progress):
            extracted = model.extract_features(
                batch.to(model.device),
                features=features,
                timesteps=timesteps,
                output_format="pooled" if pool else "tokens",
            )
            if not parts:
                needed = len(images) * sum(value[0].nbytes for value in extracted.values())
                room.enter_context(reserved_space(as_path(output).parent, needed, "these features"))
            for name, value in extracted.items():
                parts.setdefault(name, []).append(value.cpu())
    tensors = {name: torch.cat(value) for name, value in parts.items()}
    metadata: dict[str, str] = {}
    if images.labels is not None:
        tensors["labels"] = torch.from_numpy(images.labels)
        metadata["label_names"] = json.dumps(images.label_names)
    with atomic_file(output) as temporary:
        save_file(tensors, temporary, metadata)
    return {name: tuple(value.shape) for name, value in tensors.items()}
