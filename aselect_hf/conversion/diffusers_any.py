"""Conversion of diffusers' pipelines and transformers of any supported family."""

from __future__ import annotations

import inspect
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
    current_class,
    fetch_text_encoders,
    fetch_vae,
    fetch_weights,
    locate,
    split_keywords,
    transformer_class,
)
from aselect_hf.conversion.prompts import (
    Tensors,
    check_encoders,
    encode_prompt,
    encode_with,
    given_prompt,
    loaded_parts,
    text_parts,
    unbatched_prompt,
    with_tokenizers,
)
from aselect_hf.conversion.transformer import (
    build_diffusion,
    crop_positions,
    dropped_blocks,
    kept_positions,
    read_tensors,
)
from aselect_hf.conversion.weights import refuse_quantized, weight_files
from aselect_hf.modeling.configuration_aselect_diffusion import ASelectDiffusionConfig
from aselect_hf.modeling.families import find_family
from aselect_hf.modeling.family import Family
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
    prompt: Tensors | None = None

    def choose_prompt(self, family: Family, prompt: str, prompt_embeds: Any, skip_text_encoders: Sequence[str]) -> None:
        """Read an encoded prompt, or check that the encoders of the others are there.

        Raises:
            ValueError: the arguments contradict each other or the source.
        """
        if prompt_embeds is not None:
            if prompt or skip_text_encoders:
                raise ValueError("prompt_embeds stand for a prompt: leave prompt and skip_text_encoders out")
            self.prompt = unbatched_prompt(given_prompt(prompt_embeds), family, {**family.defaults, **self.config})
            return
        if self.pipeline is not None:
            parts = loaded_parts(self.pipeline)
        elif self.index is not None:
            parts = text_parts(self.index)
        else:
            raise ValueError("a transformer alone has no text encoder: pass prompt_embeds, or the whole pipeline")
        check_encoders(family.transformer_class, skip_text_encoders, parts)


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
        ImportError: the installed diffusers is older than the family needs.
        ValueError: the source is missing, damaged, quantized or of another family; or an argument contradicts it.
    """
    if keep not in ("feature", "all"):
        raise ValueError(f"keep must be 'feature' or 'all', got {keep!r}")
    text = {
        "prompt": prompt or None, "prompt_embeds": prompt_embeds, "skip_text_encoders": skip_text_encoders or None,
        "guidance": guidance,
    }  # fmt: skip
    asked, config = split_keywords("from_diffusers", keywords, also_diffusion=True)
    config |= {"feature": feature, "image_size": image_size}
    options = options or asked
    place = locate(source, options, with_vae=vae is None) if isinstance(source, str | Path) else source
    in_memory = type(getattr(place, "transformer", place)).__name__
    class_name = transformer_class(place.path) if isinstance(place, Source) else in_memory
    if class_name is None or class_name in DIT:
        for name, value in text.items():
            if value is not None:
                raise ValueError(f"{name} is given, but a DiT is conditioned on classes, not on text: leave it out")
        given = {name: value for name, value in config.items() if value is not None or name in keywords}
        chosen = {} if model_class is None else {"model_class": model_class}
        return load_diffusers(
            place, vae=vae, vae_decoder=vae_decoder, scheduler=scheduler, options=options, **chosen, **given
        )
    if model_class is not None and issubclass(model_class, ASelectDiTPreTrainedModel):
        raise ValueError(
            f"{model_class.__name__} is for a DiT, but this is a {class_name}: use aselect_hf.from_diffusers"
        )
    family = find_family(class_name)
    family.stock_class()  # refuses an old diffusers
    found = _read_folder(place) if isinstance(place, Source) else _read_memory(place)
    found.choose_prompt(family, prompt, prompt_embeds, skip_text_encoders)
    found.vae = load_vae(vae, options) if vae is not None else _own_vae(place, found, options)
    fields = _origin(place) | config
    fields |= {
        "transformer_class": class_name,
        "transformer_config": {key: x for key, x in found.config.items() if not key.startswith("_")},
        "guidance": guidance, "prompt": prompt, "skipped_text_encoders": list(skip_text_encoders) or None,
    }  # fmt: skip
    if found.vae is not None:
        fields |= vae_fields(found.vae, vae_decoder)
    fields["scheduler_config"] = scheduler_config(scheduler) if scheduler is not None else found.scheduler
    if fields.get("noise_schedule") is None and fields["scheduler_config"] is not None:
        fields["noise_schedule"] = _schedule(class_name, fields["scheduler_config"])
    whole = ASelectDiffusionConfig(**fields)  # refuses what contradicts the source before any encoder is read
    fields["feature"] = feature or default_feature(whole.num_hidden_layers)
    if keep == "feature":
        fields |= _kept(whole, [fields["feature"], *(config.get("head_features") or ())], image_size is not None)
    tensors = unbatched_prompt(_encode(place, found, prompt, skip_text_encoders, options), whole.family, whole.shape)
    fields["conditioning"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
    checked = ASelectDiffusionConfig(**fields)
    model = build_diffusion(
        found.name, checked, _weights(place, found, checked, options), found.vae, tensors,
        model_class or ASelectDiffusionModel, options.dtype,
    )  # fmt: skip
    if isinstance(place, Source):
        model.license_files = place.license_files
    return model


def _origin(place: Any) -> dict[str, Any]:
    """Where the weights are from, as fields of the config."""
    if not isinstance(place, Source):
        return {}
    origin = {"base_model": place.hub_id} | license_fields(place.card, place.hub_id)
    return {name: value for name, value in origin.items() if value is not None}


def _kept(whole: ASelectDiffusionConfig, features: Sequence[str], fixed_size: bool) -> dict[str, int | None]:
    """What is kept of a network for these features, as fields of the config; `None` stands for all."""
    blocks = max(whole.resolve_feature(name).block for name in features) + 1
    return {
        "kept_blocks": blocks if blocks < whole.num_hidden_layers else None,
        "kept_positions": kept_positions(whole) if fixed_size else None,
    }


def _read_folder(place: Source) -> Pipeline:
    index = place.path / "model_index.json"
    pipeline = index.is_file()
    folder = place.path / "transformer" if pipeline else place.path
    found = Pipeline(str(folder), _current(read_fields(folder / "config.json")), folder=folder)
    if pipeline:
        found.index = read_fields(index)
        if (scheduler := place.path / "scheduler" / "scheduler_config.json").is_file():
            found.scheduler = scheduler_config(read_fields(scheduler))
    refuse_quantized(found.name, found.config)
    return found


def _current(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a class that has another name today, with the fields that this class has."""
    name = current_class(config)
    if name == config["_class_name"]:
        return config
    fields = inspect.signature(find_family(name).stock_class().__init__).parameters
    return {"_class_name": name} | {field: value for field, value in config.items() if field in fields}


