"""Weights of a transformer of diffusers: reading those of the kept blocks, and building a model around them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from aselect_hf.conversion.assemble import cast, some
from aselect_hf.conversion.diffusers_dit import scheduler_of
from aselect_hf.conversion.prompts import Tensors
from aselect_hf.conversion.weights import State, first_line, read_state, refuse_quantized
from aselect_hf.modeling.configuration_aselect_diffusion import POSITION_TABLES, ASelectDiffusionConfig
from aselect_hf.modeling.modeling_aselect_diffusion import ASelectDiffusionModel

logger = logging.getLogger(__name__)

DECODER = ("decoder.", "post_quant_conv.")
"""Starts of the names of a VAE's weights that only its decoder has."""


def dropped_blocks(config: ASelectDiffusionConfig) -> tuple[str, ...]:
    """Starts of the names of the weights of blocks that are not kept."""
    shape, family = config.shape, config.family
    places = [family.locate(shape, block) for block in range(config.num_hidden_layers, family.depth(shape))]
    return tuple(f"{stack.blocks}.{index}." for stack, index in places)


def read_tensors(files: Iterable[Path], dropped: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of weight files, one at a time, without those whose names start with one of `dropped`.

    Raises:
        ValueError: a file is damaged.
    """
    for path in files:
        if path.suffix != ".safetensors":
            yield from ((name, tensor) for name, tensor in read_state([path]).items() if not name.startswith(dropped))
            continue
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if not name.startswith(dropped):
                        yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {first_line(error)}") from error


def kept_positions(config: ASelectDiffusionConfig) -> int | None:
    """Side in tokens of the middle of the position table that images of `config.image_size` and smaller ones read.

    `None` if there is no such table, or all of it is needed. The side differs from the table's by an even number, so
    that images of every size read the same rows of the part as of the whole.
    """
    if config.transformer_class not in POSITION_TABLES:
        return None
    side, grid = config.shape[POSITION_TABLES[config.transformer_class]], config.grid_size[0]
    kept = grid + (side - grid) % 2
    return kept if kept < side else None


def crop_positions(
    tensors: Iterable[tuple[str, torch.Tensor]], config: ASelectDiffusionConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors, with the middle of the position table if only that is kept."""
    kept = config.kept_positions
    for name, tensor in tensors:
        if kept is not None and name == "pos_embed.pos_embed":  # (1, side * side, width)
            side = math.isqrt(tensor.shape[1])
            start = (side - kept) // 2
            table = tensor.view(1, side, side, -1)[:, start : start + kept, start : start + kept]
            tensor = table.reshape(1, kept * kept, -1)
        yield name, tensor


def copied(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A copy on the CPU, so that the model shares no memory with its source, in `dtype` if it is of floating point."""
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)


def build_diffusion(
    name: str,
    config: ASelectDiffusionConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
    vae: Any,
    prompt: Tensors,
    model_class: Any,
    dtype: torch.dtype | None,
) -> Any:
    """The model in `dtype` (default: that of the first of the weights), whose weights are in memory only once.

    Args:
        name: how errors refer to the transformer.
        config: of the model.
        weights: the transformer's weights under its own names. They are read one by one, and copied.
        vae: autoencoder, which is copied; `None` without one.
        prompt: the encoded prompt.
        model_class: class to build, with or without a head; a new head gets random weights.
        dtype: of the model and its VAE.

    Raises:
        ValueError: a weight is missing, has the wrong shape, or has no place; the message names it.
    """
    with init_empty_weights(include_buffers=False):  # first, because computing a position table takes memory
        model: Any = model_class(config)
    state: State = {}
    for key, tensor in weights:
        refuse_quantized(name, {}, [(key, tensor)])
        if dtype is None and tensor.is_floating_point():
            dtype = tensor.dtype
        state[f"transformer.{key}"] = copied(tensor, dtype)
    if vae is not None:
        skipped = () if config.vae_decoder else DECODER
        state |= {f"vae.{key}": copied(x, dtype) for key, x in vae.state_dict().items() if not key.startswith(skipped)}
    backbone = model.base_model
    parameters, buffers = dict(backbone.named_parameters()), dict(backbone.named_buffers())
    problems = {
        "missing": set(parameters) - set(state),
        "of the wrong shape": {x for x in parameters if x in state and state[x].shape != parameters[x].shape},
        "without a place in this network": set(state) - set(backbone.state_dict()),
    }
    if faults := [f"{some(names)} {problem}" for problem, names in problems.items() if names]:
        raise ValueError(f"{name} does not fit its config: {'; '.join(faults)}")
    own = {key: state.pop(key) for key in list(state) if key in parameters or key in buffers}
    backbone.load_state_dict(own, strict=False, assign=True)
    backbone.set_conditioning(prompt)
    if backbone is not model:
        start_head(model)
    return cast(model, dtype).eval()


def start_head(model: Any) -> None:
    """Give the modules beside the backbone, which were built without memory, their first weights."""
    for part in model.children():
        if part is model.base_model:
            continue
        for module in part.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
            model._init_weights(module)


def save_stock(model: ASelectDiffusionModel, folder: Path) -> None:
    """Write the network back as diffusers reads it: `transformer`, and `scheduler` and `vae` if there are any.

    Text encoders are not in a model, so that the folder is no pipeline.

    Raises:
        ValueError: parts of the network were left out at conversion.
    """
    config = model.config
    if config.fixed_timestep:
        raise config.fixed_error("conversion to diffusers")
    dropped = []
    if not config.is_whole:
        dropped.append(f"the blocks from {config.num_hidden_layers} on")
    if config.kept_positions is not None:
        dropped.append(f"the positions outside of the middle {config.kept_positions}x{config.kept_positions}")
    if dropped:
        raise ValueError(
            f"this model cannot go back to diffusers without {' and '.join(dropped)}, which were left out when it was "
            'converted: convert its source again with keep="all"'
        )
    with init_empty_weights(include_buffers=False):
        stock = type(model.transformer).from_config(config.transformer_config or {})
    state = model.transformer.state_dict()
    stock.load_state_dict({name: state[name] for name in stock.state_dict()}, assign=True)
    stock.save_pretrained(folder / "transformer")
    if config.scheduler_config is not None:
        scheduler_of(config.scheduler_config).save_pretrained(folder / "scheduler")
    if model.vae is not None and config.vae_decoder:
        model.vae.save_pretrained(folder / "vae")
    elif model.vae is not None:
        logger.warning("the VAE is not written, because its decoder is not in the model: pass vae to add one")
