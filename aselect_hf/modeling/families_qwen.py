"""Qwen-Image: blocks of two streams. Latents are packed: 2 x 2 of them are one token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from .families_flux import FLUX, pack
from .family import Conditioning, Stack, Tap, dual_stream

DUAL = dual_stream()
BLOCKS: Stack = dataclasses.replace(
    DUAL,
    taps={
        **DUAL.taps,
        "attention_norm": Tap("attn.to_q", side="in"),
        "mlp_norm": Tap("img_mlp", side="in"),
        "mlp": Tap("img_mlp"),
    },
    parts={
        **DUAL.parts,
        "attention_norm": ("img_mod",),
        "attention": ("txt_mod", *(name for name in DUAL.parts["attention"] if name != "norm1_context")),
        "mlp": ("img_mlp",),
    },
    text=("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp"),
)


def inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    """No token is masked: the prompt is stored alone, without padding."""
    batch, _, height, width = latents.shape
    return {
        "hidden_states": pack(latents),
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "timestep": time,
        "img_shapes": [[(1, height // 2, width // 2)]] * batch,
    }


def refusal(config: Mapping[str, Any]) -> str:
    if config["use_layer3d_rope"] or config["use_additional_t_cond"]:
        return "Qwen-Image Layered makes several layers of one image"
    if config["zero_cond_t"]:
        return "Qwen-Image Edit also takes images as its condition"
    if config["guidance_embeds"]:
        return "diffusers cannot run Qwen-Image with guidance_embeds"
    if config["patch_size"] != 2 or 4 * config["out_channels"] != config["in_channels"]:
        return "its patches are not those of 2x2 latents"
    return ""


QWEN_IMAGE = dataclasses.replace(
    FLUX,
    transformer_class="QwenImageTransformer2DModel",
    stacks=(BLOCKS,),
    defaults={
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 3584, "guidance_embeds": False, "zero_cond_t": False,
        "use_additional_t_cond": False, "use_layer3d_rope": False,
    },
    conditioning={"prompt_embeds": "joint_attention_dim"},
    text_inputs=("txt_norm", "txt_in"),
    inputs=inputs,
    guided=lambda config: False,
    refusal=refusal,
    diffusers="0.39.0",
)  # fmt: skip

__all__ = ["QWEN_IMAGE"]
