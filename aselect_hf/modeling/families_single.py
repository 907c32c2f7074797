"""Lumina-Image 2 and Z-Image: image and text are one sequence in all blocks, after a few blocks of their own.

Those blocks, called refiners, prepare image and text and are not counted. Lumina puts the text first, Z-Image the
image.
Both take the share of the data, `1 - sigma`, as time, and predict the data less the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .family import Conditioning, Family, Tap, same, single_stream

DATA_FLOW = {"type": "flow_matching", "model_time": "data_fraction"}


def lumina_inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": time,
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": conditioning["prompt_attention_mask"].long(),
    }


def z_image_inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    """An image is a film of one frame."""
    return {
        "x": list(latents[:, :, None].unbind()),
        "t": time,
        "cap_feats": list(conditioning["prompt_embeds"].unbind()),
    }


def of_one_frame(output: Any, latents: torch.Tensor) -> torch.Tensor:
    return torch.stack(output).squeeze(2)


def z_image_refusal(config: Mapping[str, Any]) -> str:
    if config["siglip_feat_dim"] is not None:
        return "Z-Image Omni also takes images as its condition"
    if 2 not in config["all_patch_size"] or 1 not in config["all_f_patch_size"]:
        return "it has no patches of 2x2 latents of one frame"
    return ""


LUMINA2 = Family(
    transformer_class="Lumina2Transformer2DModel",
    stacks=(
        single_stream(
            "layers", "num_layers", "attn", "feed_forward", Tap("norm1", item=0, joint="last"), "last",
            before=("norm1",), between=("norm2", "ffn_norm1"), after=("ffn_norm2",),
        ),
    ),
    defaults={
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "hidden_size": 2304, "num_layers": 26,
        "num_refiner_layers": 2, "num_attention_heads": 24, "num_kv_heads": 8, "axes_lens": (300, 512, 512),
        "cap_feat_dim": 1024,
    },
    schedule=DATA_FLOW,
    channels=lambda config: config["in_channels"],
    patch=lambda config: config["patch_size"],
    sample_size=lambda config: config["sample_size"],
    max_grid=lambda config: min(config["axes_lens"][1:]),
    conditioning={"prompt_embeds": "cap_feat_dim", "prompt_attention_mask": None},
    text_inputs=("context_refiner", "time_caption_embed.caption_embedder"),
    outputs=("norm_out",),
    inputs=lumina_inputs,
    prediction=same,
    width=lambda config: config["hidden_size"],
    key_width=lambda config: config["hidden_size"] // config["num_attention_heads"] * config["num_kv_heads"],
)  # fmt: skip

Z_IMAGE = Family(
    transformer_class="ZImageTransformer2DModel",
    stacks=(
        single_stream(
            "layers", "n_layers", "attention", "feed_forward", Tap("attention.to_q", side="in", joint="first"), "first",
            before=("attention_norm1", "adaLN_modulation"), between=("attention_norm2", "ffn_norm1"),
            after=("ffn_norm2",),
        ),
    ),
    defaults={
        "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 3840, "n_layers": 30,
        "n_refiner_layers": 2, "n_heads": 30, "cap_feat_dim": 2560, "siglip_feat_dim": None,
        "axes_lens": (1024, 512, 512),
    },
    schedule=DATA_FLOW,
    channels=lambda config: config["in_channels"],
    patch=lambda config: 2,
    sample_size=lambda config: 128,
    max_grid=lambda config: min(config["axes_lens"][1:]),
    conditioning={"prompt_embeds": "cap_feat_dim"},
    text_inputs=("context_refiner", "cap_embedder"),
    outputs=("all_final_layer",),
    inputs=z_image_inputs,
    prediction=of_one_frame,
    refusal=z_image_refusal,
    width=lambda config: config["dim"],
    heads=lambda config: config["n_heads"],
)  # fmt: skip

__all__ = ["LUMINA2", "Z_IMAGE"]
