"""Loading a model from any checkpoint, and saving a model to a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from aselect_hf.conversion.assemble import DERIVED_KEYS, cast, load_vae, set_vae
from aselect_hf.conversion.diffusers_any import from_diffusers
from aselect_hf.conversion.diffusers_dit import save_diffusers
from aselect_hf.conversion.locate import (
    ORIGINAL_LICENSES,
    LoadingOptions,
    Source,
    detect_format,
    locate,
    split_keywords,
)
from aselect_hf.conversion.original_dit import load_original
from aselect_hf.conversion.transformer import save_stock
from aselect_hf.conversion.weights import check_depth, first_line, stored_names, weight_files
from aselect_hf.files import atomic_directory, read_json
from aselect_hf.modeling import modeling_aselect_diffusion_heads as diffusion_heads
from aselect_hf.modeling import modeling_aselect_dit_heads
from aselect_hf.modeling.backbone_aselect_diffusion import ASelectDiffusionBackbone
from aselect_hf.modeling.backbone_aselect_dit import ASelectDiTBackbone
from aselect_hf.modeling.configuration_aselect_diffusion import ASelectDiffusionConfig
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.image_processing_aselect_dit import make_image_processor
from aselect_hf.modeling.modeling_aselect_diffusion import ASelectDiffusionModel
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.modeling.noisy_pretrained import NoisyPreTrainedModel
from aselect_hf.tasks import TASKS, Task, task_of_model

DIFFUSION_CLASSES: dict[str, type[NoisyPreTrainedModel]] = {
    "Model": ASelectDiffusionModel,
    "Backbone": ASelectDiffusionBackbone,
    "ForImageClassification": diffusion_heads.ASelectDiffusionForImageClassification,
    "ForSemanticSegmentation": diffusion_heads.ASelectDiffusionForSemanticSegmentation,
}
SourceFormat = Literal["auto", "aselect", "diffusers", "dit", "sit"]


def convert_checkpoint(
    source: Any,
    output_dir: str | Path | None = None,
    *,
    to: Literal["aselect", "diffusers"] = "aselect",
    source_format: SourceFormat = "auto",
    vae: Any = None,
    vae_decoder: bool = False,
    scheduler: Any = None,
    model_time: str | None = None,
    fix_timestep: bool = False,
    text: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> Any:
    """Read a checkpoint of any known format, optionally write it in another, and return the model.

    Args:
        source: a diffusers pipeline or transformer folder, a checkpoint of this package, a Hub id of either, or an
            original DiT or SiT file (`.pt`, `.safetensors`); or a diffusers pipeline, a `DiTTransformer2DModel` or an
            original state dict in memory.
        output_dir: folder to write; it must be empty or not exist (default: do not write).
        to: format to write. `"diffusers"` writes a whole `DiTPipeline` if the model has a VAE with decoder (its own or
            `vae`), else a transformer folder and a scheduler folder. Of another family, it writes the transformer's
            weights as they are, the scheduler, and a VAE with decoder; this needs `keep="all"`, which is then the
            default.
        source_format: format of `source`. `"auto"` detects it from the files, and distinguishes DiT from SiT by the
            content of the file, else by the words in its name.
        vae: folder, Hub id or autoencoder (`AutoencoderKL` or `AutoencoderTiny`) that replaces the source's VAE.
        vae_decoder: keep the VAE's decoder (for `model.decode`, and for sampling after conversion to diffusers).
        scheduler: for a diffusers source: a scheduler or its config that replaces the source's scheduler.
        model_time: for a SiT file: the time that its network receives, `"data_fraction"` (SiT, LightningDiT) or
            `"noise_fraction"` (REPA, REPA-E, SRA); required if the file does not tell.
        text: for a diffusers source of another family than DiT: `prompt`, `prompt_embeds`, `skip_text_encoders`, `keep`
            and `guidance` of `from_diffusers`.
        fix_timestep: fold the timestep into the weights, see `ASelectDiTModel.fix_timestep`; a head is kept.
        keywords: loading options (`token`, `revision`, `cache_dir`, `local_files_only`, `force_download`, `subfolder`,
            `variant`, `dtype`, `allow_pickle` to read `.pt` and `.bin` files with `weights_only=True`), and fields of
            `ASelectDiTConfig` that override the source's (`timestep`, `feature`, `base_model`, `base_model_license`,
            `num_attention_heads` or `num_condition_classes` of an unusual `.pt`, ...).

    Raises:
        TypeError: a keyword is unknown.
        ValueError: the source is missing, damaged, of another kind, or a pickle without `allow_pickle`.
    """
    if to not in ("aselect", "diffusers"):
        raise ValueError(f"to must be 'aselect' or 'diffusers', got {to!r}")
    if to == "diffusers" and fix_timestep:
        raise ValueError("fix_timestep needs to='aselect': diffusers has no model with a fixed timestep")
    if to == "diffusers":
        vae_decoder = True
    options, config = split_keywords("convert_checkpoint", keywords, also_diffusion=True)
    asked = {name: config.pop(name, None) for name in ("timestep", "feature")} if fix_timestep else {}
    place = _place(source, options, with_vae=vae is None)
    here = source if place is None else place
    if to == "diffusers" and "diffusers" in (source_format, source_format == "auto" and _format(here)):
        text = {"keep": "all"} | dict(text or {})
    model = _load(
        here, source_format, options, config, keep_head=fix_timestep, vae=vae,
        vae_decoder=vae_decoder, scheduler=scheduler, model_time=model_time, text=text,
    )  # fmt: skip
    if fix_timestep:
        model = model.fix_timestep(**asked)
    if place is not None:
        model.license_files = place.license_files
    if output_dir is not None:
        with atomic_directory(output_dir) as folder:
            if to == "aselect":
                save_model(model, folder)
            elif isinstance(model, ASelectDiTModel):
                save_diffusers(model, folder)
            else:
                save_stock(model, folder)
            model.write_license(folder)
    return model


def load_checkpoint(
    source: Any,
    *,
    source_format: SourceFormat = "auto",
    vae: Any = None,
    vae_decoder: bool = False,
    scheduler: Any = None,
    model_time: str | None = None,
    keep_head: bool = False,
    **keywords: Any,
) -> Any:
    """Read a checkpoint of any known format, with its head if `keep_head`; see `convert_checkpoint` for the others."""
    options, config = split_keywords("load_checkpoint", keywords, also_diffusion=True)
    place = _place(source, options, with_vae=vae is None)
    return _load(
        source if place is None else place, source_format, options, config, keep_head=keep_head, vae=vae,
        vae_decoder=vae_decoder, scheduler=scheduler, model_time=model_time,
    )  # fmt: skip


def _place(source: Any, options: LoadingOptions, with_vae: bool) -> Source | None:
    """Locate a path or Hub id; `None` for a source in memory."""
    return locate(source, options, with_vae) if isinstance(source, str | Path) else None


def _load(
    source: Any,
    source_format: SourceFormat,
    options: LoadingOptions,
    config: dict[str, Any],
    *,
    keep_head: bool,
    vae: Any,
    vae_decoder: bool,
    scheduler: Any,
    model_time: str | None,
    text: Mapping[str, Any] | None = None,
) -> Any:
    """Load a model from a place or from memory with the reader of its format."""
    kind = _format(source) if source_format == "auto" else source_format
    if kind not in ("aselect", "diffusers", "original", *ORIGINAL_LICENSES):
        raise ValueError(f"source_format must be one of auto, aselect, diffusers, dit, sit; got {source_format!r}")
    if scheduler is not None and kind != "diffusers":
        raise ValueError(f"scheduler is of a diffusers source, this one is {kind}: pass noise_schedule")
    if model_time is not None and (kind in ("aselect", "diffusers") or "noise_schedule" in config):
        raise ValueError("model_time is of a SiT file whose noise_schedule is not given: pass noise_schedule alone")
    if not isinstance(source, Source):
        accepted = ("original", *ORIGINAL_LICENSES) if isinstance(source, Mapping) else ("diffusers",)
        if kind not in accepted:
            raise ValueError(f"source_format={source_format!r} does not fit a {type(source).__name__} in memory")
    if text and kind != "diffusers":
        raise ValueError(f"{min(text)} is of a diffusers source, this one is {kind}: leave it out")
    if kind == "aselect":
        path = source.path
        model_class = saved_class(path) if keep_head else ASelectDiTModel
        model = load_model(path, model_class, variant=options.variant, **config)
        if vae is not None:
            set_vae(getattr(model, model.base_model_prefix, model), load_vae(vae, options), vae_decoder)
        return cast(model, options.dtype)
    if kind == "diffusers":
        return from_diffusers(
            source, vae=vae, vae_decoder=vae_decoder, scheduler=scheduler, options=options, **(text or {}), **config
        )
    return load_original(
        source.path if isinstance(source, Source) else source, None if kind == "original" else kind,
        model_time=model_time, vae=vae, vae_decoder=vae_decoder, options=options, **config,
    )  # fmt: skip


def _format(source: Any) -> str:
    """`"aselect"`, `"diffusers"`, or `"original"`: a single file or state dict, whose content tells DiT from SiT."""
    if isinstance(source, Source):
        return "original" if source.path.is_file() else detect_format(source.path)
    return "original" if isinstance(source, Mapping) else "diffusers"


def head_class(task: Task) -> type[NoisyPreTrainedModel]:
    """The class of models with a head for a task. `load_model` takes that of the checkpoint's own family."""
    return getattr(modeling_aselect_dit_heads, f"ASelectDiT{task.head_suffix}")


