"""The `.pt` and `.safetensors` files of DiT, SiT, and models trained with their code (REPA, REPA-E, SRA)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aselect_hf.conversion.assemble import build, load_vae, some
from aselect_hf.conversion.locate import ORIGINAL_LICENSES, LoadingOptions, kind_by_name
from aselect_hf.conversion.weights import Network, State, count_blocks, find_network, read_file, training_arguments
from aselect_hf.modeling.configuration_aselect_dit import SHAPES
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel, sincos_positions

logger = logging.getLogger(__name__)

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
CLASS_TABLE = "y_embedder.embedding_table.weight"
NEEDED = (
    "x_embedder.proj.weight", "pos_embed", CLASS_TABLE, "final_layer.linear.weight", "blocks.0.attn.qkv.weight",
    "blocks.0.mlp.fc1.weight",
)  # fmt: skip
"""Keys that determine the shape of the network."""
ALIGNMENT = ("projectors.", "ap_head.")
"""Heads that align features with a teacher's in training (REPA and REPA-E; SRA). The denoiser never runs them."""
HARMLESS = (*ALIGNMENT, "n_averaged")
"""Prefixes of keys that the denoiser does not use; `n_averaged` is a counter of `torch.optim.swa_utils`."""
PATHS = {"Linear": "data_fraction", "linear": "noise_fraction"}
"""Names of straight paths in SiT, and in REPA and its descendants, with the time that their networks receive."""
PREDICTIONS = {"velocity": "velocity", "v": "velocity", "noise": "epsilon"}
IMAGENET_CLASSES = 1000


def load_original(
    source: Path | Mapping[str, Any],
    kind: str | None,
    *,
    model_time: str | None = None,
    vae: Any = None,
    vae_decoder: bool = False,
    options: LoadingOptions | None = None,
    **config: Any,
) -> ASelectDiTModel:
    """Load an original DiT or SiT from a state dict or a training checkpoint, whose averaged weights are used.

    Args:
        source: file, or its content.
        kind: `"dit"` or `"sit"` (default: detected from the content, else from the words in the file's name).
        model_time: time that a SiT's network receives, see `NoiseSchedule` (default: detected from the content).

    Raises:
        ValueError: the file is damaged, holds another network, or does not tell something that must be known.
    """
    options = options or LoadingOptions()
    name = source.name if isinstance(source, Path) else "the state dict"
    content = read_file(source, options.allow_pickle) if isinstance(source, Path) else dict(source)
    network, arguments = find_network(content, name), training_arguments(content)
    state = network.state
    _report(network, name)
    if absent := [key for key in NEEDED if key not in state]:
        hint = f"; there are {some(unknown)} instead" if (unknown := _unused(state, len(state))) else ""
        raise ValueError(f"{name} is not a DiT state dict: {some(absent)} missing{hint}")
    if state["x_embedder.proj.weight"].ndim != 4:
        raise ValueError(f"{name} is not a DiT: x_embedder.proj, which embeds its patches, is not a convolution")
    kind = kind or _kind(state, arguments, name)
    fields = _shape(state, config, name) | {"base_model_license": ORIGINAL_LICENSES[kind]}
    state, fields["num_condition_classes"] = _with_null_class(state, arguments, config, name)
    if "noise_schedule" not in config:
        fields["noise_schedule"] = _schedule(kind, state, arguments, model_time, name)
    _check_positions(state, fields, name)
    layers = fields["num_hidden_layers"]
    autoencoder = load_vae(vae, options) if vae is not None else None
    fields |= {key: value for key, value in config.items() if key != "num_condition_classes"}
    return build(
        fields, _renamed(state, layers), autoencoder, vae_decoder, ASelectDiTModel,
        name=name, unused=_unused(state, layers), dtype=options.dtype,
    )  # fmt: skip


def _report(network: Network, name: str) -> None:
    """Warn if tensors of other modules are ignored."""
    if network.outside:
        place = network.label or "its top level"
        logger.warning("%s: the network is read from %s; %d other tensors are ignored", name, place, network.outside)


def _kind(state: State, arguments: dict[str, Any], name: str) -> str:
    """Distinguish DiT from SiT by training arguments, by heads that only SiTs have, or by the file's name."""
    if "path_type" in arguments:
        return "sit"
    words = set(re.findall("[a-z]+", str(arguments.get("model", "")).lower()))
    if len(said := words & set(ORIGINAL_LICENSES)) == 1:
        return said.pop()
    return "sit" if _is_aligned(state) else kind_by_name(name)


def _is_aligned(state: State) -> bool:
    """Whether the network is of the REPA family: it has alignment heads and, unlike a DiT, predicts no variance."""
    return any(key.startswith(ALIGNMENT) for key in state) and not _predicts_variance(state)


def _predicts_variance(state: State) -> bool:
    channels, patch = state["x_embedder.proj.weight"].shape[1:3]
    return state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2


