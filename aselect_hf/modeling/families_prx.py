"""PRX: image tokens attend to themselves and to the text, which all blocks read as it is.

One layer computes query, key and value of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .family import SIGMA_FLOW, Conditioning, Family, Stack, Tap, pass_one, same

QKV = "attention.img_qkv_proj"
BLOCKS = Stack(
    blocks="blocks",
    depth="depth",
    taps={
        "attention_norm": Tap(QKV, side="in"),
        "query": Tap(QKV, part=(0, 3)),
        "key": Tap(QKV, part=(1, 3)),
        "value": Tap(QKV, part=(2, 3)),
        "attention": Tap("attention.to_out.0"),
        "mlp_norm": Tap("gate_proj", side="in"),
        "mlp": Tap("down_proj"),
        "hidden": Tap(""),
    },
    parts={
        "attention_norm": ("modulation",),
        "query": (QKV,),
        "key": (QKV,),
        "value": (QKV,),
        "attention": (
            *("attention.norm_q", "attention.norm_k", "attention.txt_kv_proj", "attention.norm_added_k"),
            "attention.to_out",
        ),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    },
    text=(),
    skip=pass_one,
)


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
        "attention_mask": conditioning["prompt_attention_mask"].bool(),
        "timestep": time,
    }


def sample_size(config: Mapping[str, Any]) -> int:
    """Side of 512 pixels in latents of AutoencoderDC (patches of 1), of a KL autoencoder (2), or in pixels."""
    return {1: 16, 2: 64}.get(config["patch_size"], 512)


PRX = Family(
    transformer_class="PRXTransformer2DModel",
    stacks=(BLOCKS,),
    defaults={
        "in_channels": 16, "patch_size": 2, "context_in_dim": 2304, "hidden_size": 1792, "num_heads": 28, "depth": 16,
    },
    schedule=SIGMA_FLOW,
    channels=lambda config: config["in_channels"],
    patch=lambda config: config["patch_size"],
    sample_size=sample_size,
    max_grid=lambda config: None,
    conditioning={"prompt_embeds": "context_in_dim", "prompt_attention_mask": None},
    text_inputs=("txt_in",),
    outputs=("final_layer",),
    inputs=inputs,
    prediction=same,
    width=lambda config: config["hidden_size"],
    heads=lambda config: config["num_heads"],
    diffusers="0.39.0",  # the first that tells PRX-7B the resolution
)  # fmt: skip

__all__ = ["PRX"]
