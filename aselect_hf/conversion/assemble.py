"""A model from a config's fields, weights under our names and a VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors import SafetensorError
from transformers import PreTrainedModel

from aselect_hf.conversion.locate import first_line, locate
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel

State = dict[str, torch.Tensor]

DERIVED_KEYS = {"position_embedding", "evaluation_noise"}
"""Stored buffers that a config says how to make; in a model with a fixed timestep the positions are weights."""


def build(fields: dict[str, Any], state: State, vae: Any, vae_decoder: bool, model_class: type[PreTrainedModel]) -> Any:
    """A model of these config fields and weights, all of which it must get; in the dtype of the weights."""
    if vae is not None:
        fields = fields | vae_fields(vae, vae_decoder)
    config = ASelectDiTConfig(**{name: value for name, value in fields.items() if value is not None})
    model: Any = model_class(config)
    dit = getattr(model, model.base_model_prefix, model)
    if vae is not None:
        state = state | {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    expected = dit.state_dict()
    missing = set(expected) - set(state) - DERIVED_KEYS
    wrong = [name for name in set(state) & set(expected) if state[name].shape != expected[name].shape]
    if missing or wrong:
        raise ValueError(
            f"the checkpoint does not fit its config: missing {sorted(missing)}, wrong shape {sorted(wrong)}"
        )
    dtype = state["patch_embedding.weight"].dtype
    dit.load_state_dict({name: state.get(name, tensor) for name, tensor in expected.items()})
    return model.to(dtype).eval()


def load_vae(source: str | Path, allow_pickle: bool = False) -> Any:
    """An autoencoder from a folder or Hub id."""
    path = locate(source, allow_pickle)
    try:
        name = json.loads((path / "config.json").read_text())["_class_name"]
        autoencoder_class = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}[name]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"vae {source} is neither an AutoencoderKL nor an AutoencoderTiny") from error
    return from_diffusers_folder(autoencoder_class, path, allow_pickle)


def set_vae(model: ASelectDiTModel, vae: Any, decoder: bool) -> None:
    """Put an autoencoder inside a model, encoder only unless `decoder`."""
    fields = model.config.to_diff_dict() | vae_fields(vae, decoder) | {"image_size": None}
    checked = ASelectDiTConfig(
        **{key: value for key, value in fields.items() if key in ASelectDiTConfig.__annotations__}
    )
    for name in ("vae_config", "vae_decoder", "image_size"):
        setattr(model.config, name, getattr(checked, name))
    if not decoder:
        vae.decoder = None
        if hasattr(vae, "post_quant_conv"):
            vae.post_quant_conv = None
    model.vae = vae.eval()


def vae_fields(vae: Any, decoder: bool) -> dict[str, Any]:
    """What a config says of a VAE."""
    config = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}
    config = {"_class_name": type(vae).__name__} | json.loads(json.dumps(config))
    return {"vae_config": config, "vae_decoder": decoder}


def from_diffusers_folder(diffusers_class: Any, path: Path, allow_pickle: bool) -> Any:
    """A model of a class of diffusers, with all of its weights."""
    try:
        model, report = diffusers_class.from_pretrained(
            path, use_safetensors=None if allow_pickle else True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights are missing {', '.join(sorted(report['missing_keys']))}")
        return model
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        without = not allow_pickle and not any(path.glob("*.safetensors"))
        hint = "; it has no safetensors: pass allow_pickle=True to read pickles (.bin)" if without else ""
        raise ValueError(f"{path} cannot be read as a {diffusers_class.__name__}: {first_line(error)}{hint}") from error
