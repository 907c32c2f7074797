"""Assembly of a model from config fields, weights under our names and a VAE."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderTiny
from safetensors import SafetensorError
from transformers import PreTrainedModel

from aselect_hf.conversion.locate import LoadingOptions, locate
from aselect_hf.conversion.weights import State, check_depth, first_line, stored_names, weight_files
from aselect_hf.files import read_json
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.modeling.vae import drop_decoder

DERIVED_KEYS = {"position_embedding", "evaluation_noise"}
"""Stored buffers that the config determines; with a fixed timestep, however, positions are weights."""
AUTOENCODERS = {
    each.__name__: each
    for each in (AutoencoderKL, AutoencoderTiny, AutoencoderDC, AutoencoderKLFlux2, AutoencoderKLQwenImage)
}
MAX_NAMED = 8


def build(
    fields: dict[str, Any],
    state: State,
    vae: Any,
    vae_decoder: bool,
    model_class: type[PreTrainedModel],
    *,
    name: str = "the checkpoint",
    unused: Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> Any:
    """Build a model from config fields and weights, in `dtype` (default: that of the weights).

    Args:
        name: how errors refer to the checkpoint.
        unused: keys of the checkpoint that the model has no use for.

    Raises:
        ValueError: a key is missing or has the wrong shape, or `unused` is not empty; the message names these keys.
    """
    if vae is not None:
        fields = fields | vae_fields(vae, vae_decoder)
    config = ASelectDiTConfig(**{key: value for key, value in fields.items() if value is not None})
    with torch.device("meta"):  # compare shapes first: a wrong config may describe a huge model
        outline: Any = model_class(copy.deepcopy(config))
    expected = getattr(outline, outline.base_model_prefix, outline).state_dict()
    if vae is not None:
        state = state | {f"vae.{key}": tensor for key, tensor in vae.state_dict().items()}
    problems = {
        "missing": set(expected) - set(state) - DERIVED_KEYS,
        "of the wrong shape": {key for key in set(state) & set(expected) if state[key].shape != expected[key].shape},
        "without a place in this network": set(unused),
    }
    if found := [f"{some(keys)} {problem}" for problem, keys in problems.items() if keys]:
        raise ValueError(f"{name} does not fit its config: {'; '.join(found)}")
    model: Any = model_class(config)
    dit = getattr(model, model.base_model_prefix, model)
    dit.load_state_dict({key: state.get(key, tensor) for key, tensor in dit.state_dict().items()})
    return cast(model, dtype or state["patch_embedding.weight"].dtype).eval()


def cast(model: Any, dtype: torch.dtype | None) -> Any:
    """Convert the model and its VAE to `dtype`, and set the config's dtype; `None` changes nothing."""
    if dtype is not None:
        model = model.to(dtype)
        model.config.dtype = dtype
    return model


def some(names: Iterable[str]) -> str:
    """List names for a message: the first `MAX_NAMED`, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")


def load_vae(source: Any, options: LoadingOptions | None = None) -> Any:
    """Load an autoencoder from a folder or Hub id; one in memory is checked and returned.

    Raises:
        ValueError: it is none of `AUTOENCODERS`, or its weights do not fit its config.
    """
    options = options or LoadingOptions()
    if not isinstance(source, str | Path):
        if not isinstance(source, tuple(AUTOENCODERS.values())):
            raise ValueError(f"vae must be one of {', '.join(AUTOENCODERS)}, got {type(source).__name__}")
        return source
    path = locate(source, options.of_another_repository).path
    try:
        config = read_json(path / "config.json")
        autoencoder_class = AUTOENCODERS[config["_class_name"]]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"vae {source} is none of {', '.join(AUTOENCODERS)}") from error
    try:
        files = weight_files(path, options.variant, options.allow_pickle)
    except ValueError:
        if options.variant is None:
            raise
        options = dataclasses.replace(options, variant=None)
        files = weight_files(path, None, options.allow_pickle)
    if autoencoder_class in (AutoencoderKL, AutoencoderKLFlux2):
        names = stored_names(files)
        check_depth(path, len(config.get("block_out_channels", (64,))), names, "encoder.down_blocks")
        check_depth(path, config.get("layers_per_block", 1), names, "encoder.down_blocks.0.resnets")
    return _from_folder(autoencoder_class, path, options)


def set_vae(model: NoisyBackbone, vae: Any, decoder: bool) -> None:
    """Put an autoencoder into a model; its decoder is left out unless `decoder` is true."""
    fields = model.config.to_diff_dict() | vae_fields(vae, decoder) | {"image_size": None}
    checked = model.config.from_dict(fields)
    for name in ("vae_config", "vae_decoder", "image_size"):
        setattr(model.config, name, getattr(checked, name))
    vae = copy.deepcopy(vae)  # the caller may still use it
    if not decoder:
        drop_decoder(vae)
    model.vae = vae.eval()


def vae_fields(vae: Any, decoder: bool) -> dict[str, Any]:
    """Config fields that describe a VAE.

    Raises:
        ValueError: the VAE normalizes its latents per channel.
    """
    config = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}
    normalizes = config.get("latents_mean") is not None or config.get("latents_std") is not None
    if normalizes and not isinstance(vae, AutoencoderKLQwenImage):
        raise ValueError(
            "the VAE normalizes its latents per channel (latents_mean, latents_std), which is not supported; "
            "supported are scaling_factor and shift_factor"
        )
    config = {"_class_name": type(vae).__name__} | json.loads(json.dumps(config))
    return {"vae_config": config, "vae_decoder": decoder}


def _from_folder(diffusers_class: Any, path: Path, options: LoadingOptions) -> Any:
    """Load a diffusers model and check that all weights fit."""
    try:
        model, report = diffusers_class.from_pretrained(
            path, use_safetensors=None if options.allow_pickle else True, variant=options.variant,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a {diffusers_class.__name__}: {first_line(error)}") from error
    problems = {"missing": report["missing_keys"], "without a place in this network": report["unexpected_keys"]}
    if found := [f"{some(keys)} {problem}" for problem, keys in problems.items() if keys]:
        raise ValueError(f"{path} does not fit its config: {'; '.join(found)}")
    return model
