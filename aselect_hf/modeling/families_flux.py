"""FLUX.1 and Chroma: blocks of two streams, then blocks of one, in which the text comes first.

Latents are packed: 2 x 2 latents are one token. In a block of one stream, attention and MLP share their output
projection, so `attention` is the heads' output before it, and there are no features of the MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from .family import SIGMA_FLOW, Conditioning, Family, Stack, Tap, dual_stream, pass_both, pass_one

SINGLE = Stack(
    blocks="single_transformer_blocks",
    depth="num_single_layers",
    taps={
        "attention_norm": Tap("norm", item=0, joint="last"),
        "query": Tap("attn.to_q", joint="last"),
        "key": Tap("attn.to_k", joint="last"),
        "value": Tap("attn.to_v", joint="last"),
        "attention": Tap("attn", joint="last"),
        "hidden": Tap("", item=1),
    },
    parts={
        "attention_norm": ("norm",),
        "query": ("attn.to_q",),
        "key": ("attn.to_k",),
        "value": ("attn.to_v",),
        "attention": ("attn.norm_q", "attn.norm_k"),
        "hidden": ("proj_mlp", "proj_out"),
    },
    text=(),
    skip=pass_both,
)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """`(batch, channels, height, width)` to `(batch, tokens, 4 * channels)`."""
    batch, channels, height, width = latents.shape
    blocks = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`, to the height and width of `latents`."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    blocks = tokens.view(tokens.shape[0], rows, columns, tokens.shape[-1] // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def position_ids(latents: torch.Tensor) -> torch.Tensor:
    """`(tokens, 3)`: zero, row and column of every token."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    ids = torch.zeros(rows, columns, 3, device=latents.device, dtype=latents.dtype)
    ids[..., 1] += torch.arange(rows, device=latents.device, dtype=latents.dtype)[:, None]
    ids[..., 2] += torch.arange(columns, device=latents.device, dtype=latents.dtype)
    return ids.flatten(0, 1)


def joint_inputs(latents: torch.Tensor, time: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
    text = conditioning["prompt_embeds"]
    return {
        "hidden_states": pack(latents),
        "encoder_hidden_states": text,
        "timestep": time,
        "img_ids": position_ids(latents),
        "txt_ids": torch.zeros(text.shape[1], 3, device=latents.device, dtype=latents.dtype),
    }


def flux_inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    found = joint_inputs(latents, time, conditioning)
    found["pooled_projections"] = conditioning["pooled_prompt_embeds"]
    if guidance is not None:
        found["guidance"] = torch.full((latents.shape[0],), float(guidance), device=latents.device)
    return found


def chroma_inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    found = joint_inputs(latents, time, conditioning)
    mask = conditioning["prompt_attention_mask"].bool()
    tokens = found["hidden_states"].shape[1]
    found["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], tokens)], dim=1)
    return found


FLUX = Family(
    transformer_class="FluxTransformer2DModel",
    stacks=(dual_stream(), SINGLE),
    defaults={
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": False,
    },
    schedule=SIGMA_FLOW,
    channels=lambda config: config["in_channels"] // 4,
    patch=lambda config: 2,
    sample_size=lambda config: 128,
    max_grid=lambda config: None,
    conditioning={"prompt_embeds": "joint_attention_dim", "pooled_prompt_embeds": "pooled_projection_dim"},
    text_inputs=("context_embedder",),
    outputs=("norm_out", "proj_out"),
    inputs=flux_inputs,
    prediction=unpack,
    guided=lambda config: config["guidance_embeds"],
)  # fmt: skip

CHROMA = dataclasses.replace(
    FLUX,
    transformer_class="ChromaTransformer2DModel",
    stacks=(
        dual_stream(),
        dataclasses.replace(SINGLE, taps={**SINGLE.taps, "hidden": Tap("", joint="last")}, skip=pass_one),
    ),
    defaults={
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096,
    },
    conditioning={"prompt_embeds": "joint_attention_dim", "prompt_attention_mask": None},
    inputs=chroma_inputs,
    guided=lambda config: False,
    checkpointing=False,  # diffusers 0.42 then leaves the mask out of the blocks of one stream
)  # fmt: skip

__all__ = ["CHROMA", "FLUX"]
