"""Conversion of diffusers' pipelines and transformers of any supported family."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from aselect_hf.conversion.assemble import load_vae, vae_fields
from aselect_hf.conversion.diffusers_dit import load_diffusers, read_fields, schedule_fields, scheduler_config
from aselect_hf.conversion.licenses import license_fields
from aselect_hf.conversion.locate import (
    DIT,
    LoadingOptions,
    Source,
    fetch_text_encoders,
    fetch_vae,
    fetch_weights,
    locate,
    split_keywords,
    transformer_class,
)
from aselect_hf.conversion.prompts import Tensors, encode_prompt, encode_with, given_prompt, skipped_parts, text_parts
from aselect_hf.conversion.transformer import (
    build_diffusion,
    crop_positions,
    dropped_blocks,
    kept_positions,
    read_tensors,
)
from aselect_hf.conversion.weights import weight_files
from aselect_hf.modeling.configuration_aselect_diffusion import ASelectDiffusionConfig
from aselect_hf.modeling.families import find_family
from aselect_hf.modeling.features import default_feature
from aselect_hf.modeling.modeling_aselect_diffusion import ASelectDiffusionModel
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTPreTrainedModel

Keep = Literal["feature", "all"]


@dataclass
class Pipeline:
    """What a pipeline says, before its weights are read."""

    name: str
    config: dict[str, Any]
    scheduler: dict[str, Any] | None = None
    folder: Path | None = None
    index: dict[str, Any] | None = None
    transformer: Any = None
    pipeline: Any = None
    vae: Any = None


def from_diffusers(
    source: Any,
    *,
    prompt: str = "",
    prompt_embeds: Any = None,
    skip_text_encoders: Sequence[str] = (),
    feature: str | None = None,
    keep: Keep = "feature",
    image_size: int | None = None,
    guidance: float | None = None,
    vae: Any = None,
    vae_decoder: bool = False,
    scheduler: Any = None,
    model_class: Any = None,
    options: LoadingOptions | None = None,
    **keywords: Any,
) -> Any:
    """A pretrained diffusion transformer of diffusers as a vision backbone.

    Args:
        source: a pipeline or transformer, as a folder, a Hub id, or an object. A DiT becomes an `ASelectDiTModel`, and
            every other supported network an `ASelectDiffusionModel`.
        prompt: text to encode once and store, so that no text encoder is needed again. For Sana it is encoded without
            the pipeline's long instruction.
        prompt_embeds: an encoded prompt in place of `prompt`, so that no encoder is loaded: tensors by the names of the
            pipeline's arguments (`prompt_embeds`, `pooled_prompt_embeds`, `prompt_attention_mask`), or a safetensors
            file of them.
        skip_text_encoders: names of encoders to leave out, such as `["text_encoder_3"]`.
        feature: name of the feature (default: the query at 0.40 of the depth).
        keep: `"feature"` keeps the blocks up to that of the feature, and the others are not even read; `"all"` keeps
            all, so that the model can also denoise.
        image_size: side in pixels (default: that of the network). With `keep="feature"`, positions for larger images
            are left out where they are a stored table (Stable Diffusion 3).
        guidance: guidance scale of a network that takes one as an input.
        vae: folder, Hub id or autoencoder that replaces the source's VAE.
        vae_decoder: keep the VAE's decoder.
        scheduler: a diffusers scheduler or its config that replaces the source's scheduler.
        model_class: class to build, with or without a head (default: by the transformer).
        options: loading options; they replace those among `keywords`.
        keywords: loading options as in `load_diffusers`, and fields of the config.

    Raises:
        TypeError: a keyword is unknown.
        ValueError: the source is missing, damaged or of another family; or an argument contradicts it.
    """
    own = {
        "prompt": prompt, "prompt_embeds": prompt_embeds, "skip_text_encoders": list(skip_text_encoders) or None,
        "guidance": guidance, "image_size": image_size, "feature": feature,
    }  # fmt: skip
    if keep not in ("feature", "all"):
        raise ValueError(f"keep must be 'feature' or 'all', got {keep!r}")
    asked, config = split_keywords("from_diffusers", keywords, also_diffusion=True)
    options = options or asked
    place = locate(source, options, with_vae=vae is None) if isinstance(source, str | Path) else source
    in_memory = type(getattr(place, "transformer", place)).__name__
    class_name = transformer_class(place.path) if isinstance(place, Source) else in_memory
    if class_name is None or class_name in DIT:
        for name in ("prompt", "prompt_embeds", "skip_text_encoders", "guidance"):
            if own[name]:
                raise ValueError(f"{name} is given, but a DiT is conditioned on classes, not on text: leave it out")
        fields = {name: own[name] for name in ("feature", "image_size") if own[name] is not None}
        chosen = {} if model_class is None else {"model_class": model_class}
        return load_diffusers(
            place, vae=vae, vae_decoder=vae_decoder, scheduler=scheduler, options=options, **chosen, **fields, **config
        )
    if model_class is not None and issubclass(model_class, ASelectDiTPreTrainedModel):
        raise ValueError(
            f"{model_class.__name__} is for a DiT, but this is a {class_name}: use aselect_hf.from_diffusers"
        )
    find_family(class_name)
    found = _read_folder(place, options, vae is None) if isinstance(place, Source) else _read_memory(place, vae is None)
    if prompt_embeds is not None and (prompt or skip_text_encoders):
        raise ValueError("prompt_embeds stand for a prompt: leave prompt and skip_text_encoders out")
    if vae is not None:
        found.vae = load_vae(vae, options)
    fields = config | {
        "transformer_class": class_name,
        "transformer_config": {key: x for key, x in found.config.items() if not key.startswith("_")},
        "image_size": image_size, "guidance": guidance, "feature": feature, "prompt": prompt,
        "skipped_text_encoders": list(skip_text_encoders) or None,
    }  # fmt: skip
    if isinstance(place, Source):
        origin = {"base_model": place.hub_id} | license_fields(place.card, place.hub_id)
        fields = {name: value for name, value in origin.items() if value is not None} | fields
    if found.vae is not None:
        fields |= vae_fields(found.vae, vae_decoder)
    fields["scheduler_config"] = scheduler_config(scheduler) if scheduler is not None else found.scheduler
    if fields.get("noise_schedule") is None and fields["scheduler_config"] is not None:
        fields["noise_schedule"] = _schedule(class_name, fields["scheduler_config"])
    whole = ASelectDiffusionConfig(**fields)  # refuses what contradicts the source before any encoder is read
    fields["feature"] = feature or default_feature(whole.num_hidden_layers)
    kept = whole.resolve_feature(fields["feature"]).block + 1
    fields["kept_blocks"] = kept if keep == "feature" and kept < whole.num_hidden_layers else None
    if keep == "feature" and image_size is not None:
        fields["kept_positions"] = kept_positions(whole)
    tensors = _prompt(place, found, prompt, prompt_embeds, skip_text_encoders, options)
    fields["conditioning"] = {name: list(_unbatched(name, x).shape) for name, x in tensors.items()}
    checked = ASelectDiffusionConfig(**fields)
    return build_diffusion(
        found.name,
        checked,
        _weights(place, found, checked, options),
        found.vae,
        tensors,
        model_class or ASelectDiffusionModel,
        options.dtype,
    )


def _read_folder(place: Source, options: LoadingOptions, with_vae: bool) -> Pipeline:
    index = place.path / "model_index.json"
    pipeline = index.is_file()
    folder = place.path / "transformer" if pipeline else place.path
    found = Pipeline(str(folder), read_fields(folder / "config.json"), folder=folder)
    if pipeline:
        found.index = read_fields(index)
        if with_vae and (place.path / "vae").is_dir():
            fetch_vae(place, options)
            found.vae = load_vae(place.path / "vae", options)
        if (scheduler := place.path / "scheduler" / "scheduler_config.json").is_file():
            found.scheduler = scheduler_config(read_fields(scheduler))
    if found.config.get("quantization_config"):
        raise ValueError(f"{folder} holds a quantized transformer, which cannot be converted: use the original weights")
    return found


def _read_memory(source: Any, with_vae: bool) -> Pipeline:
    transformer = getattr(source, "transformer", source)
    config = json.loads(json.dumps(dict(transformer.config), default=list))
    found = Pipeline(type(source).__name__, config, transformer=transformer)
    if getattr(transformer, "hf_quantizer", None) is not None:
        raise ValueError("the transformer is quantized and cannot be converted: use the original weights")
    if source is not transformer:
        found.pipeline = source
        found.scheduler = scheduler_config(source.scheduler)
        if with_vae and getattr(source, "vae", None) is not None:
            found.vae = load_vae(source.vae)
    return found


def _schedule(class_name: str, scheduler: dict[str, Any]) -> dict[str, Any]:
    """The noise schedule of a family with the fields of its scheduler.

    Raises:
        ValueError: the scheduler is for another process.
    """
    own = dict(find_family(class_name).schedule)
    flow = "FlowMatch" in scheduler["_class_name"] or scheduler.get("use_flow_sigmas", False)
    if flow != (own["type"] == "flow_matching"):
        raise ValueError(f"{scheduler['_class_name']} does not fit a {class_name}: pass scheduler or noise_schedule")
    if flow:
        return own | {"num_train_timesteps": scheduler.get("num_train_timesteps", 1000)}
    return own | schedule_fields(scheduler)


def _prompt(
    place: Any,
    found: Pipeline,
    prompt: str,
    prompt_embeds: Any,
    skip_text_encoders: Sequence[str],
    options: LoadingOptions,
) -> Tensors:
    """The tensors of the prompt, given or encoded."""
    if prompt_embeds is not None:
        return given_prompt(prompt_embeds)
    if found.pipeline is not None:
        return encode_with(found.pipeline, prompt, skip_text_encoders)
    if found.index is None:
        raise ValueError("a transformer alone has no text encoder: pass prompt_embeds, or the whole pipeline")
    parts = text_parts(found.index)
    fetch_text_encoders(place, set(parts) - skipped_parts(skip_text_encoders, parts), options)
    return encode_prompt(place.path, found.index, found.config, prompt, skip_text_encoders, options)


def _unbatched(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the prompt without its batch of 1."""
    if tensor.ndim == (3 if name == "prompt_embeds" else 2):
        if tensor.shape[0] != 1:
            raise ValueError(f"prompt_embeds: {name} must hold one prompt, got a batch of {tensor.shape[0]}")
        return tensor[0]
    return tensor


def _weights(
    place: Any, found: Pipeline, config: ASelectDiffusionConfig, options: LoadingOptions
) -> Iterator[tuple[str, torch.Tensor]]:
    """The transformer's weights of the blocks that are kept; those of the others are neither fetched nor read."""
    return crop_positions(_tensors(place, found, dropped_blocks(config), options), config)


def _tensors(
    place: Any, found: Pipeline, dropped: tuple[str, ...], options: LoadingOptions
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the transformer, without those whose names start with one of `dropped`."""
    if found.transformer is not None:
        state = found.transformer.state_dict()
        return ((name, tensor) for name, tensor in state.items() if not name.startswith(dropped))
    assert found.folder is not None
    fetch_weights(place, "transformer" if found.index is not None else "", options, dropped=dropped)
    return read_tensors(weight_files(found.folder, options.variant, options.allow_pickle, dropped), dropped)
