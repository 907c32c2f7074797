"""Floating-point operations, counted during a run rather than estimated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from aselect_hf.modeling.noisy_backbone import NoisyBackbone


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""The CPU's own attention kernel, which torch's counter does not count."""


@torch.no_grad()
def count_flops(run: Callable[[], Any]) -> float:
    """Count the operations (two per multiply-add) of matrix products, convolutions and attention in `run`."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return float(counter.get_total_flops())


def encode_flops(model: NoisyBackbone) -> float:
    """Operations to encode one image at the trained resolution; 0 in pixel space."""
    if model.vae is None:
        return 0.0
    side = model.config.image_size or 0
    pixels = torch.zeros(1, model.config.image_channels, side, side, device=model.device, dtype=model.vae.dtype)
    return count_flops(lambda: model.encode(pixels))


def feature_flops(model: NoisyBackbone, *features: str) -> float:
    """Operations of one run (one noise draw) from latents to `features` at the trained resolution."""
    config = model.config
    latents = torch.zeros(1, config.num_channels, config.sample_size, config.sample_size, device=model.device)
    timesteps = torch.zeros(1, dtype=torch.long, device=model.device)
    return count_flops(lambda: model.features_of_noisy(latents, timesteps, features))


def sweep_flops(model: NoisyBackbone, num_images: int, num_passes: int, *features: str) -> float:
    """Operations to encode images, each once, and to run them to `features` in all passes together."""
    return num_images * encode_flops(model) + num_passes * feature_flops(model, *features)


def weight_bytes(model: torch.nn.Module) -> int:
    """Size in bytes of a model's weights in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
