"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .family import FLOW, Conditioning, Family, dual_stream, same


def inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "pooled_projections": conditioning["pooled_prompt_embeds"],
        "timestep": time,
    }


SD3 = Family(
    transformer_class="SD3Transformer2DModel",
    stacks=(dual_stream(extra=("attn2",)),),
    defaults={
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 18, "attention_head_dim": 64,
        "num_attention_heads": 18, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 96, "qk_norm": None, "dual_attention_layers": (),
    },
    schedule=FLOW,
    channels=lambda config: config["in_channels"],
    patch=lambda config: config["patch_size"],
    sample_size=lambda config: config["sample_size"],
    max_grid=lambda config: config["pos_embed_max_size"],
    conditioning={"prompt_embeds": "joint_attention_dim", "pooled_prompt_embeds": "pooled_projection_dim"},
    text_inputs=("context_embedder",),
    outputs=("norm_out", "proj_out"),
    inputs=inputs,
    prediction=same,
    fold="joint",
)  # fmt: skip

__all__ = ["SD3"]
