"""Features of a data set at many timesteps, pooled or per token: computed once, memory-mapped, resumable."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from torch.nn.functional import adaptive_avg_pool2d
from tqdm.auto import tqdm
from transformers.utils import logging

from aselect_hf.cost import encode_flops, feature_flops
from aselect_hf.data.feature_file import FeatureFile, GrowingFile
from aselect_hf.data.fingerprint import fingerprint
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import cached_latents
from aselect_hf.data.processes import processes
from aselect_hf.files import (
    as_path,
    check_space,
    check_writable,
    disk_errors,
    read_json,
    reserved_space,
)
from aselect_hf.modeling.features import tokens_to_map
from aselect_hf.modeling.noisy_backbone import NoisyBackbone

logger = logging.get_logger(__name__)

_Read = Callable[[range], tuple[Iterator[torch.Tensor], float]]
"""Batches of the network's inputs for some images, and the seconds that encoding them took."""

DEFAULT_CACHE = Path(HF_HOME) / "aselect" / "features"
MARK_EVERY = 10.0  # seconds between progress marks
PART_IMAGES, MOST_PARTS = 256, 128
"""A larger set is stored in parts of at least this many images, which processes compute side by side."""


@dataclass
class CachedFeatures:
    """Features of a data set.

    Args:
        values: one `(rows, columns)` float32 array per timestep, read-only: memory-mapped, or read at every access if
            the set is stored in parts.
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
    Results are cached under `cache_dir`, one file per timestep and part of the images (see `PART_IMAGES`), in a folder
    named by a hash of weights, images, preprocessing and feature. Any number of processes may call this function at
    once: each computes parts that no other works on, and all return when every part is complete. After an interruption,
    the next run continues after the last finished image. Checksums are verified once per process; damaged files are
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


@dataclass
class _Part:
    """Some images of a set, whose rows have files of their own; `kept` counts rows and images from the part's first."""

    folder: Path
    images: range
    kept: KeptRows
    files: list[FeatureFile]

    def missing(self) -> list[FeatureFile]:
        return [file for file in self.files if not file.is_whole()]

    def bytes_missing(self) -> int:
        """Bytes of the missing files that are not on the disk yet."""
        return sum(file.bytes_missing() for file in self.missing())


class _Joined(Sequence[np.ndarray]):
    """The arrays of each timestep, put together from all parts at every access."""

    def __init__(self, parts: list[_Part]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts[0].files)

    def __getitem__(self, index: Any) -> Any:
        arrays = [np.load(part.files[range(len(self))[index]].path, mmap_mode="r") for part in self.parts]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


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
    folder = as_path(cache_dir or DEFAULT_CACHE) / cache_key(model, data, feature, kept.description)
    parts = _parts(folder, kept, timesteps, kept.cells * model.config.feature_width(feature))
    check_writable(folder / "lock")
    missing = [part for part in parts if part.missing()]
    if missing:
        latents_dir = as_path(cache_dir) / "latents" if cache_dir else None
        read = partial(_latents, model, data, kept.whole_image, latents_dir, batch_size, progress)
        done = len(data) - sum(len(part.images) for part in missing)
        name = f"features of {data.name}"
        with tqdm(total=len(data), initial=done, desc=name, unit="image", disable=not progress) as bar:
            _fill(missing, partial(_compute, model, feature, read, bar), bar)
    passes = len(timesteps) * len(data) * model.config.num_noise_draws
    return CachedFeatures(
        values=_Joined(parts),
        forward_passes=passes,
        seconds=sum(read_json(file.record)["seconds"] for part in parts for file in part.files),
        flops=len(data) * encode_flops(model) + passes * feature_flops(model, feature),
    )


