"""One tiny configuration for every family of diffusers' transformers, and models of it with random weights."""

from __future__ import annotations

from typing import Any

import torch

from aselect_hf import ASelectDiffusionConfig, ASelectDiffusionModel

SD3: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10,
    "pos_embed_max_size": 6,
}  # fmt: skip
SD3_TEXT = {"prompt_embeds": [5, 12], "pooled_prompt_embeds": [10]}

TINY: dict[str, dict[str, Any]] = {
    "SD3": {"transformer_class": "SD3Transformer2DModel", "transformer_config": SD3, "conditioning": SD3_TEXT},
    "SD3.5": {
        "transformer_class": "SD3Transformer2DModel",
        "transformer_config": SD3 | {"dual_attention_layers": [0, 1], "qk_norm": "rms_norm"},
        "conditioning": SD3_TEXT,
    },
}
"""Arguments of `ASelectDiffusionConfig` by the name of a family."""


def tiny_config(family: str, **fields: Any) -> ASelectDiffusionConfig:
    return ASelectDiffusionConfig(**(TINY[family] | {"timestep": 100} | fields))


def store_prompt(model: Any) -> Any:
    """Give a model a random prompt, the same at every call."""
    generator = torch.Generator().manual_seed(11)
    shapes = model.base_model.config.conditioning
    model.base_model.set_conditioning({name: torch.randn(shapes[name], generator=generator) for name in shapes})
    return model


def tiny_model(family: str, **fields: Any) -> ASelectDiffusionModel:
    """A model of three blocks or so, with a random prompt and the weights that diffusers starts with."""
    return store_prompt(ASelectDiffusionModel(tiny_config(family, **fields)))