def _schedule(
    kind: str, state: State, arguments: dict[str, Any], model_time: str | None, name: str
) -> dict[str, Any] | None:
    """The noise schedule, including the time that the network receives; `None` for DDPM.

    Raises:
        ValueError: the file does not tell that time, or the path is not straight.
    """
    if kind == "dit":
        if model_time is not None:
            raise ValueError(f"model_time applies to a SiT, but {name} is read as a DiT, which receives the timestep")
        return None
    path, prediction = arguments.get("path_type"), arguments.get("prediction") or "velocity"
    if path not in (None, *PATHS) or prediction not in PREDICTIONS:
        raise ValueError(
            f"{name} was trained on a path of type {path!r} to predict {prediction!r}; supported are straight paths "
            f"({', '.join(PATHS)}) and the predictions {', '.join(PREDICTIONS)}"
        )
    told = PATHS.get(str(path))
    if told is None and _is_aligned(state):
        told = "noise_fraction"
    elif told is None and _predicts_variance(state) and not any(key.startswith(ALIGNMENT) for key in state):
        told = "data_fraction"  # only SiT's own code has output channels for a variance
    if told is None and model_time is None:
        raise ValueError(
            f"{name} does not tell which time its network receives: pass model_time='data_fraction' (SiT, "
            "LightningDiT: 1 is data) or model_time='noise_fraction' (REPA, REPA-E, SRA: 1 is noise)"
        )
    if told is not None and model_time not in (None, told):
        logger.warning("%s seems to expect the %s, but model_time=%r is used as requested", name, told, model_time)
    return {
        "type": "flow_matching",
        "prediction_type": PREDICTIONS[prediction],
        "model_time": model_time or told,
    }


def _shape(state: State, config: dict[str, Any], name: str) -> dict[str, Any]:
    """The shape of the network as config fields."""
    hidden_size, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    heads = {shape["hidden_size"]: shape["num_attention_heads"] for shape in SHAPES.values()}.get(hidden_size)
    if heads is None and "num_attention_heads" not in config:
        raise ValueError(f"no published shape has a width of {hidden_size}: pass num_attention_heads")
    tokens = state["pos_embed"].numel() // hidden_size
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(
            f"{name} has {tokens} positions, which is not a square: class or register tokens are not supported"
        )
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": count_blocks(state, "blocks"),
        "num_attention_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "patch_size": patch_size,
        "sample_size": math.isqrt(tokens) * patch_size,
        "num_channels": channels,
        "learned_sigma": _predicts_variance(state),
        "attention_bias": "blocks.0.attn.qkv.bias" in state,
    }


def _with_null_class(state: State, arguments: dict[str, Any], config: dict[str, Any], name: str) -> tuple[State, int]:
    """Make sure that the last row of the class table is a null class; return the state and the number of other classes.

    A network that was trained without one (`class_dropout_prob=0`) gets a null class of zeros.

    Raises:
        ValueError: the table does not fit the number of classes, or that number is not known.
    """
    table = state[CLASS_TABLE]
    rows = len(table)
    classes = config.get("num_condition_classes", arguments.get("num_classes"))
    if classes is None:
        choice = f"num_condition_classes={rows - 1} if it was trained with class dropout, {rows} if without"
        if (rows - 1) % 10:
            raise ValueError(
                f"{name} has {rows} class embeddings, and the last may or may not be the null class: pass {choice}"
            )
        classes = rows - 1
        if classes not in (0, IMAGENET_CLASSES):
            logger.warning(
                "%s has %d class embeddings: the last is taken as the null class; pass %s", name, rows, choice
            )
    if classes not in (rows - 1, rows):
        raise ValueError(f"{name} has {rows} class embeddings, but {classes} classes (the null class aside)")
    if classes == rows:
        logger.warning(
            "%s was trained without a null class: without class_labels, its class condition is a vector of zeros that "
            "it has never seen; pass class_labels if you can", name,
        )  # fmt: skip
        state = state | {CLASS_TABLE: torch.cat([table, torch.zeros_like(table[:1])])}
    return state, classes


def _check_positions(state: State, fields: dict[str, Any], name: str) -> None:
    stored, side = state["pos_embed"], fields["sample_size"] // fields["patch_size"]
    table = sincos_positions(fields["hidden_size"], (side, side), (side, side))
    tolerance = max(1e-4, 2 * torch.finfo(stored.dtype).eps)
    fits = stored.shape[-1] == table.shape[-1] and stored.numel() == table.numel()
    if not fits or not torch.allclose(stored.float().view(table.shape), table, rtol=0, atol=tolerance):
        raise ValueError(f"{name}: its position embedding (pos_embed) is not DiT's sin-cos table")


def _pairs(layers: int) -> list[tuple[str, str]]:
    """Pairs `(our module, original module)`, except the projections of queries, keys and values."""
    blocks = [
        (f"layers.{index}.{ours}", f"blocks.{index}.{theirs}")
        for index in range(layers)
        for ours, theirs in ORIGINAL_BLOCK_KEYS.items()
    ]
    return [*ORIGINAL_KEYS.items(), *blocks]


def _renamed(state: State, layers: int) -> State:
    """The weights under our names."""
    renamed = {
        f"{ours}.{leaf}": state[f"{theirs}.{leaf}"]
        for ours, theirs in _pairs(layers)
        for leaf in ("weight", "bias")
        if f"{theirs}.{leaf}" in state
    }
    for index in range(layers):
        for leaf in ("weight", "bias"):
            qkv = state.get(f"blocks.{index}.attn.qkv.{leaf}")
            for projection, part in zip("qkv", qkv.chunk(3) if qkv is not None else (), strict=False):
                renamed[f"layers.{index}.attention.{projection}_proj.{leaf}"] = part
    return renamed


def _unused(state: State, layers: int) -> set[str]:
    """Keys that our network does not use and that are not known to be harmless."""
    modules = {theirs for _, theirs in _pairs(layers)} | {f"blocks.{index}.attn.qkv" for index in range(layers)}
    used = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")} | {"pos_embed"}
    return {key for key in state if key not in used and not key.startswith(HARMLESS)}
