"""Features of a data set at many timesteps, pooled or of chosen tokens: computed once, memory-mapped, resumable."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from torch.nn.functional import adaptive_avg_pool2d
from tqdm.auto import tqdm

from aselect_hf.cost import encode_flops, feature_flops
from aselect_hf.data import ImageData
from aselect_hf.files import atomic_file, check_writable
from aselect_hf.fingerprint import fingerprint
from aselect_hf.latent_cache import cached_latents
from aselect_hf.modeling.features import tokens_to_map
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel

DEFAULT_CACHE = Path(HF_HOME) / "aselect" / "features"
MARK_EVERY = 10.0  # seconds between progress marks


@dataclass
class CachedFeatures:
    """Features of a data set.

    Args:
        values: one `(rows, columns)` float32 array a timestep, memory-mapped and read-only.
        forward_passes, seconds, flops: what computing them took, whether now or in an earlier run.
    """

    values: list[np.ndarray]
    forward_passes: int
    seconds: float
    flops: float


@dataclass
class KeptRows:
    """What is kept of the tokens, and where.

    Args:
        description: names the choice in the cache's key.
        first_rows: `(images + 1,)`, the first row of every image, and the number of rows.
        columns: of every row.
        rows_of: the rows of a batch from its tokens `(batch, tokens, width)`, their grid, and its first image.
        segmentation: whether the images are read as for segmentation, see `image_pixels`.
    """

    description: str
    first_rows: np.ndarray
    columns: int
    rows_of: Callable[[torch.Tensor, tuple[int, int], int], torch.Tensor]
    segmentation: bool = False


def pooled_features(
    model: ASelectDiTModel,
    data: ImageData,
    timesteps: list[int],
    feature: str,
    *,
    pool_size: int = 1,
    batch_size: int = 64,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> CachedFeatures:
    """`feature` of every image at every timestep, with the model's stored evaluation noise, spatially pooled.

    One row an image, `pool_size^2 * width` columns. `pool_size` 1 is the token mean, the field's usual protocol; 2 is
    the mean of each quarter of the image and so on, which keeps where things are, at 4 times the width.
    Kept under `cache_dir`, one file a timestep, in a folder named by a hash of weights, images, preprocessing and
    feature. An interrupted run leaves its finished images, and the next one goes on after them. VAE latents come from
    `cached_latents`, under `cache_dir/latents`.
    """
    kept = pooled_rows(model, len(data), pool_size)
    return _cached(model, data, timesteps, feature, kept, batch_size, cache_dir, progress)


def token_features(
    model: ASelectDiTModel,
    data: ImageData,
    timesteps: list[int],
    feature: str,
    *,
    tokens: np.ndarray,
    batch_size: int = 64,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> CachedFeatures:
    """`feature` of some tokens at every timestep, images read whole as for segmentation; cached as `pooled_features`.

    Args:
        tokens: ascending numbers of tokens over the whole data set: token `k` of image `i` is `i * num_patches + k`,
            row-major on the patch grid of the trained resolution. One row each.
    """
    kept = token_rows(model, data, tokens)
    return _cached(model, data, timesteps, feature, kept, batch_size, cache_dir, progress)


def pooled_rows(model: ASelectDiTModel, num_images: int, pool_size: int) -> KeptRows:
    """One row an image, see `pooled_features`."""
    if not 1 <= pool_size <= min(model.config.grid_size):
        raise ValueError(f"pool_size must be in 1..{min(model.config.grid_size)} (the patch grid), got {pool_size}")

    def pool(tokens: torch.Tensor, grid_size: tuple[int, int], first: int) -> torch.Tensor:
        return adaptive_avg_pool2d(tokens_to_map(tokens, grid_size), pool_size).flatten(1)

    columns = pool_size**2 * model.config.hidden_size
    return KeptRows(f"pooled {pool_size}", np.arange(num_images + 1), columns, pool)


def token_rows(model: ASelectDiTModel, data: ImageData, tokens: np.ndarray) -> KeptRows:
    """One row a token, see `token_features`."""
    per_image = model.config.num_patches
    first_rows = np.searchsorted(tokens, per_image * np.arange(len(data) + 1))

    def pick(batch: torch.Tensor, grid_size: tuple[int, int], first: int) -> torch.Tensor:
        if grid_size != model.config.grid_size:
            raise ValueError(
                f"tokens are chosen on the patch grid of the trained resolution, {model.config.image_size} pixels; "
                f"{data.name} has images of {grid_size} patches instead of {model.config.grid_size}"
            )
        rows = tokens[first_rows[first] : first_rows[first + len(batch)]] - first * per_image
        return batch.flatten(0, 1)[torch.from_numpy(rows).to(batch.device)]

    description = f"tokens {hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int64).tobytes()).hexdigest()}"
    return KeptRows(description, first_rows, model.config.hidden_size, pick, segmentation=True)


def _cached(
    model: ASelectDiTModel,
    data: ImageData,
    timesteps: list[int],
    feature: str,
    kept: KeptRows,
    batch_size: int,
    cache_dir: str | Path | None,
    progress: bool,
) -> CachedFeatures:
    folder = Path(cache_dir or DEFAULT_CACHE) / cache_key(model, data, feature, kept.description)
    check_writable(folder / "lock")
    with FileLock(folder / "lock"):
        missing = [t for t in timesteps if not _record_file(folder, t).is_file()]
        if missing:
            latents_dir = Path(cache_dir) / "latents" if cache_dir else None
            _compute(model, data, missing, feature, kept, folder, latents_dir, batch_size, progress)
    records = [json.loads(_record_file(folder, t).read_text()) for t in timesteps]
    passes = len(timesteps) * len(data) * model.config.num_noise_draws
    return CachedFeatures(
        values=[np.load(_values_file(folder, t), mmap_mode="r") for t in timesteps],
        forward_passes=passes,
        seconds=sum(record["seconds"] for record in records),
        flops=len(data) * encode_flops(model) + passes * feature_flops(model, feature),
    )


def cache_key(model: ASelectDiTModel, data: ImageData, feature: str, kept: str) -> str:
    """Hash of everything the features depend on, but the timestep; `kept` describes what is kept of the tokens."""
    config = model.config
    choices = {
        "data": data.fingerprint,
        "feature": feature,
        "kept": kept,
        "sizes": [config.num_attention_heads, config.patch_size, config.image_size, config.timestep_freq_shift],
        "numerics": [config.hidden_act, config.mlp_norm_eps, config.noise_seed],
        "schedule": config.noise_schedule,
        "vae": config.vae_config,
    }
    return fingerprint(model.state_dict(), choices)


def _compute(
    model: ASelectDiTModel,
    data: ImageData,
    timesteps: list[int],
    feature: str,
    kept: KeptRows,
    folder: Path,
    latents_dir: Path | None,
    batch_size: int,
    progress: bool,
) -> None:
    """Fill one array for all `timesteps`, batch by batch of images, then split it into one file each."""
    name = hashlib.sha256(str(timesteps).encode()).hexdigest()[:8]
    partial, mark = folder / f"partial-{name}.npy", folder / f"partial-{name}.json"
    done, seconds = 0, 0.0
    if partial.is_file() and mark.is_file():
        record = json.loads(mark.read_text())
        done, seconds = record["images"], record["seconds"]
        store = np.load(partial, mmap_mode="r+")
    else:
        shape = (len(timesteps), int(kept.first_rows[-1]), kept.columns)
        store = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    if model.vae is None:
        rest = data.subset(range(done, len(data))) if done else data
        pixels = rest.batches(model.config, batch_size, segmentation=kept.segmentation)
        batches = (model.prepare_latents(x.to(model.device)) for x in pixels)
        encode_seconds = 0.0
    else:
        cache = cached_latents(
            model, data, segmentation=kept.segmentation, batch_size=batch_size, cache_dir=latents_dir, progress=progress
        )
        starts = range(done, len(data), batch_size)
        batches = (cache.gather(range(i, min(i + batch_size, len(data)))).to(model.device) for i in starts)
        encode_seconds = cache.seconds
    started = last_mark = time.perf_counter()
    bar = tqdm(total=len(data), initial=done, desc=f"features of {data.name}", unit="image", disable=not progress)
    for latents in batches:
        rows = slice(*kept.first_rows[[done, done + len(latents)]])
        for values, t in zip(store, timesteps, strict=True):  # one at a time: all tokens of a batch are large
            tokens = model.extract_features(latents=latents, features=[feature], timesteps=[t])[feature][:, 0]
            values[rows] = kept.rows_of(tokens.float(), model.grid_size(latents), done).cpu()
        done += len(latents)
        bar.update(len(latents))
        if time.perf_counter() - last_mark > MARK_EVERY:
            last_mark = time.perf_counter()
            store.flush()
            _write_json(mark, {"images": done, "seconds": seconds + last_mark - started})
    bar.close()
    seconds += time.perf_counter() - started + encode_seconds
    for t, values in zip(timesteps, store, strict=True):
        with atomic_file(_values_file(folder, t)) as temporary:
            np.save(temporary, values)
        _write_json(_record_file(folder, t), {"seconds": seconds / len(timesteps)})
    partial.unlink()
    mark.unlink(missing_ok=True)


def _values_file(folder: Path, timestep: int) -> Path:
    return folder / f"t{timestep:05d}.npy"


def _record_file(folder: Path, timestep: int) -> Path:
    return folder / f"t{timestep:05d}.json"


def _write_json(path: Path, record: dict[str, float]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record))