def _read_memory(source: Any) -> Pipeline:
    transformer = getattr(source, "transformer", source)
    config = json.loads(json.dumps(dict(transformer.config), default=list))
    found = Pipeline(type(source).__name__, config, transformer=transformer)
    refuse_quantized(found.name, config, transformer.named_parameters())
    if source is not transformer:
        found.pipeline = source
        found.scheduler = scheduler_config(source.scheduler)
    return found


def _own_vae(place: Any, found: Pipeline, options: LoadingOptions) -> Any:
    """The VAE of a pipeline; `None` if it has none."""
    if found.pipeline is not None:
        vae = getattr(found.pipeline, "vae", None)
        return None if vae is None else load_vae(vae)
    if found.index is None or not (place.path / "vae").is_dir():
        return None
    fetch_vae(place, options)
    return load_vae(place.path / "vae", options)


def _schedule(class_name: str, scheduler: dict[str, Any]) -> dict[str, Any]:
    """The noise schedule of a family with the fields of its scheduler.

    Raises:
        ValueError: the scheduler is for another process.
    """
    family = find_family(class_name)
    own = dict(family.schedule)
    flow = "FlowMatch" in scheduler["_class_name"] or scheduler.get("use_flow_sigmas", False)
    if flow != (own["type"] == "flow_matching"):
        raise ValueError(f"{scheduler['_class_name']} does not fit a {class_name}: pass scheduler or noise_schedule")
    for name, value in family.scheduler.items():
        if scheduler.get(name) != value:
            raise ValueError(
                f"a {class_name} needs a scheduler with {name}={value!r}, got {scheduler.get(name)!r}: pass the "
                "published one as scheduler"
            )
    if flow:
        return own | {"num_train_timesteps": scheduler.get("num_train_timesteps", 1000)}
    return own | schedule_fields(scheduler)


def _encode(
    place: Any, found: Pipeline, prompt: str, skip_text_encoders: Sequence[str], options: LoadingOptions
) -> Tensors:
    """The tensors of the prompt, given or encoded."""
    if found.prompt is not None:
        return found.prompt
    if found.pipeline is not None:
        return encode_with(found.pipeline, prompt, skip_text_encoders)
    assert found.index is not None
    parts = text_parts(found.index)
    fetch_text_encoders(place, set(parts) - with_tokenizers(skip_text_encoders), options)
    return encode_prompt(place.path, found.index, found.config, prompt, skip_text_encoders, options)


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
