"""The `.pt` files of DiT and SiT."""

from __future__ import annotations

import argparse
import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from aselect_hf.conversion.assemble import (
    State,
    build,
    load_vae,
)
from aselect_hf.conversion.locate import ORIGINAL_LICENSES, first_line
from aselect_hf.modeling.configuration_aselect_dit import SHAPES
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel

ORIGINAL_KEYS = {
    "patch_embedding": "x_embedder.proj",
    "final_layer.modulation": "final_layer.adaLN_modulation.1",
    "final_layer.proj": "final_layer.linear",
    "condition_embeddings.0.fc1": "t_embedder.mlp.0",
    "condition_embeddings.0.fc2": "t_embedder.mlp.2",
    "condition_embeddings.0.class_embedding": "y_embedder.embedding_table",
}
ORIGINAL_BLOCK_KEYS = {
    "modulation": "adaLN_modulation.1",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def load_original(
    path: Path, kind: str, *, vae: str | Path | None, vae_decoder: bool, allow_pickle: bool, **config: Any
) -> ASelectDiTModel:
    """An original DiT or SiT `.pt`: a state dict, or a training checkpoint (whose `ema` weights are taken)."""
    if not allow_pickle:
        raise ValueError(f"{path.name} is a pickle: pass allow_pickle=True to read it (with weights_only=True)")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the original training scripts store one
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a state dict: {first_line(error)}") from error
    state: State = loaded
    for key in ("model", "ema"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            state = loaded[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a DiT state dict but a {type(state).__name__}")
    needed = [f"{name}.weight" for name in ORIGINAL_KEYS.values()] + ["pos_embed", "blocks.0.attn.qkv.weight"]
    if absent := [name for name in needed if name not in state]:
        raise ValueError(f"{path} is not a DiT state dict: {', '.join(absent)} missing")
    hidden_size, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    layers = 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
    heads = {shape["hidden_size"]: shape["num_attention_heads"] for shape in SHAPES.values()}.get(hidden_size)
    if heads is None and "num_attention_heads" not in config:
        raise ValueError(f"a width of {hidden_size} is none of the published shapes: pass num_attention_heads")
    flow = {"type": "flow_matching", "prediction_type": "velocity", "model_time": "data_fraction"}
    fields = {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "patch_size": patch_size,
        "sample_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "num_channels": channels,
        "learned_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch_size**2,
        "num_condition_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "attention_bias": "blocks.0.attn.qkv.bias" in state,
        "noise_schedule": flow if kind == "sit" else None,
        "base_model_license": ORIGINAL_LICENSES[kind],
    } | config
    converted = {
        f"{ours}.{leaf}": state[f"{theirs}.{leaf}"]
        for ours, theirs in _original_pairs(layers)
        for leaf in ("weight", "bias")
        if f"{theirs}.{leaf}" in state
    }
    for index in range(layers):
        for leaf in ("weight", "bias"):
            qkv = state.get(f"blocks.{index}.attn.qkv.{leaf}")
            for name, part in zip("qkv", qkv.chunk(3) if qkv is not None else (), strict=False):
                converted[f"layers.{index}.attention.{name}_proj.{leaf}"] = part
    autoencoder = load_vae(vae, allow_pickle) if vae is not None else None
    model = build(fields, converted, autoencoder, vae_decoder, ASelectDiTModel)
    if not torch.allclose(model.position_embedding.float(), state["pos_embed"].float(), atol=1e-4):
        raise ValueError(f"{path}: its position embedding is not DiT's sin-cos table")
    return model


def _original_pairs(layers: int) -> list[tuple[str, str]]:
    blocks = [
        (f"layers.{index}.{ours}", f"blocks.{index}.{theirs}")
        for index in range(layers)
        for ours, theirs in ORIGINAL_BLOCK_KEYS.items()
    ]
    return [*ORIGINAL_KEYS.items(), *blocks]
