"""HunyuanDiT: the image attends to itself, then to the text by cross-attention (`attn2`).

Blocks of the second half also read the output of their counterpart in the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .family import PARALLEL, Conditioning, Family, Stack, Tap, pass_one, same

PIXELS = 8
"""Pixels a latent, in the sizes that the network is told."""
ORIGINAL_SIZE = (1024, 1024)
"""Size of the image before it was cropped, as its pipeline says it by default."""
TRAINED_GRID = 512
"""Side in pixels of the square over which positions are stretched."""

BLOCKS = Stack(
    blocks="blocks",
    depth="num_layers",
    taps={
        "attention_norm": Tap("norm1"),
        "query": Tap("attn1.to_q"),
        "key": Tap("attn1.to_k"),
        "value": Tap("attn1.to_v"),
        "attention": Tap("attn1.to_out.0"),
        "mlp_norm": Tap("norm3"),
        "mlp": Tap("ff"),
        "hidden": Tap(""),
    },
    parts={
        "attention_norm": ("skip_norm", "skip_linear", "norm1"),
        "query": ("attn1.to_q",),
        "key": ("attn1.to_k",),
        "value": ("attn1.to_v",),
        "attention": ("attn1.norm_q", "attn1.norm_k", "attn1.to_out"),
        "mlp_norm": ("norm2", "attn2", "norm3"),
        "mlp": ("ff",),
    },
    text=(),
    skip=pass_one,
    before_text=("attention_norm", *PARALLEL, "attention"),
)


def rotary(config: Mapping[str, Any], latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `(tokens, width of a head)` of the middle of a square whose side is the image's longer one."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    patch = config["patch_size"]
    height, width = latents.shape[-2] // patch, latents.shape[-1] // patch
    side = TRAINED_GRID // PIXELS // patch
    scale = side / max(height, width)
    rows, columns = round(scale * height), round(scale * width)
    top, left = round((side - rows) / 2), round((side - columns) / 2)
    return get_2d_rotary_pos_embed(
        config["attention_head_dim"], ((top, left), (top + rows, left + columns)), (height, width),
        device=latents.device, output_type="pt",
    )  # fmt: skip


def inputs(
    config: Mapping[str, Any],
    latents: torch.Tensor,
    time: torch.Tensor,
    conditioning: Conditioning,
    guidance: float | None,
) -> dict[str, Any]:
    batch = latents.shape[0]
    sizes = [*ORIGINAL_SIZE, PIXELS * latents.shape[-2], PIXELS * latents.shape[-1], 0, 0]
    return {
        "hidden_states": latents,
        "timestep": time.to(latents.dtype),  # whose dtype is that of the computation
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "text_embedding_mask": conditioning["prompt_attention_mask"],
        "encoder_hidden_states_t5": conditioning["prompt_embeds_2"],
        "text_embedding_mask_t5": conditioning["prompt_attention_mask_2"],
        "image_meta_size": torch.tensor(sizes, device=latents.device, dtype=latents.dtype).repeat(batch, 1),
        "style": torch.zeros(batch, device=latents.device, dtype=torch.long),
        "image_rotary_emb": rotary(config, latents),
    }


HUNYUAN = Family(
    transformer_class="HunyuanDiT2DModel",
    stacks=(BLOCKS,),
    defaults={
        "sample_size": 32, "patch_size": 2, "in_channels": 4, "num_layers": 28, "attention_head_dim": 88,
        "num_attention_heads": 16, "cross_attention_dim": 1024, "cross_attention_dim_t5": 2048, "text_len": 77,
        "text_len_t5": 256,
    },
    schedule={
        "type": "ddpm", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.018,
        "prediction_type": "v_prediction",
    },
    channels=lambda config: config["in_channels"],
    patch=lambda config: config["patch_size"],
    sample_size=lambda config: config["sample_size"],
    max_grid=lambda config: None,
    conditioning={
        "prompt_embeds": "cross_attention_dim", "prompt_attention_mask": None,
        "prompt_embeds_2": "cross_attention_dim_t5", "prompt_attention_mask_2": None,
    },
    tokens={
        "prompt_embeds": "text_len", "prompt_attention_mask": "text_len",
        "prompt_embeds_2": "text_len_t5", "prompt_attention_mask_2": "text_len_t5",
    },
    text_inputs=("text_embedder",),
    outputs=("norm_out", "proj_out"),
    inputs=inputs,
    prediction=same,
    checkpointing=False,
    refusal=lambda config: "diffusers computes an even number of layers only" if config["num_layers"] % 2 else "",
)  # fmt: skip

__all__ = ["HUNYUAN"]
