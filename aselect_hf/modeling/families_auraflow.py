"""AuraFlow: blocks of two streams, then blocks of one, in which the text comes first, after 8 learned tokens.

Positions are a learned square table, of which images read the middle.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from .family import SIGMA_FLOW, Conditioning, Family, Tap, dual_stream, same, single_stream

SINGLE = single_stream(
    "single_transformer_blocks", "num_single_dit_layers", "attn", "ff", Tap("norm1", item=0, joint="last"), "last",
    before=("norm1",),
)  # fmt: skip


def inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "encoder_hidden_states": conditioning["prompt_embeds"],  # zeros where there is no text, instead of a mask
        "timestep": time,
    }


AURAFLOW = Family(
    transformer_class="AuraFlowTransformer2DModel",
    stacks=(
        dataclasses.replace(dual_stream(), blocks="joint_transformer_blocks", depth="num_mmdit_layers"),
        SINGLE,
    ),
    defaults={
        "sample_size": 64, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 4, "num_single_dit_layers": 32,
        "attention_head_dim": 256, "num_attention_heads": 12, "joint_attention_dim": 2048, "pos_embed_max_size": 1024,
    },
    schedule=SIGMA_FLOW,
    channels=lambda config: config["in_channels"],
    patch=lambda config: config["patch_size"],
    sample_size=lambda config: config["sample_size"],
    max_grid=lambda config: math.isqrt(config["pos_embed_max_size"]),
    conditioning={"prompt_embeds": "joint_attention_dim"},
    text_inputs=("context_embedder",),
    outputs=("norm_out", "proj_out"),
    inputs=inputs,
    prediction=same,
)  # fmt: skip

__all__ = ["AURAFLOW"]
