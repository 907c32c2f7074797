"""PixArt and Sana: the image attends to itself, then to the text by cross-attention (`attn2`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .family import FLOW, PARALLEL, Conditioning, Family, Stack, Tap, pass_one, same


def cross_stream(conv: bool) -> Stack:
    """Blocks of self-attention, cross-attention and MLP, which is a convolution if `conv`."""
    return Stack(
        blocks="transformer_blocks",
        depth="num_layers",
        taps={
            "attention_norm": Tap("attn1", side="in"),
            "query": Tap("attn1.to_q"),
            "key": Tap("attn1.to_k"),
            "value": Tap("attn1.to_v"),
            "attention": Tap("attn1.to_out.0"),
            "mlp_norm": Tap("ff", side="in", map=conv),
            "mlp": Tap("ff", map=conv),
            "hidden": Tap(""),
        },
        parts={
            "query": ("attn1.to_q",),
            "key": ("attn1.to_k",),
            "value": ("attn1.to_v",),
            "attention": ("attn1.norm_q", "attn1.norm_k", "attn1.to_out"),
            "mlp_norm": ("attn2", "norm2"),
            "mlp": ("ff",),
        },
        text=(),
        skip=pass_one,
        before_text=("attention_norm", *PARALLEL, "attention"),
    )


def pixart_inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
    additional = config["use_additional_conditions"]
    if config["sample_size"] == 128 if additional is None else additional:  # PixArt-alpha at 1024 pixels
        height, width = 8 * latents.shape[-2], 8 * latents.shape[-1]
        resolution = torch.tensor([height, width], device=latents.device, dtype=latents.dtype)
        sizes["resolution"] = resolution.repeat(latents.shape[0], 1)
        sizes["aspect_ratio"] = torch.full_like(sizes["resolution"][:, :1], height / width)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": conditioning["prompt_attention_mask"],
        "timestep": time,
        "added_cond_kwargs": sizes,
    }


def sana_inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": conditioning["prompt_attention_mask"],
        "timestep": time * config["timestep_scale"],
    }


PIXART = Family(
    transformer_class="PixArtTransformer2DModel",
    stacks=(cross_stream(conv=False),),
    defaults={
        "sample_size": 128, "patch_size": 2, "in_channels": 4, "num_layers": 28, "attention_head_dim": 72,
        "num_attention_heads": 16, "caption_channels": None, "use_additional_conditions": None,
    },
    schedule={"type": "ddpm"},
    channels=lambda config: config["in_channels"],
    patch=lambda config: config["patch_size"],
    sample_size=lambda config: config["sample_size"],
    max_grid=lambda config: None,
    conditioning={"prompt_embeds": "caption_channels", "prompt_attention_mask": None},
    text_inputs=("caption_projection",),
    outputs=("norm_out", "proj_out"),
    inputs=pixart_inputs,
    prediction=same,
    refusal=lambda config: "" if config["caption_channels"] else "it has no caption_channels",
    fold="cross",
)  # fmt: skip

SANA = Family(
    transformer_class="SanaTransformer2DModel",
    stacks=(cross_stream(conv=True),),
    defaults={
        "sample_size": 32, "patch_size": 1, "in_channels": 32, "num_layers": 20, "attention_head_dim": 32,
        "num_attention_heads": 70, "caption_channels": 2304, "timestep_scale": 1.0, "guidance_embeds": False,
    },
    schedule=FLOW,
    channels=lambda config: config["in_channels"],
    patch=lambda config: config["patch_size"],
    sample_size=lambda config: config["sample_size"],
    max_grid=lambda config: None,
    conditioning={"prompt_embeds": "caption_channels", "prompt_attention_mask": None},
    text_inputs=("caption_projection", "caption_norm"),
    outputs=("norm_out", "proj_out"),
    inputs=sana_inputs,
    prediction=same,
    refusal=lambda config: "Sana-Sprint has another process (TrigFlow)" if config["guidance_embeds"] else "",
    fold="linear_cross",
)  # fmt: skip

__all__ = ["PIXART", "SANA"]
