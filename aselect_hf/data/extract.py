"""Features of a small set of images in one safetensors file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from aselect_hf.data.feature_rows import FeatureRows
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
    output_format: str = "pooled",
    dtype: str = "float32",
    batch_size: int = 64,
    progress: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Write features of all images to a safetensors file, whole or not at all; all of them are held in memory.

    The file holds one tensor per feature, by the name that was given: `(images, timesteps, width)` of pooled features,
    `(images, timesteps, tokens, width)`, or `(images, timesteps, channels, height, width)` of maps; `rows`, the number
    of each image in the data; and `labels`, -1 for an image without a label. Its metadata hold JSON: `ids` of the
    images and `label_names` (null where labels are integers of the data set's own), and `record`, which says how the
    values were computed.

    Args:
        features, timesteps, output_format, dtype, batch_size: see `feature_set.write_feature_set`, for large sets.

    Returns:
        The shape of every tensor, by name.

    Raises:
        ValueError: an argument is wrong, an image cannot be read, or the disk has less room than the features need.
    """
    rows = FeatureRows.of(model, images, features, timesteps, output_format, dtype, batch_size)
    names = list(features or rows.features)
    ids: list[str] = []
    numbers: list[int] = []
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in rows.columns}
    with contextlib.ExitStack() as room:
        batches = tqdm(
            rows.batches(range(len(images))), total=-(-len(images) // batch_size), unit="batch", disable=not progress
        )
        for batch in batches:
            if not ids:
                needed = len(images) * rows.bytes_per_image
                room.enter_context(reserved_space(as_path(output).parent, needed, "these features"))
            ids += batch.ids
            numbers += batch.rows
            for name, vectors in batch.vectors.items():
                parts[name].append(torch.from_numpy(vectors))
    tensors = {
        name: torch.stack([torch.cat(parts[column]) for column in rows.columns_of(name)], dim=1) for name in names
    }
    tensors["rows"] = torch.tensor(numbers)
    metadata = {"ids": json.dumps(ids), "record": json.dumps(rows.describe())}
    if images.labels is not None:
        tensors["labels"] = torch.from_numpy(images.labels)
        metadata["label_names"] = json.dumps(images.label_names)
    with atomic_file(output) as temporary:
        save_file(tensors, temporary, metadata)
    return {name: tuple(value.shape) for name, value in tensors.items()}