def _parts(folder: Path, kept: KeptRows, timesteps: list[int], width: int) -> list[_Part]:
    """The parts of a set. Their number depends on the number of images alone."""
    images = len(kept.first_rows) - 1
    count, parts = min(MOST_PARTS, -(-images // PART_IMAGES)), []
    for number in range(count):
        own = range(images * number // count, images * (number + 1) // count)
        first_rows = kept.first_rows[own.start : own.stop + 1]
        rows_of = partial(_rows_of_part, kept, own.start)
        rows = replace(kept, first_rows=first_rows - first_rows[0], rows_of=rows_of)
        place = folder if count == 1 else folder / f"part-{number:05d}-of-{count:05d}"
        shape = (int(rows.first_rows[-1]), width)
        files = [FeatureFile(place / f"t{t:05d}.npy", t, shape) for t in timesteps]
        parts.append(_Part(place, own, rows, files))
    return parts


def _rows_of_part(
    kept: KeptRows, start: int, tokens: torch.Tensor, grid_size: tuple[int, int], first: int
) -> torch.Tensor:
    return kept.rows_of(tokens, grid_size, start + first)


def _fill(parts: list[_Part], compute: Callable[[_Part, list[FeatureFile]], None], bar: tqdm) -> None:
    """Compute the missing files, together with other processes that do the same; each begins with parts of its own."""
    here = processes()
    waiting = sorted(range(len(parts)), key=lambda number: (number - here.index) % here.count)
    for part in parts:
        part.folder.mkdir(parents=True, exist_ok=True)
    folder, needed = parts[0].folder.parent, sum(part.bytes_missing() for part in parts)
    with (
        disk_errors(folder),
        reserved_space(folder, needed // here.count, "these features", name="cache_dir") as give_back,
    ):
        for timeout in (0, -1):  # first the parts that nobody works on; then wait for the others, or take over
            for number in list(waiting):
                part = parts[number]
                try:
                    with FileLock(part.folder / "lock", timeout=timeout):
                        give_back(part.bytes_missing())
                        if missing := part.missing():
                            compute(part, missing)
                        else:
                            bar.update(len(part.images))
                except Timeout:
                    continue
                waiting.remove(number)


def cache_key(model: NoisyBackbone, data: ImageData, feature: str, kept: str) -> str:
    """Hash of everything the features depend on except the timestep; `kept` is `KeptRows.description`."""
    choices = {"data": data.fingerprint, "feature": feature, "kept": kept} | model.fingerprint_fields()
    if model.config.channel_discard:
        choices["channel_discard"] = model.config.channel_discard
    return fingerprint(model.state_dict(), choices)


def _compute(
    model: NoisyBackbone, feature: str, read: _Read, bar: tqdm, part: _Part, missing: list[FeatureFile]
) -> None:
    """Fill all missing files of a part together, one batch of images at a time."""
    with _opened_together(missing, part.kept) as growing:
        done = growing[0].images
        batches, encode_seconds = read(range(part.images.start + done, part.images.stop))
        started = last_mark = time.perf_counter()
        bar.update(done)
        for latents in batches:
            for file in growing:  # one timestep at a time, because all tokens of a batch take much memory
                tokens = model.extract_features(latents=latents, features=[feature], timesteps=[file.timestep])[feature]
                rows = part.kept.rows_of(tokens[:, 0].float(), model.grid_size(latents), done)
                file.append(rows.cpu().numpy(), len(latents))
            done += len(latents)
            bar.update(len(latents))
            if time.perf_counter() - last_mark > MARK_EVERY:
                started, last_mark = _share_seconds(growing, started), time.perf_counter()
                for file in growing:
                    file.mark()
        _share_seconds(growing, started - encode_seconds)
        for file in growing:
            file.finish()


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
    if not images:
        return iter(()), 0.0
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


@contextmanager
def _opened_together(missing: list[FeatureFile], kept: KeptRows) -> Iterator[list[GrowingFile]]:
    """Open the missing files at the same image, with space reserved for the rest; mark their progress at the end."""
    folder = missing[0].path.parent
    growing = [GrowingFile(file, kept.first_rows) for file in missing]
    check_space(folder.parent, sum(file.bytes_missing for file in growing), "these features", name="cache_dir")
    done = min(file.images for file in growing)
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(folder))
        for file in growing:
            file.start(done)
            stack.callback(file.close)
        yield growing


def _share_seconds(growing: list[GrowingFile], since: float) -> float:
    """Add an equal share of the time since `since` to every file, and return the current time."""
    now = time.perf_counter()
    for file in growing:
        file.seconds += (now - since) / len(growing)
    return now
