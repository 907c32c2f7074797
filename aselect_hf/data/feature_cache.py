"""Features of a data set at many timesteps, pooled or per token: computed once, memory-mapped, resumable."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from torch.nn.functional import adaptive_avg_pool2d
from tqdm.auto import tqdm

from aselect_hf.cost import sweep_flops
from aselect_hf.data.fingerprint import fingerprint
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import cached_latents, latent_shape
from aselect_hf.data.shards import ShardStore
from aselect_hf.files import as_path
from aselect_hf.modeling.features import tokens_to_map
from aselect_hf.modeling.noisy_backbone import NoisyBackbone

_Read = Callable[[range], tuple[Iterator[torch.Tensor], float]]
"""Batches of the network's inputs for some images, and the seconds that encoding them took."""

DEFAULT_CACHE = Path(HF_HOME) / "aselect" / "features"
SHARD_IMAGES, MOST_SHARDS = 256, 128
"""A shard has at least this many images, and there are at most this many shards, unless they would be too large."""
INPUT_BYTES, VALUE_BYTES = 2**28, 2**26
"""Most bytes of a shard's inputs and of its values at one timestep, because memory holds both."""


@dataclass
class CachedFeatures:
    """Features of a data set.

    Args:
        values: one `(rows, columns)` float32 array per timestep: memory-mapped, or read at every access if the set is
            stored in several shards.
        forward_passes, seconds, flops: cost of computing them, now or in an earlier run.
    """

    values: Sequence[np.ndarray]
    forward_passes: int
    seconds: float
    flops: float


@dataclass
class KeptRows:
    """Which rows a cache file keeps of the tokens.

    Args:
        description: identifies the choice in the cache key.
        first_rows: `(images + 1,)`, the first row of every image, then the number of rows.
        cells: number of features side by side in every row.
        rows_of: computes the rows of a batch from its tokens `(batch, tokens, width)`, their grid and its first image.
        whole_image: whether to read the whole image instead of its center, see `image_pixels`.
    """

    description: str
    first_rows: np.ndarray
    cells: int
    rows_of: Callable[[torch.Tensor, tuple[int, int], int], torch.Tensor]
    whole_image: bool = False


