"""From any checkpoint to a model, and from a model to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from aselect_hf.conversion.assemble import (
    DERIVED_KEYS,
    load_vae,
    set_vae,
)
from aselect_hf.conversion.diffusers_dit import load_diffusers, save_diffusers
from aselect_hf.conversion.locate import ORIGINAL_LICENSES, detect_format, first_line, locate
from aselect_hf.conversion.original_dit import load_original
from aselect_hf.files import atomic_directory
from aselect_hf.modeling.backbone_aselect_dit import ASelectDiTBackbone
from aselect_hf.modeling.image_processing_aselect_dit import make_image_processor
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel, ASelectDiTPreTrainedModel
from aselect_hf.modeling.modeling_aselect_dit_heads import (
    ASelectDiTForImageClassification,
    ASelectDiTForSemanticSegmentation,
)

SourceFormat = Literal["auto", "aselect", "diffusers", "dit", "sit"]


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path | None = None,
    *,
    to: Literal["aselect", "diffusers"] = "aselect",
    source_format: SourceFormat = "auto",
    vae: str | Path | None = None,
    vae_decoder: bool = False,
    allow_pickle: bool = False,
    fix_timestep: bool = False,
    **config: Any,
) -> Any:
    """Read a checkpoint of any known format, optionally write it in another, and return the model.

    Args:
        source: a diffusers pipeline or transformer folder, one of this package's checkpoints, a Hub id of either, or
            an original DiT or SiT `.pt` file.
        output_dir: where to write; must not exist or be empty.
        to: format written. `"diffusers"` writes a whole `DiTPipeline` where the model carries (or `vae` names) a VAE
            with its decoder, else a transformer and a scheduler folder.
        source_format: how to read `source`; `"auto"` tells by its files, and by its name for a `.pt`.
        vae: folder or Hub id of an `AutoencoderKL` or `AutoencoderTiny` to put inside, in place of the source's own.
        vae_decoder: keep the VAE's decoder (`model.decode`, and sampling after conversion to diffusers).
        allow_pickle: read `.pt` and `.bin` files, with `weights_only=True`; otherwise only safetensors.
        fix_timestep: fold the timestep into the weights, see `ASelectDiTModel.fix_timestep`; a head is kept.
        config: fields of `ASelectDiTConfig` that override the source's (`timestep`, `feature`, `base_model`,
            `base_model_license`, `num_attention_heads` of an unusual `.pt`, ...).

    Raises:
        ValueError: the source is missing, damaged, of another kind, or a pickle without `allow_pickle`.
    """
    if to not in ("aselect", "diffusers"):
        raise ValueError(f"to must be 'aselect' or 'diffusers', got {to!r}")
    if to == "diffusers" and fix_timestep:
        raise ValueError("fix_timestep needs to='aselect': diffusers has no model with a fixed timestep")
    if to == "diffusers":
        vae_decoder = True
    asked = {name: config.pop(name, None) for name in ("timestep", "feature")} if fix_timestep else {}
    model = load_checkpoint(
        source, source_format=source_format, vae=vae, vae_decoder=vae_decoder, allow_pickle=allow_pickle,
        keep_head=fix_timestep, **config,
    )  # fmt: skip
    if fix_timestep:
        model = model.fix_timestep(**asked)
    if output_dir is not None:
        with atomic_directory(output_dir) as folder:
            if to == "aselect":
                save_model(model, folder)
            else:
                save_diffusers(model, folder)
    return model


def load_checkpoint(
    source: str | Path,
    *,
    source_format: SourceFormat = "auto",
    vae: str | Path | None = None,
    vae_decoder: bool = False,
    allow_pickle: bool = False,
    keep_head: bool = False,
    **config: Any,
) -> Any:
    """Read a checkpoint of any known format, with its head if `keep_head`; arguments as in `convert_checkpoint`."""
    name, path = str(source), locate(source, allow_pickle)
    kind = detect_format(path) if source_format == "auto" else source_format
    if kind == "aselect":
        model = load_model(path, saved_class(path) if keep_head else ASelectDiTModel, **config)
        if vae is not None:
            set_vae(getattr(model, model.base_model_prefix, model), load_vae(vae, allow_pickle), vae_decoder)
        return model
    if kind == "diffusers":
        config.setdefault("base_model", name if path != Path(name) else None)
        return load_diffusers(path, vae=vae, vae_decoder=vae_decoder, allow_pickle=allow_pickle, **config)
    if kind in ORIGINAL_LICENSES:
        return load_original(path, kind, vae=vae, vae_decoder=vae_decoder, allow_pickle=allow_pickle, **config)
    raise ValueError(f"source_format must be one of auto, aselect, diffusers, dit, sit; got {source_format!r}")


def saved_class(folder: Path) -> type[ASelectDiTPreTrainedModel]:
    """The class that a checkpoint of this package was saved with, its head included."""
    names = json.loads((folder / "config.json").read_text()).get("architectures") or []
    classes = (ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation, ASelectDiTBackbone)
    return next((known for known in classes if known.__name__ in names), ASelectDiTModel)


def load_model(
    source: str | Path,
    model_class: type[ASelectDiTPreTrainedModel] = ASelectDiTModel,
    *,
    new_head: bool = False,
    **config: Any,
) -> Any:
    """`from_pretrained` whose errors name the checkpoint: another model type, damaged weights.

    Args:
        source: folder or Hub id; `"sample"` for the model that ships with the package.
        model_class: class to load.
        new_head: let a head that the checkpoint lacks, or has for other classes, be a new one.
        config: config fields to override.
    """
    path = locate(source)
    if detect_format(path) != "aselect":
        raise ValueError(f"{source} is a diffusers checkpoint: convert it first, with ASelectDiTModel.from_diffusers")
    try:
        model, report = model_class.from_pretrained(
            path, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=new_head, **config
        )
    except (SafetensorError, OSError, RuntimeError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {source} cannot be read: {first_line(error)}") from error
    derived = () if model.config.fixed_timestep else tuple(DERIVED_KEYS)
    missing = {name for name in report["missing_keys"] if not name.endswith(derived)}
    missing |= {name for name, *_ in report["mismatched_keys"]}
    if new_head:
        missing = {name for name in missing if name.startswith(f"{model.base_model_prefix}.")}
    if missing:
        raise ValueError(f"checkpoint {source} does not fit its config: missing {sorted(missing)}")
    return model


def save_model(model: ASelectDiTPreTrainedModel, folder: str | Path) -> None:
    """Write weights, config, code and the image processor that matches the model: what every pipeline needs."""
    model.save_pretrained(folder)
    if model.config.vae_config is not None or model.config.num_channels in (1, 3):
        segmentation = isinstance(model, ASelectDiTForSemanticSegmentation)
        make_image_processor(model.config, segmentation=segmentation).save_pretrained(folder)
