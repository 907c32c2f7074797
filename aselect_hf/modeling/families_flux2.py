"""FLUX.2: the blocks of FLUX.1 with modulation shared by all blocks, and positions of four axes.

The autoencoder packs 2 x 2 latents into one (see `vae.py`), so a token is one latent. In a block of one stream, one
layer computes query, key, value and the input of the MLP, and another the outputs of attention and MLP together. Such a
block therefore has neither `attention` nor features of the MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from .families_flux import FLUX
from .family import Conditioning, Stack, Tap, dual_stream, pass_one

DUAL = dual_stream()
FUSED = "attn.to_qkv_mlp_proj"
FUSED_PARTS = 9
"""Query, key and value, and the two halves of the input of an MLP that is 3 times as wide."""
SINGLE = Stack(
    blocks="single_transformer_blocks",
    depth="num_single_layers",
    taps={
        "attention_norm": Tap(FUSED, side="in", joint="last"),
        "query": Tap(FUSED, part=(0, FUSED_PARTS), joint="last"),
        "key": Tap(FUSED, part=(1, FUSED_PARTS), joint="last"),
        "value": Tap(FUSED, part=(2, FUSED_PARTS), joint="last"),
        "hidden": Tap("", joint="last"),
    },
    parts={
        "query": (FUSED,),
        "key": (FUSED,),
        "value": (FUSED,),
        "hidden": ("attn.norm_q", "attn.norm_k", "attn.to_out"),
    },
    text=(),
    skip=pass_one,
)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """`(batch, channels, height, width)` to `(batch, tokens, channels)`."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`, to the height and width of `latents`."""
    return tokens.transpose(1, 2).reshape(latents.shape)


def positions(batch: int, sizes: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
    """`(batch, tokens, 4)`: time, row, column and place in the text of every token."""
    ids = torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
    return ids.expand(batch, -1, -1)


def inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    text = conditioning["prompt_embeds"]
    batch, _, height, width = latents.shape
    found = {
        "hidden_states": pack(latents),
        "encoder_hidden_states": text,
        "timestep": time,
        "img_ids": positions(batch, (1, height, width, 1), latents.device),
        "txt_ids": positions(batch, (1, 1, 1, text.shape[1]), latents.device),
    }
    if guidance is not None:
        found["guidance"] = torch.full((batch,), float(guidance), device=latents.device)
    return found


def refusal(config: Mapping[str, Any]) -> str:
    if config["patch_size"] != 1:
        return f"its patch_size is {config['patch_size']}, and that of FLUX.2 is 1"
    return "" if config["mlp_ratio"] == 3 else f"its mlp_ratio is {config['mlp_ratio']}, and that of FLUX.2 is 3"


FLUX2 = dataclasses.replace(
    FLUX,
    transformer_class="Flux2Transformer2DModel",
    stacks=(
        dataclasses.replace(
            DUAL,
            taps={**DUAL.taps, "attention_norm": Tap("attn.to_q", side="in")},
            parts={
                **{kind: parts for kind, parts in DUAL.parts.items() if kind != "attention_norm"},
                "attention": tuple(name for name in DUAL.parts["attention"] if name != "norm1_context"),
            },
        ),
        SINGLE,
    ),
    defaults={
        "patch_size": 1, "in_channels": 128, "num_layers": 8, "num_single_layers": 48, "attention_head_dim": 128,
        "num_attention_heads": 48, "joint_attention_dim": 15360, "mlp_ratio": 3.0, "guidance_embeds": True,
    },
    channels=lambda config: config["in_channels"],
    patch=lambda config: 1,
    sample_size=lambda config: 64,
    conditioning={"prompt_embeds": "joint_attention_dim"},
    inputs=inputs,
    prediction=unpack,
    refusal=refusal,
)  # fmt: skip

__all__ = ["FLUX2"]