def family_class(model_class: type[NoisyPreTrainedModel], model_type: str) -> type[NoisyPreTrainedModel]:
    """The class that does in the family of `model_type` what `model_class` does in its own."""
    if model_type != ASelectDiffusionConfig.model_type or not model_class.__name__.startswith("ASelectDiT"):
        return model_class
    return DIFFUSION_CLASSES[model_class.__name__.removeprefix("ASelectDiT")]


def saved_class(folder: Path) -> type[NoisyPreTrainedModel]:
    """The class that a checkpoint of this package was saved with, its head included."""
    content = read_json(folder / "config.json")
    names = content.get("architectures") or []
    dit = (*map(head_class, TASKS.values()), ASelectDiTBackbone, ASelectDiTModel)
    classes = [family_class(each, content.get("model_type", "")) for each in dit]
    return next((known for known in classes if known.__name__ in names), classes[-1])


def load_model(
    source: str | Path,
    model_class: type[NoisyPreTrainedModel] = ASelectDiTModel,
    *,
    new_head: bool = False,
    **keywords: Any,
) -> Any:
    """Call `from_pretrained` after checks of the files; errors name the checkpoint.

    Args:
        source: folder or Hub id, or `"sample"` for the model that ships with the package.
        model_class: class to load; of another family of networks, the class for the same task.
        new_head: start with a new head if the checkpoint has none, or has one for other classes.
        keywords: loading options as in `convert_checkpoint` (pickles are never read), and config fields to override.

    Raises:
        TypeError: a keyword is unknown.
        ValueError: the checkpoint is another model, its weights are damaged, or keys are missing or unexpected.
    """
    options, config = split_keywords("load_model", keywords, also_diffusion=True)
    place = locate(source, options)
    path = place.path
    if detect_format(path) != "aselect":
        raise ValueError(f"{source} is a diffusers checkpoint: load it with aselect_hf.from_diffusers")
    try:
        model_type = read_json(path / "config.json").get("model_type", "")
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {source} cannot be read: {first_line(error)}") from error
    model_class = family_class(model_class, model_type)
    prefix = f"{model_class.base_model_prefix}."
    asked = {"variant": options.variant, "dtype": options.dtype}
    reading: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    try:
        stored: Any = model_class.config_class.from_pretrained(path)
        names = stored_names(weight_files(path, options.variant, allow_pickle=None))
        blocks = [name.removeprefix(prefix) for name in names]
        if isinstance(stored, ASelectDiTConfig):
            check_depth(f"checkpoint {source}", stored.num_kept_layers, blocks, "layers")
        model, report = model_class.from_pretrained(
            path, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=new_head, **reading, **config,
        )  # fmt: skip
    except (SafetensorError, OSError, RuntimeError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {source} cannot be read: {first_line(error)}") from error
    derived = () if model.config.fixed_timestep else tuple(DERIVED_KEYS)
    missing = {name for name in report["missing_keys"] if not name.endswith(derived)}
    missing |= {name for name, *_ in report["mismatched_keys"]}
    if new_head:
        missing = {name for name in missing if name.startswith(prefix)}
    unused = set(report["unexpected_keys"])
    if any(name.startswith(prefix) for name in names) and (new_head or model_class is not saved_class(path)):
        unused = {name for name in unused if name.startswith(prefix)}  # the others belong to a head that is not loaded
    if missing or unused:
        found = [f"{kind} {sorted(keys)}" for kind, keys in (("missing", missing), ("no place for", unused)) if keys]
        raise ValueError(f"checkpoint {source} does not fit its config: {'; '.join(found)}")
    if files := place.license_files:
        model.license_files = files
    return model


def save_model(model: NoisyPreTrainedModel, folder: str | Path) -> None:
    """Write everything that a pipeline needs: weights, config, code, and the matching image processor."""
    model.save_pretrained(folder)
    if model.config.takes_pictures:
        make_image_processor(model.config, task_of_model(model).whole_image).save_pretrained(folder)
