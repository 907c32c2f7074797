"""Features of a data set at many timesteps, pooled or of chosen tokens: computed once, memory-mapped, resumable."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from torch.nn.functional import adaptive_avg_pool2d
from tqdm.auto import tqdm
from transformers.utils import logging

from aselect_hf.cost import encode_flops, feature_flops
from aselect_hf.data.fingerprint import fingerprint
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import cached_latents
from aselect_hf.files import (
    allocate,
    as_path,
    check_space,
    check_writable,
    digest_once,
    disk_errors,
    read_json,
    sealed,
    sha256_of,
    write_json,
)
from aselect_hf.modeling.features import tokens_to_map
from aselect_hf.modeling.noisy_backbone import NoisyBackbone

logger = logging.get_logger(__name__)

DEFAULT_CACHE = Path(HF_HOME) / "aselect" / "features"
MARK_EVERY = 10.0  # seconds between progress marks
VALUES = np.dtype("<f4")
CHUNK = 2**24
RECORD_BYTES = 2**14
"""Room kept for what stands beside the values."""


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
        cells: features side by side in every row.
        rows_of: the rows of a batch from its tokens `(batch, tokens, width)`, their grid, and its first image.
        segmentation: whether the images are read as for segmentation, see `image_pixels`.
    """

    description: str
    first_rows: np.ndarray
    cells: int
    rows_of: Callable[[torch.Tensor, tuple[int, int], int], torch.Tensor]
    segmentation: bool = False


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
    """`feature` of every image at every timestep, with the model's stored evaluation noise, spatially pooled.

    One row an image, `pool_size^2 * width` columns. `pool_size` 1 is the token mean, the field's usual protocol; 2 is
    the mean of each quarter of the image and so on, which keeps where things are, at 4 times the width.
    Kept under `cache_dir`, one file a timestep, in a folder named by a hash of weights, images, preprocessing and
    feature. An interrupted run leaves its finished images, and the next one goes on after them. Every file has a
    checksum, verified once per process; a damaged file is named and computed again. VAE latents come from
    `cached_latents`, under `cache_dir/latents`.

    Raises:
        ValueError: `cache_dir` cannot be written or has too little space left, or the features are not finite.
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
    """`feature` of some tokens at every timestep, images read whole as for segmentation; cached as `pooled_features`.

    Args:
        tokens: ascending numbers of tokens over the whole data set: token `k` of image `i` is `i * num_patches + k`,
            row-major on the patch grid of the trained resolution. One row each.
    """
    kept = token_rows(model, data, tokens)
    return _cached(model, data, timesteps, feature, kept, batch_size, cache_dir, progress)


def pooled_rows(model: NoisyBackbone, num_images: int, pool_size: int) -> KeptRows:
    """One row an image, see `pooled_features`."""
    if not 1 <= pool_size <= min(model.config.grid_size):
        raise ValueError(f"pool_size must be in 1..{min(model.config.grid_size)} (the patch grid), got {pool_size}")

    def pool(tokens: torch.Tensor, grid_size: tuple[int, int], first: int) -> torch.Tensor:
        return adaptive_avg_pool2d(tokens_to_map(tokens, grid_size), pool_size).flatten(1)

    return KeptRows(f"pooled {pool_size}", np.arange(num_images + 1), pool_size**2, pool)


def token_rows(model: NoisyBackbone, data: ImageData, tokens: np.ndarray) -> KeptRows:
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
    return KeptRows(description, first_rows, 1, pick, segmentation=True)


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
    shape = (int(kept.first_rows[-1]), kept.cells * model.config.feature_width(feature))
    files = {t: _FeatureFile(folder / f"t{t:05d}.npy", t, shape) for t in timesteps}
    check_writable(folder / "lock")
    with FileLock(folder / "lock"):
        if missing := [file for file in files.values() if not file.is_whole()]:
            latents_dir = as_path(cache_dir) / "latents" if cache_dir else None
            _compute(model, data, missing, feature, kept, latents_dir, batch_size, progress)
    passes = len(timesteps) * len(data) * model.config.num_noise_draws
    return CachedFeatures(
        values=[np.load(files[t].path, mmap_mode="r") for t in timesteps],
        forward_passes=passes,
        seconds=sum(read_json(files[t].record)["seconds"] for t in timesteps),
        flops=len(data) * encode_flops(model) + passes * feature_flops(model, feature),
    )


def cache_key(model: NoisyBackbone, data: ImageData, feature: str, kept: str) -> str:
    """Hash of everything the features depend on, but the timestep; `kept` describes what is kept of the tokens."""
    choices = {"data": data.fingerprint, "feature": feature, "kept": kept} | model.fingerprint_fields()
    return fingerprint(model.state_dict(), choices)


def _compute(
    model: NoisyBackbone,
    data: ImageData,
    missing: list[_FeatureFile],
    feature: str,
    kept: KeptRows,
    latents_dir: Path | None,
    batch_size: int,
    progress: bool,
) -> None:
    """Fill the missing files together, batch by batch of images."""
    with _opened_together(missing, kept) as growing:
        done = growing[0].images
        batches, encode_seconds = _latents(model, data, done, kept.segmentation, latents_dir, batch_size, progress)
        started = last_mark = time.perf_counter()
        bar = tqdm(total=len(data), initial=done, desc=f"features of {data.name}", unit="image", disable=not progress)
        for latents in batches:
            for file in growing:  # one timestep at a time: all tokens of a batch are large
                tokens = model.extract_features(latents=latents, features=[feature], timesteps=[file.timestep])[feature]
                rows = kept.rows_of(tokens[:, 0].float(), model.grid_size(latents), done)
                file.append(rows.cpu().numpy(), len(latents))
            done += len(latents)
            bar.update(len(latents))
            if time.perf_counter() - last_mark > MARK_EVERY:
                started, last_mark = _share_seconds(growing, started), time.perf_counter()
                for file in growing:
                    file.mark()
        bar.close()
        _share_seconds(growing, started - encode_seconds)
        for file in growing:
            file.finish()


def _latents(
    model: NoisyBackbone,
    data: ImageData,
    first: int,
    segmentation: bool,
    latents_dir: Path | None,
    batch_size: int,
    progress: bool,
) -> tuple[Iterator[torch.Tensor], float]:
    """Batches of what the network sees of the images from `first` on, and the seconds that their encoding took."""
    if first == len(data):
        return iter(()), 0.0
    if model.vae is None:
        rest = data.subset(range(first, len(data))) if first else data
        pixels = rest.batches(model.config, batch_size, segmentation=segmentation)
        return (model.prepare_latents(x.to(model.device)) for x in pixels), 0.0
    cache = cached_latents(
        model, data, segmentation=segmentation, batch_size=batch_size, cache_dir=latents_dir, progress=progress
    )
    starts = range(first, len(data), batch_size)
    parts = (range(start, min(start + batch_size, len(data))) for start in starts)
    return (cache.gather(part).to(model.device) for part in parts), cache.seconds


@contextmanager
def _opened_together(missing: list[_FeatureFile], kept: KeptRows) -> Iterator[list[_GrowingFile]]:
    """The missing files, all with the same number of finished images and room for the others; marked at the end."""
    folder = missing[0].path.parent
    growing = [_GrowingFile(file, kept.first_rows) for file in missing]
    check_space(folder.parent, sum(file.bytes_missing for file in growing), "these features", name="cache_dir")
    done = min(file.images for file in growing)
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_errors(folder))
        for file in growing:
            file.start(done)
            stack.callback(file.close)
        yield growing


def _share_seconds(growing: list[_GrowingFile], since: float) -> float:
    """Give every file its share of the time since then; returns the present time."""
    now = time.perf_counter()
    for file in growing:
        file.seconds += (now - since) / len(growing)
    return now


@dataclass
class _FeatureFile:
    """Features at one timestep: `t00000.npy`, and beside it `t00000.json` with their seconds and checksum."""

    path: Path
    timestep: int
    shape: tuple[int, int]

    @property
    def record(self) -> Path:
        return self.path.with_suffix(".json")

    def is_whole(self) -> bool:
        """Whether it is there as it was written; what is damaged is named and removed."""
        try:
            record = read_json(self.record)
            digest = digest_once(self.path, lambda: sha256_of(self.path))
            if record == sealed({"seconds": float(record["seconds"])}, digest):
                return True
            problem = "its content does not match its checksum"
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"its record {self.record.name} is unreadable: {error!r}"
        logger.warning("%s is damaged (%s): computing it again", self.path, problem)
        self.record.unlink()
        self.path.unlink(missing_ok=True)
        return False


class _GrowingFile:
    """A feature file on its way: rows are appended, and marks say how many images are finished, with a checksum.

    Args:
        file: what it becomes.
        first_rows: see `KeptRows`.

    Attributes:
        images: how many are finished, now or in an earlier run.
        seconds: what they took.
    """

    def __init__(self, file: _FeatureFile, first_rows: np.ndarray) -> None:
        self.file, self.first_rows, self.timestep = file, first_rows, file.timestep
        self.path, self.mark_path = (file.path.with_suffix(f".partial.{suffix}") for suffix in ("npy", "json"))
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": VALUES.str, "fortran_order": False, "shape": file.shape})
        self.header = header.getvalue()
        self.images, self.seconds = self._found()

    @property
    def bytes_missing(self) -> int:
        return self._size(len(self.first_rows) - 1) - self._size(self.images) + RECORD_BYTES

    def start(self, images: int) -> None:
        """Open it after its first `images`, with room for all of them."""
        self.images, self.digest = images, self._digest(images)
        self.path.touch()
        self.stream = self.path.open("rb+")
        self.stream.truncate(self._size(images) if images else 0)
        allocate(self.stream, self._size(images) + self.bytes_missing)
        self.stream.write(self.header)
        self.stream.seek(self._size(images))

    def append(self, rows: np.ndarray, num_images: int) -> None:
        """The rows of the next images."""
        first, last = self.first_rows[[self.images, self.images + num_images]]
        assert len(rows) == last - first
        content = np.ascontiguousarray(rows, dtype=VALUES).tobytes()
        self.stream.write(content)
        self.digest.update(content)
        self.images += num_images

    def mark(self) -> None:
        """Let a later run go on from here; on a full disk, from the mark before."""
        self._sync()
        record = {"images": self.images, "seconds": self.seconds}
        with contextlib.suppress(OSError):
            write_json(self.mark_path, sealed(record, self.digest.hexdigest()))

    def finish(self) -> None:
        """All images are there."""
        self.stream.truncate()  # gives back what was kept for the record
        self.mark()
        self.stream.close()
        write_json(self.file.record, sealed({"seconds": self.seconds}, self.digest.hexdigest()))
        os.replace(self.path, self.file.path)
        self.mark_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close it, finished or not: what an error or interrupt leaves is marked, and no room is kept for the rest."""
        if self.stream.closed:
            return
        with self.stream, contextlib.suppress(OSError):
            self.stream.truncate(self._size(self.images))
            self.mark()
        if not self.images:
            self.path.unlink()
            self.mark_path.unlink(missing_ok=True)

    def _found(self) -> tuple[int, float]:
        """Images and seconds of an earlier run; what is damaged is named and dropped."""
        try:
            record = read_json(self.mark_path)
            images, seconds = int(record["images"]), float(record["seconds"])
            if record == sealed({"images": images, "seconds": seconds}, self._digest(images).hexdigest()):
                os.truncate(self.path, self._size(images))  # gives back the room that was reserved for the others
                return images, seconds
            problem = "its content does not match its checksum"
        except FileNotFoundError:
            problem = ""
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            problem = f"{self.mark_path.name} is unreadable: {error!r}"
        if problem:
            logger.warning("%s is damaged (%s): computing it again", self.path, problem)
        self.mark_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        return 0, 0.0

    def _size(self, images: int) -> int:
        """Bytes of the file up to the first images."""
        return len(self.header) + VALUES.itemsize * self.file.shape[1] * int(self.first_rows[images])

    def _digest(self, images: int) -> Any:
        """Running checksum of the file's first images."""
        digest = hashlib.sha256(self.header)
        if images:
            with self.path.open("rb") as file:
                file.seek(len(self.header))
                left = self._size(images) - len(self.header)
                while left and (content := file.read(min(left, CHUNK))):
                    digest.update(content)
                    left -= len(content)
        return digest

    def _sync(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
