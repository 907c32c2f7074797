"""One line for every family gives it the whole contract suite: a tiny model, built anew at every call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from aselect_hf import ASelectDiTConfig, ASelectDiTModel

from .tiny_transformers import TINY, tiny_model
from .toy_family import ToyConfig, ToyModel

DIT: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_ratio": 2, "sample_size": 8,
    "num_condition_classes": 5, "timestep": 100,
}  # fmt: skip
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "latent_channels": 4, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1, "sample_size": 16, "scaling_factor": 0.2, "shift_factor": 0.1,
}  # fmt: skip

FAMILIES: dict[str, Callable[[], Any]] = {
    "dit, pixels": lambda: ASelectDiTModel(ASelectDiTConfig(**DIT, num_channels=2)),
    "dit, latents": lambda: ASelectDiTModel(ASelectDiTConfig(**DIT, vae_config=VAE, num_noise_draws=2)),
    "dit, flow, gray": lambda: ASelectDiTModel(
        ASelectDiTConfig(**DIT, num_channels=1, noise_schedule={"type": "flow_matching"}, per_block_conditioning=True)
    ),
    "toy": lambda: ToyModel(ToyConfig(timestep=100, num_noise_draws=2, feature="blocks.1.attention")),
    **{name: functools.partial(tiny_model, name) for name in TINY},
    "SD3, first blocks": lambda: tiny_model("SD3", kept_blocks=2, vae_config=VAE, num_noise_draws=2),
}
