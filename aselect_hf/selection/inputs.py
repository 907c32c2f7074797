"""The inputs of every rule."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import LatentCache, cached_latents, latent_shape
from aselect_hf.modeling.noisy_backbone import NoisyBackbone

DEFAULT_BATCH_SIZE = 64


@dataclass
class SelectionInputs:
    """A checked request for a timestep.

    Args:
        model: the backbone, in eval mode.
        images: the images to choose on, already sampled, with labels or masks if the rule needs them.
        validation: images with labels or masks for `"grid"`; `None` to hold out some of `images`.
        feature: resolved name, `blocks.<i>.<kind>`; or `auto`, for rules that choose it.
        timesteps: candidates, ascending.
        seed: seed of every random draw.
        batch_size: forward passes per batch; `None` for the rule's own choice.
        cache_dir: folder for features and VAE latents; `None` for the default.
        num_timesteps_to_fuse: timesteps to choose at most, see `fusing.fuse`.
    """

    model: NoisyBackbone
    images: ImageData
    validation: ImageData | None
    feature: str
    timesteps: list[int]
    seed: int = 0
    batch_size: int | None = None
    cache_dir: str | Path | None = None
    progress: bool = True
    num_timesteps_to_fuse: int = 1

    @property
    def fixed_batch_size(self) -> int:
        """`batch_size`, or 64."""
        return self.batch_size or DEFAULT_BATCH_SIZE

    def check_finite(self, values: torch.Tensor | np.ndarray, feature: str = "") -> None:
        """Refuse features, or values computed from them, that hold NaN or infinite values.

        Raises:
            ValueError: they do; the message names the feature.
        """
        if not (values.isfinite() if isinstance(values, torch.Tensor) else np.isfinite(values)).all():
            dtype = str(self.model.dtype).removeprefix("torch.")
            raise ValueError(
                f"{feature or self.feature} holds NaN or infinite values in {dtype}: "
                "check the images and the weights" + ("" if dtype == "float32" else ", or load the model in float32")
            )

    def latents(
        self,
        data: ImageData,
        rows: Sequence[int] | None = None,
        *,
        whole_image: bool = False,
        deviations: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, float]:
        """The network's clean input for images. A VAE's latents are cached under `cache_dir/latents`.

        Args:
            rows: which images (default: all). The cache holds all, and processes with one `cache_dir` fill it together.
            deviations: standard normal, of the shape of the result: samples of the VAE's posterior instead of its mean.
                Without effect in pixel space and with an `AutoencoderTiny` or `AutoencoderDC`, where nothing is random.

        Returns:
            `(rows, channels, height, width)` float32 on the CPU, and the seconds that encoding takes; with a VAE, that
            of all of `data`.
        """
        model, batch_size = self.model, self.fixed_batch_size
        rows = range(len(data)) if rows is None else rows
        if model.vae is None:
            started = time.perf_counter()
            if not len(rows):
                return torch.empty(0, *latent_shape(model, data)), 0.0
            some = data if len(rows) == len(data) else data.subset(rows)
            batches = some.batches(model.config, batch_size, whole_image=whole_image)
            parts = [model.prepare_latents(pixels.to(model.device)).float().cpu() for pixels in batches]
            return torch.cat(parts), time.perf_counter() - started
        if not model.has_posterior:
            deviations = None
        cache = self.latent_cache(data, whole_image=whole_image, log_variance=deviations is not None)
        latents = cache.gather(rows).float()
        if deviations is not None:
            latents += (cache.log_variance(rows).float() / 2).exp() * deviations
        return latents, cache.seconds

    def latent_cache(self, data: ImageData, *, whole_image: bool = False, log_variance: bool = False) -> LatentCache:
        """A VAE's latents of all images, cached under `cache_dir/latents`."""
        return cached_latents(
            self.model,
            data,
            whole_image=whole_image,
            log_variance=log_variance,
            batch_size=self.fixed_batch_size,
            cache_dir=Path(self.cache_dir) / "latents" if self.cache_dir else None,
            progress=self.progress,
        )
