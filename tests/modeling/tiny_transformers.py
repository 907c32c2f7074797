"""One tiny configuration for every family of diffusers' transformers, and models of it with random weights."""

from __future__ import annotations

from typing import Any

import torch

from aselect_hf import ASelectDiffusionConfig, ASelectDiffusionModel

SD3: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10,
    "pos_embed_max_size": 6,
}  # fmt: skip
FLUX: dict[str, Any] = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": [2, 2, 4],
}  # fmt: skip
CHROMA: dict[str, Any] = {name: value for name, value in FLUX.items() if name != "pooled_projection_dim"} | {
    "approximator_num_channels": 64, "approximator_hidden_dim": 16, "approximator_layers": 1,
}  # fmt: skip
PIXART: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "cross_attention_dim": 16, "caption_channels": 12,
}  # fmt: skip
SANA: dict[str, Any] = {
    "sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
    "caption_channels": 12, "timestep_scale": 0.5,
}  # fmt: skip
PRX: dict[str, Any] = {
    "in_channels": 4, "patch_size": 2, "context_in_dim": 12, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2,
    "depth": 3, "axes_dim": [4, 4],
}  # fmt: skip
AURAFLOW: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
    "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
    "out_channels": 4, "pos_embed_max_size": 36,
}  # fmt: skip
HUNYUAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8,
    "hidden_size": 16, "num_layers": 4, "mlp_ratio": 2.0, "cross_attention_dim": 12, "cross_attention_dim_t5": 16,
    "pooled_projection_dim": 10, "text_len": 5, "text_len_t5": 6,
}  # fmt: skip
COGVIEW4: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "text_embed_dim": 12, "time_embed_dim": 10, "condition_dim": 4,
}  # fmt: skip
FLUX2: dict[str, Any] = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "axes_dims_rope": [2, 2, 2, 2], "guidance_embeds": False,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "axes_dims_rope": [2, 2, 4],
}  # fmt: skip
LUMINA2: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 3, "num_refiner_layers": 1,
    "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 8, "axes_dim_rope": [2, 2, 2],
    "axes_lens": [8, 16, 16], "cap_feat_dim": 12,
}  # fmt: skip
Z_IMAGE: dict[str, Any] = {
    "in_channels": 4, "dim": 16, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 12, "axes_dims": [4, 2, 2], "axes_lens": [64, 16, 16],
}  # fmt: skip
MASKED_TEXT = {"prompt_embeds": [5, 12], "prompt_attention_mask": [5]}
SD3_TEXT = {"prompt_embeds": [5, 12], "pooled_prompt_embeds": [10]}

TINY: dict[str, dict[str, Any]] = {
    "SD3": {"transformer_class": "SD3Transformer2DModel", "transformer_config": SD3, "conditioning": SD3_TEXT},
    "SD3.5": {
        "transformer_class": "SD3Transformer2DModel",
        "transformer_config": SD3 | {"dual_attention_layers": [0, 1], "qk_norm": "rms_norm"},
        "conditioning": SD3_TEXT,
    },
    "FLUX": {
        "transformer_class": "FluxTransformer2DModel",
        "transformer_config": FLUX,
        "conditioning": SD3_TEXT,
        "image_size": 8,
    },
    "FLUX, guided": {
        "transformer_class": "FluxTransformer2DModel",
        "transformer_config": FLUX | {"guidance_embeds": True},
        "conditioning": SD3_TEXT,
        "image_size": 8,
        "guidance": 4.0,
    },
    "Chroma": {
        "transformer_class": "ChromaTransformer2DModel",
        "transformer_config": CHROMA,
        "conditioning": MASKED_TEXT,
        "image_size": 8,
    },
    "PixArt-Sigma": {
        "transformer_class": "PixArtTransformer2DModel",
        "transformer_config": PIXART,
        "conditioning": MASKED_TEXT,
    },
    "PixArt-alpha": {
        "transformer_class": "PixArtTransformer2DModel",
        "transformer_config": PIXART | {"sample_size": 128, "attention_head_dim": 12, "cross_attention_dim": 24},
        "conditioning": MASKED_TEXT,
        "image_size": 8,
    },
    "Sana": {
        "transformer_class": "SanaTransformer2DModel",
        "transformer_config": SANA,
        "conditioning": MASKED_TEXT,
    },
    "FLUX.2 klein": {
        "transformer_class": "Flux2Transformer2DModel",
        "transformer_config": FLUX2,
        "conditioning": {"prompt_embeds": [5, 12]},
        "image_size": 4,
    },
    "FLUX.2 dev": {
        "transformer_class": "Flux2Transformer2DModel",
        "transformer_config": FLUX2 | {"guidance_embeds": True},
        "conditioning": {"prompt_embeds": [5, 12]},
        "image_size": 4,
        "guidance": 4.0,
    },
    "Qwen-Image": {
        "transformer_class": "QwenImageTransformer2DModel",
        "transformer_config": QWEN,
        "conditioning": {"prompt_embeds": [5, 12]},
        "image_size": 8,
    },
    "Lumina-Image 2": {
        "transformer_class": "Lumina2Transformer2DModel",
        "transformer_config": LUMINA2,
        "conditioning": MASKED_TEXT,
    },
    "Z-Image": {
        "transformer_class": "ZImageTransformer2DModel",
        "transformer_config": Z_IMAGE,
        "conditioning": {"prompt_embeds": [5, 12]},
        "image_size": 8,
    },
    "PRX": {
        "transformer_class": "PRXTransformer2DModel",
        "transformer_config": PRX,
        "conditioning": MASKED_TEXT,
        "image_size": 8,
    },
    "PRX, pixels": {
        "transformer_class": "PRXTransformer2DModel",
        "transformer_config": PRX | {"in_channels": 3, "bottleneck_size": 6, "resolution_embeds": True},
        "conditioning": MASKED_TEXT,
        "image_size": 8,
    },
    "AuraFlow": {
        "transformer_class": "AuraFlowTransformer2DModel",
        "transformer_config": AURAFLOW,
        "conditioning": {"prompt_embeds": [5, 12]},
    },
    "CogView4": {
        "transformer_class": "CogView4Transformer2DModel",
        "transformer_config": COGVIEW4,
        "conditioning": {"prompt_embeds": [5, 12]},
    },
    "HunyuanDiT": {"transformer_class": "HunyuanDiT2DModel", "transformer_config": HUNYUAN},
    "HunyuanDiT 1.2": {
        "transformer_class": "HunyuanDiT2DModel",
        "transformer_config": HUNYUAN | {"use_style_cond_and_image_meta_size": False},
    },
}
"""Arguments of `ASelectDiffusionConfig` by the name of a family."""


def tiny_config(family: str, **fields: Any) -> ASelectDiffusionConfig:
    return ASelectDiffusionConfig(**(TINY[family] | {"timestep": 100} | fields))


def store_prompt(model: Any) -> Any:
    """Give a model a random prompt, the same at every call."""
    generator = torch.Generator().manual_seed(11)
    shapes = model.base_model.config.conditioning
    prompt = {name: torch.randn(shapes[name], generator=generator) for name in shapes}
    for name in prompt:
        if "mask" in name:  # the first three tokens are there
            prompt[name] = (torch.arange(len(prompt[name])) < 3).float()
    model.base_model.set_conditioning(prompt)
    return model


def tiny_model(family: str, **fields: Any) -> ASelectDiffusionModel:
    """A model of three blocks or so, with a random prompt and the weights that diffusers starts with."""
    return store_prompt(ASelectDiffusionModel(tiny_config(family, **fields)))
