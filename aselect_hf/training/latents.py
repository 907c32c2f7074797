"""Clean latents of a training batch: encoded once or in every step, of half the images mirrored, and sampled.

A VAE's latents are drawn from its posterior in every step, as DiT trains (Peebles and Xie 2023, `train.py`). The draws
belong to the images' places in the epoch, so a cache changes neither them nor the exactness of a resumed run.
"""

from __future__ import annotations

from typing import Any

import torch

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import LatentCache, cached_latents
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.training.arguments import DataArguments
from aselect_hf.training.draws import SampleDraws


def encode_once(
    model: NoisyBackbone,
    data: ImageData,
    args: DataArguments,
    batch_size: int,
    *,
    flipped: bool,
    sampled: bool,
    whole_image: bool = False,
) -> LatentCache | None:
    """Latents of every image, cached on disk; `None` without `cache_latents`.

    Args:
        flipped: also encode the mirrored images: a mirrored latent is not the latent of the mirrored image.
        sampled: also store the log-variance of the posterior, if the VAE has one.

    Raises:
        ValueError: the disk has no room, see `cached_latents`.
    """
    if not args.cache_latents:
        return None
    return cached_latents(
        model,
        data,
        flipped=flipped,
        log_variance=sampled and model.has_posterior,
        whole_image=whole_image,
        batch_size=batch_size,
        cache_dir=args.latents_dir,
        num_workers=args.dataloader_num_workers,
    )


def cached_inputs(cache: LatentCache, indices: list[int]) -> dict[str, torch.Tensor]:
    """All that a cache stores of some images, as `clean_latents` reads it: each `(batch, channels, height, width)`."""
    batch = {}
    for prefix, flipped in (("", False), ("flipped_", True)):
        suffix = "_flipped" if flipped else ""
        if f"mean{suffix}" in cache.contents:
            batch[f"{prefix}latents"] = cache.gather(indices, [flipped] * len(indices))
        if f"log_variance{suffix}" in cache.contents:
            batch[f"{prefix}log_variance"] = cache.log_variance(indices, [flipped] * len(indices))
    return batch


@torch.no_grad()
def clean_latents(
    model: NoisyBackbone, batch: dict[str, Any], draws: SampleDraws, flip: torch.Tensor | None, sampled: bool
) -> torch.Tensor:
    """What the network sees of a batch's images before noise is added, `(batch, channels, height, width)` float32.

    Args:
        batch: `pixel_values`, or `latents` with what else `cached_inputs` returns.
        flip: `(batch,)`, which images to mirror (default: none).
        sampled: draw from the VAE's posterior, if it is known, instead of taking its mean.
    """
    log_variance = None
    if "latents" in batch:
        latents = model.prepare_latents(latents=some_mirrored(batch, "latents", flip))
        if "log_variance" in batch:
            log_variance = some_mirrored(batch, "log_variance", flip)
    else:
        latents, log_variance = model.encode_posterior(some_mirrored(batch, "pixel_values", flip))
    latents = latents.float()
    if log_variance is None or not sampled:
        return latents
    return latents + (log_variance / 2).exp() * draws.normal(*latents.shape[1:]).to(latents)


def some_mirrored(batch: dict[str, Any], name: str, flip: torch.Tensor | None) -> torch.Tensor:
    """The inputs called `name`, those of the images in `flip` `(batch,)` mirrored."""
    if flip is None:
        return batch[name]
    return torch.where(flip[:, None, None, None], mirrored(batch, name), batch[name])


def mirrored(batch: dict[str, Any], name: str) -> torch.Tensor:
    """Inputs of mirrored images: stored separately if mirroring the inputs does not give them."""
    return batch[f"flipped_{name}"] if f"flipped_{name}" in batch else batch[name].flip(-1)
