"""Counting floating-point operations of a run, not estimating them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel


def encode_flops(model: ASelectDiTModel) -> float:
    """Operations to encode one image of the trained resolution; 0 in pixel space."""
    if model.vae is None:
        return 0.0
    side = model.config.image_size or 0
    pixels = torch.zeros(1, model.vae.config.in_channels, side, side, device=model.device, dtype=model.vae.dtype)
    with _counter() as counter:
        model.encode(pixels)
    return float(counter.get_total_flops())


def feature_flops(model: ASelectDiTModel, *features: str) -> float:
    """Operations of one run from latents to `features` at the trained resolution (one noise draw)."""
    config = model.config
    latents = torch.zeros(1, config.num_channels, config.sample_size, config.sample_size, device=model.device)
    timesteps = torch.zeros(1, dtype=torch.long, device=model.device)
    with _counter() as counter:
        model.features_of_noisy(latents, timesteps, features)
    return float(counter.get_total_flops())


@contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    """Counts attention as plain matrix products: the counter knows no fused kernel of a CPU, and would leave it out."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield counter
