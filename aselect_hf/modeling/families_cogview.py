"""CogView4: text and image in one sequence, text first, with weights in common and a modulation of their own.

Its noise is shifted with the resolution, and the time that it is told is not. Here `t` is 1000 times the share of noise
as for every network, and the adapter computes the unshifted time that belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .family import FLOW, Conditioning, Family, Stack, Tap, same

PIXELS = 8
"""Pixels a latent, in the sizes that the network is told."""
SHIFT: dict[str, Any] = {"time_shift_type": "linear", "base_image_seq_len": 256, "base_shift": 0.25, "max_shift": 0.75}
"""Fields of the published scheduler from which `unshifted` computes."""


def pass_image_first(
    hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Stack.skip` of blocks that return the image and the text."""
    return hidden_states, encoder_hidden_states


BLOCKS = Stack(
    blocks="transformer_blocks",
    depth="num_layers",
    taps={
        "attention_norm": Tap("norm1", item=0),
        "query": Tap("attn1.to_q", joint="last"),
        "key": Tap("attn1.to_k", joint="last"),
        "value": Tap("attn1.to_v", joint="last"),
        "attention": Tap("attn1.to_out.0", joint="last"),
        "mlp_norm": Tap("ff", side="in"),  # called for the image, then for the text
        "mlp": Tap("ff"),
        "hidden": Tap("", item=0),
    },
    parts={
        "attention_norm": ("norm1",),
        "query": ("attn1.to_q",),
        "key": ("attn1.to_k",),
        "value": ("attn1.to_v",),
        "attention": ("attn1.to_out",),
        "mlp": ("ff",),
    },
    text=(),
    skip=pass_image_first,
)


def unshifted(time: torch.Tensor, tokens: int) -> torch.Tensor:
    """1000 times the share of noise to the time that the network is told for an image of so many tokens."""
    noise = time / 1000
    mu = SHIFT["max_shift"] * (tokens / SHIFT["base_image_seq_len"]) ** 0.5 + SHIFT["base_shift"]
    return 1000 * noise / (noise + mu * (1 - noise))


def inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    height, width = latents.shape[-2:]
    size = torch.tensor([PIXELS * height, PIXELS * width], device=latents.device, dtype=latents.dtype)
    size = size.repeat(latents.shape[0], 1)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "timestep": unshifted(time, height * width // config["patch_size"] ** 2),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


COGVIEW4 = Family(
    transformer_class="CogView4Transformer2DModel",
    stacks=(BLOCKS,),
    defaults={
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 30, "attention_head_dim": 40,
        "num_attention_heads": 64, "text_embed_dim": 4096,
    },
    schedule=FLOW,
    scheduler=SHIFT,
    channels=lambda config: config["in_channels"],
    patch=lambda config: config["patch_size"],
    sample_size=lambda config: config["sample_size"],
    max_grid=lambda config: None,
    conditioning={"prompt_embeds": "text_embed_dim"},
    text_inputs=("patch_embed.text_proj",),
    outputs=("norm_out", "proj_out"),
    inputs=inputs,
    prediction=same,
)  # fmt: skip

__all__ = ["COGVIEW4"]