def pooled_features(
    model: NoisyBackbone,
    data: ImageData,
    timesteps: list[int],
    feature: str,
    *,
    pool_size: int = 1,
    batch_size: int = 64,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> CachedFeatures:
    """Compute a spatially pooled feature of every image at every timestep, with the model's stored evaluation noise.

    Each image has one row of `pool_size^2 * width` columns. With `pool_size` 1 the row is the mean over all tokens, the
    usual protocol. With 2 it holds the mean of each quarter of the image, 4 times as wide, and keeps coarse positions.
    Results are cached under `cache_dir`, one file per timestep and shard of images (see `ShardStore`), in a folder
    named by a hash of weights, images, preprocessing and feature. Any number of processes may call this function at
    once: each computes shards that no other works on, and all return when every shard is complete. After an
    interruption, the next run keeps all finished files. Checksums are verified once per process; damaged files are
    reported and computed again. Latents are in `cache_dir/latents`.

    Raises:
        ValueError: `cache_dir` is not writable or has too little space left, or the features are not finite.
    """
    kept = pooled_rows(model, len(data), pool_size)
    return _cached(model, data, timesteps, feature, kept, batch_size, cache_dir, progress)


def token_features(
    model: NoisyBackbone,
    data: ImageData,
    timesteps: list[int],
    feature: str,
    *,
    tokens: np.ndarray,
    batch_size: int = 64,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> CachedFeatures:
    """Compute a feature of chosen tokens at every timestep, from whole images as for segmentation.

    Results have one row per token and are cached as by `pooled_features`.

    Args:
        tokens: ascending indices of tokens in the data set: token `k` of image `i` is `i * num_patches + k`, row-major
            on the patch grid of the trained resolution.
    """
    kept = token_rows(model, data, tokens)
    return _cached(model, data, timesteps, feature, kept, batch_size, cache_dir, progress)


def pooled_rows(model: NoisyBackbone, num_images: int, pool_size: int) -> KeptRows:
    """One row per image, see `pooled_features`."""
    if not 1 <= pool_size <= min(model.config.grid_size):
        raise ValueError(f"pool_size must be in 1..{min(model.config.grid_size)} (the patch grid), got {pool_size}")

    def pool(tokens: torch.Tensor, grid_size: tuple[int, int], first: int) -> torch.Tensor:
        return adaptive_avg_pool2d(tokens_to_map(tokens, grid_size), pool_size).flatten(1)

    return KeptRows(f"pooled {pool_size}", np.arange(num_images + 1), pool_size**2, pool)


def token_rows(model: NoisyBackbone, data: ImageData, tokens: np.ndarray) -> KeptRows:
    """One row per token, see `token_features`."""
    per_image = model.config.num_patches
    first_rows = np.searchsorted(tokens, per_image * np.arange(len(data) + 1))

    def pick(batch: torch.Tensor, grid_size: tuple[int, int], first: int) -> torch.Tensor:
        if grid_size != model.config.grid_size:
            raise ValueError(
                f"images of {data.name} have {grid_size} patches instead of {model.config.grid_size}: tokens are "
                f"chosen on the patch grid of the trained resolution, {model.config.image_size} pixels"
            )
        rows = tokens[first_rows[first] : first_rows[first + len(batch)]] - first * per_image
        return batch.flatten(0, 1)[torch.from_numpy(rows).to(batch.device)]

    description = f"tokens {hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int64).tobytes()).hexdigest()}"
    return KeptRows(description, first_rows, 1, pick, whole_image=True)


@dataclass(eq=False)
class FeatureShards(ShardStore):
    """Rows of features on disk; a content is what one timestep gives.

    Args:
        first_rows: `(images + 1,)`, see `KeptRows`.
        width: columns of each row.
    """

    first_rows: np.ndarray
    width: int

    what = "features"

    def shard_shape(self, shard: int) -> tuple[int, ...]:
        images = self.shard_images(shard)
        return int(self.first_rows[images.stop] - self.first_rows[images.start]), self.width

    def values(self, content: str) -> np.ndarray:
        """All rows; a memory map if there is one shard only."""
        arrays = [self.open_shard(content, shard)[0].numpy() for shard in range(self.num_shards)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


@dataclass
class _Columns(Sequence[np.ndarray]):
    """The values of each timestep, read at every access."""

    shards: FeatureShards

    def __len__(self) -> int:
        return len(self.shards.contents)

    def __getitem__(self, index: Any) -> Any:
        return self.shards.values(self.shards.contents[index])


def _cached(
    model: NoisyBackbone,
    data: ImageData,
    timesteps: list[int],
    feature: str,
    kept: KeptRows,
    batch_size: int,
    cache_dir: str | Path | None,
    progress: bool,
) -> CachedFeatures:
    width = kept.cells * model.config.feature_width(feature)
    shards = FeatureShards(
        folder=as_path(cache_dir or DEFAULT_CACHE) / cache_key(model, data, feature, kept.description),
        num_images=len(data),
        contents=tuple(f"t{t:05d}" for t in timesteps),
        shard_size=_shard_size(model, data, kept, width),
        dtype=torch.float32,
        first_rows=kept.first_rows,
        width=width,
    )
    latents_dir = as_path(cache_dir) / "latents" if cache_dir else None
    read = partial(_latents, model, data, kept.whole_image, latents_dir, batch_size, progress)
    with shards.progress_bar(f"features of {data.name}", progress, len(timesteps), "pass") as bar:
        shards.fill(partial(_compute, model, feature, kept, read, bar, shards))
    passes = len(timesteps) * len(data) * model.config.num_noise_draws
    return CachedFeatures(
        values=_Columns(shards),
        forward_passes=passes,
        seconds=shards.seconds,
        flops=sweep_flops(model, len(data), passes, feature),
    )


def _shard_size(model: NoisyBackbone, data: ImageData, kept: KeptRows, width: int) -> int:
    """Images per shard; depends on sizes only."""
    inputs = torch.Size(latent_shape(model, data)).numel() * torch.float32.itemsize
    values = -(-int(kept.first_rows[-1]) * width * torch.float32.itemsize // len(data))
    most = min(INPUT_BYTES // inputs, VALUE_BYTES // max(1, values))
    size = max(1, min(most, max(SHARD_IMAGES, -(-len(data) // MOST_SHARDS))))
    shards = -(-len(data) // size)
    return -(-len(data) // shards)  # all about equal, so that processes have equal work


def cache_key(model: NoisyBackbone, data: ImageData, feature: str, kept: str) -> str:
    """Hash of everything the features depend on except the timestep; `kept` is `KeptRows.description`."""
    choices = {"data": data.fingerprint, "feature": feature, "kept": kept} | model.fingerprint_fields()
    if model.config.channel_discard:
        choices["channel_discard"] = model.config.channel_discard
    return fingerprint(model.state_dict(), choices)


def _compute(
    model: NoisyBackbone,
    feature: str,
    kept: KeptRows,
    read: _Read,
    bar: tqdm,
    shards: FeatureShards,
    shard: int,
    contents: list[str],
) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """Rows of a shard, one timestep after another; its inputs are read once."""
    images = shards.shard_images(shard)
    batches, encode_seconds = read(images)
    started = time.perf_counter()
    inputs = [batch.cpu() for batch in batches]
    encode_seconds += time.perf_counter() - started
    for content in contents:
        started, first, rows = time.perf_counter(), images.start, []
        for latents in inputs:
            options: dict[str, Any] = {"features": [feature], "timesteps": [int(content[1:])]}
            tokens = model.extract_features(latents=latents.to(model.device), **options)[feature][:, 0]
            rows.append(kept.rows_of(tokens.float(), model.grid_size(latents), first).cpu())
            first += len(latents)
            bar.update(len(latents))
        yield {content: torch.cat(rows)}, time.perf_counter() - started + encode_seconds / len(contents)


def _latents(
    model: NoisyBackbone,
    data: ImageData,
    whole_image: bool,
    latents_dir: Path | None,
    batch_size: int,
    progress: bool,
    images: range,
) -> tuple[Iterator[torch.Tensor], float]:
    """Batches of the network's inputs for `images`, and the seconds that encoding them took."""
    if model.vae is None:
        some = data if len(images) == len(data) else data.subset(images)
        pixels = some.batches(model.config, batch_size, whole_image=whole_image)
        return (model.prepare_latents(x.to(model.device)) for x in pixels), 0.0
    cache = cached_latents(
        model, data, whole_image=whole_image, batch_size=batch_size, cache_dir=latents_dir, progress=progress
    )
    starts = range(images.start, images.stop, batch_size)
    parts = (range(start, min(start + batch_size, images.stop)) for start in starts)
    return (cache.gather(part).to(model.device) for part in parts), cache.seconds * len(images) / len(data)
