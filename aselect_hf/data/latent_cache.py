"""The DiT's inputs for a data set (VAE latents or pixels): encoded once, kept on disk, read in any order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from aselect_hf.data.fingerprint import fingerprint
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.shards import ShardStore
from aselect_hf.files import as_path
from aselect_hf.modeling.image_processing_aselect_dit import make_image_processor
from aselect_hf.modeling.noisy_backbone import NoisyBackbone

DEFAULT_CACHE = Path(HF_HOME) / "aselect" / "latents"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
SHARD_IMAGES, SHARD_BYTES = 1024, 2**27  # whichever is less, because a shard is filled in memory
DECODER = ("decoder.", "post_quant_conv.")


@dataclass(eq=False)
class LatentCache(ShardStore, Dataset):
    """Latents of a data set on disk, in the order of its images; made by `cached_latents`.

    It is a `Dataset` of `(num_channels, height, width)` float32 tensors. Files are opened at their first read and never
    loaded whole. Pickling (to workers of a `DataLoader`) transfers no values. The contents are `mean`, `log_variance`,
    and either with `_flipped`.

    Args:
        shape: `(num_channels, height, width)` of each.
        pixel_space: whether the model has no VAE. Values are then pixels, and mirrored images need no storage.
    """

    shape: tuple[int, int, int]
    pixel_space: bool
    _open: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict, repr=False)

    what = "latents"

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> torch.Tensor:
        """The posterior mean as `model.encode` returns it, `(num_channels, height, width)`, float32."""
        return self.gather([index])[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def gather(self, indices: Sequence[int], flipped: Sequence[bool] | None = None) -> torch.Tensor:
        """Posterior means of any images in any order, `(batch, num_channels, height, width)`, float32.

        Args:
            flipped: for each index, whether to read the latents of the mirrored image.

        Raises:
            IndexError: an index is not in `0..num_images - 1`.
            ValueError: the length of `flipped` differs from that of `indices`, or mirrored images were not encoded.
            OSError: a shard was deleted or damaged after the cache was made.
        """
        return self._gather("mean", indices, flipped)

    def log_variance(self, indices: Sequence[int], flipped: Sequence[bool] | None = None) -> torch.Tensor:
        """Log-variances of the posteriors whose means `gather` returns, with the same shape, scaling and errors.

        `mean + (log_variance / 2).exp() * noise` is a sample of the VAE's posterior and can serve as augmentation.
        """
        return self._gather("log_variance", indices, flipped)

    def _gather(self, content: str, indices: Sequence[int], flipped: Sequence[bool] | None) -> torch.Tensor:
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_images:
            raise IndexError(f"indices must be in 0..{self.num_images - 1}, got {rows.min()}..{rows.max()}")
        if flipped is None:
            return self._read(content, rows)
        mirrored = np.asarray(flipped, dtype=bool).reshape(-1)
        if len(mirrored) != len(rows):
            raise ValueError(f"flipped must hold one value per index, got {len(mirrored)} for {len(rows)} indices")
        values = torch.empty(len(rows), *self.shape)
        values[~mirrored] = self._read(content, rows[~mirrored])
        if self.pixel_space:
            values[mirrored] = self._read(content, rows[mirrored]).flip(-1)
        elif mirrored.any():
            values[mirrored] = self._read(f"{content}_flipped", rows[mirrored])
        return values

    def _read(self, content: str, rows: np.ndarray) -> torch.Tensor:
        if content not in self.contents:
            options = [name for name in ("log_variance", "flipped") if name in content]
            raise ValueError(f"{content} is not stored: call cached_latents with {' and '.join(options)}")
        values = torch.empty(len(rows), *self.shape)
        shards, within = np.divmod(rows, self.shard_size)
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            values[here] = self._values(content, int(shard))[within[here]].float()
        return values

    def _values(self, content: str, shard: int) -> torch.Tensor:
        """Memory map of a shard."""
        if (content, shard) not in self._open:
            try:
                self._open[content, shard] = self.open_shard(content, shard)[0]
            except (SafetensorError, ValueError, OSError) as error:
                file = self.shard_file(content, shard)
                raise OSError(f"{file} is missing or damaged ({error}): call cached_latents again") from error
        return self._open[content, shard]

    def shard_shape(self, shard: int) -> tuple[int, ...]:
        return len(self.shard_images(shard)), *self.shape


def cached_latents(
    model: NoisyBackbone,
    data: ImageData,
    *,
    flipped: bool = False,
    log_variance: bool = False,
    whole_image: bool = False,
    batch_size: int = 64,
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> LatentCache:
    """Cache the DiT's inputs for all images on disk: encode those that are missing, and return a reader.

    The folder under `cache_dir` is named by a hash of images, preprocessing, `dtype` and the VAE's encoder. All DiTs on
    the same VAE share it. Any number of processes may call this function at once: each encodes shards that no other
    process works on, and all return when every shard is complete. A killed run leaves whole shards, and the next run
    encodes the rest. This call verifies every shard's checksum, once per process; reads check header, size and shape.

    Args:
        flipped: also encode the mirrored images. In pixel space nothing is stored for them: mirroring is exact.
        log_variance: also store the log-variance of the VAE's posterior.
        whole_image: resize the whole image instead of cropping its center, see `make_image_processor`.
        dtype: dtype on disk, `"float32"` or `"float16"` (half the size).
        cache_dir: parent of the cache folder (default: `HF_HOME/aselect/latents`).
        num_workers: processes that decode images while others are encoded (0: decode in this process).

    Raises:
        ValueError: `dtype` is unknown, the model has no log-variance, images differ in size, latents are not finite, or
            the folder is not writable or has too little space left.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if log_variance and not model.has_posterior:
        found = "no VAE" if model.vae is None else f"an {type(model.vae).__name__}"
        raise ValueError(f"log_variance needs a model with an AutoencoderKL, but this one has {found}")
    contents = ["mean", "log_variance"] if log_variance else ["mean"]
    if flipped and model.vae is not None:
        contents += [f"{content}_flipped" for content in contents]
    shape = latent_shape(model, data)
    shard_size = max(1, min(SHARD_IMAGES, SHARD_BYTES // (int(np.prod(shape)) * DTYPES[dtype].itemsize)))
    cache = LatentCache(
        folder=as_path(cache_dir or DEFAULT_CACHE) / cache_key(model, data, dtype, shard_size, whole_image),
        num_images=len(data),
        shape=shape,
        dtype=DTYPES[dtype],
        shard_size=shard_size,
        contents=tuple(contents),
        pixel_space=model.vae is None,
    )

    def batches(images: range) -> Iterator[torch.Tensor]:
        some = data.subset(images)
        return some.batches(model.config, batch_size, whole_image=whole_image, num_workers=num_workers)

    with cache.progress_bar(f"latents of {data.name}", progress) as bar:
        cache.fill(partial(_encode_shard, cache, model, batches, bar))
    return cache


def latent_shape(model: NoisyBackbone, data: ImageData) -> tuple[int, int, int]:
    """`(num_channels, height, width)` of the DiT's inputs; tensors keep their size, images get the model's."""
    first, config = data.decode(0), model.config
    sides = first.shape[-2:] if isinstance(first, torch.Tensor) else (config.image_size or 0,) * 2
    return config.num_channels, sides[0] // config.vae_downsampling, sides[1] // config.vae_downsampling


def cache_key(model: NoisyBackbone, data: ImageData, dtype: str, shard_size: int, whole_image: bool) -> str:
    """Hash of everything the stored values depend on."""
    images = not isinstance(data.decode(0), torch.Tensor)
    choices: dict[str, Any] = {
        "data": data.fingerprint,
        "preprocessing": make_image_processor(model.config, whole_image).to_dict() if images else None,
        "dtype": dtype,
        "shard_size": shard_size,
    }
    if model.vae is None:
        return fingerprint({}, choices)
    choices["vae"] = {name: value for name, value in model.vae.config.items() if not name.startswith("_")}
    choices["vae_class"] = type(model.vae).__name__
    weights = {name: x for name, x in model.vae.state_dict().items() if not name.startswith(DECODER)}
    return fingerprint(weights, choices)


@torch.no_grad()
def _encode_shard(
    cache: LatentCache,
    model: NoisyBackbone,
    batches: Callable[[range], Iterator[torch.Tensor]],
    bar: tqdm,
    shard: int,
    contents: list[str],
) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """The given contents of one shard, computed together."""
    started, start = time.perf_counter(), 0
    shard_values = {content: torch.empty(cache.shard_shape(shard), dtype=cache.dtype) for content in contents}
    for pixel_values in batches(cache.shard_images(shard)):
        rows = slice(start, start + len(pixel_values))
        start = rows.stop
        for suffix in ("", "_flipped"):
            if not any(f"{kind}{suffix}" in contents for kind in ("mean", "log_variance")):
                continue
            pixels = (pixel_values.flip(-1) if suffix else pixel_values).to(model.device)
            for kind, values in zip(("mean", "log_variance"), model.encode_posterior(pixels), strict=True):
                if values is not None and f"{kind}{suffix}" in contents:
                    shard_values[f"{kind}{suffix}"][rows] = _stored(values, cache)
        bar.update(len(pixel_values))
    yield shard_values, time.perf_counter() - started


def _stored(values: torch.Tensor, cache: LatentCache) -> torch.Tensor:
    """Convert values to the dtype on disk, after checking their shape and range."""
    if tuple(values.shape[1:]) != cache.shape:
        raise ValueError(f"all images must be as large as the first: {tuple(values.shape[1:])} is not {cache.shape}")
    stored = values.to("cpu", cache.dtype)
    if not stored.isfinite().all():
        raise ValueError(f"dtype 'float16' cannot hold latents as large as {values.abs().max():.3g}: use 'float32'")
    return stored
