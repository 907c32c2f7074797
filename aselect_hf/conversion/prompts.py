"""Prompts, encoded once by the text encoders of a pipeline."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from aselect_hf.conversion.locate import LoadingOptions
from aselect_hf.conversion.weights import first_line
from aselect_hf.modeling.family import Family

Tensors = dict[str, torch.Tensor]


def _pooled(pipeline: Any, prompt: str) -> Tensors:
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _flux(pipeline: Any, prompt: str) -> Tensors:
    embeds, pooled, _ = pipeline.encode_prompt(prompt, None)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _chroma(pipeline: Any, prompt: str) -> Tensors:
    embeds, _, mask, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def _unguided(pipeline: Any, prompt: str) -> Tensors:
    embeds, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds}


def _hunyuan(pipeline: Any, prompt: str) -> Tensors:
    found: Tensors = {}
    for index, end in enumerate(("", "_2")):
        embeds, _, mask, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, text_encoder_index=index)
        found |= {f"prompt_embeds{end}": embeds, f"prompt_attention_mask{end}": mask}
    return found


def _masked(pipeline: Any, prompt: str) -> Tensors:
    embeds, mask, _, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def _embeds(pipeline: Any, prompt: str) -> Tensors:
    embeds, _ = pipeline.encode_prompt(prompt)
    return {"prompt_embeds": embeds}


def _qwen_image(pipeline: Any, prompt: str) -> Tensors:
    embeds, _ = pipeline.encode_prompt(prompt, max_sequence_length=512)  # the most that its call takes by default
    return {"prompt_embeds": embeds}


def _z_image(pipeline: Any, prompt: str) -> Tensors:
    (embeds,), _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds[None]}


ENCODERS: dict[str, Callable[[Any, str], Tensors]] = {
    "SD3Transformer2DModel": _pooled,
    "FluxTransformer2DModel": _flux,
    "ChromaTransformer2DModel": _chroma,
    "PixArtTransformer2DModel": _masked,
    "SanaTransformer2DModel": _masked,
    "Flux2Transformer2DModel": _embeds,
    "QwenImageTransformer2DModel": _qwen_image,
    "Lumina2Transformer2DModel": _masked,
    "ZImageTransformer2DModel": _z_image,
    "PRXTransformer2DModel": _masked,
    "AuraFlowTransformer2DModel": _unguided,
    "HunyuanDiT2DModel": _hunyuan,
    "CogView4Transformer2DModel": _unguided,
}
"""By class of the transformer: what a pipeline's `encode_prompt` returns, by the names of the pipeline's arguments."""


OPTIONAL: dict[str, tuple[str, ...]] = {"SD3Transformer2DModel": ("text_encoder_3",)}
"""By class of the transformer: text encoders in whose place its pipeline puts zeros."""


PACKAGES = {"PRXTransformer2DModel": "ftfy"}
"""By class of the transformer: a package with which its pipeline cleans prompts, and without which it fails."""


def text_parts(index: dict[str, Any]) -> list[str]:
    """Names of the text encoders and tokenizers in a `model_index.json` that are there."""
    return [
        name
        for name, found in index.items()
        if name.startswith(("text_encoder", "tokenizer")) and isinstance(found, list) and found[0] is not None
    ]


def loaded_parts(pipeline: Any) -> list[str]:
    """Names of the text encoders and tokenizers of a pipeline in memory that are there."""
    return [
        name
        for name, part in pipeline.components.items()
        if name.startswith(("text_encoder", "tokenizer")) and part is not None
    ]


def check_encoders(transformer_class: str, skip_text_encoders: Sequence[str], parts: Sequence[str]) -> None:
    """Check that a prompt can be encoded without some of a pipeline's encoders.

    Raises:
        ImportError: the pipeline needs a package that is missing.
        ValueError: the pipeline has no such encoder, needs it, or none would be left.
    """
    package = PACKAGES.get(transformer_class)
    if package and importlib.util.find_spec(package) is None:
        raise ImportError(
            f"the pipeline of a {transformer_class} encodes prompts with {package}: pip install {package}, or pass "
            "prompt_embeds"
        )
    encoders = [name for name in parts if name.startswith("text_encoder")]
    if not encoders:
        raise ValueError("this pipeline has no text encoder: pass prompt_embeds")
    for name in skip_text_encoders:
        if name not in encoders:
            raise ValueError(f"skip_text_encoders has {name!r}, but this pipeline has {', '.join(encoders)}")
    if set(encoders) <= set(skip_text_encoders):
        raise ValueError("skip_text_encoders leaves no text encoder: pass prompt_embeds instead")
    optional = OPTIONAL.get(transformer_class, ())
    if needed := [name for name in skip_text_encoders if name not in optional]:
        others = f"it can do without {', '.join(optional)} only" if optional else "it needs all of them"
        raise ValueError(
            f"skip_text_encoders has {needed[0]!r}, but the pipeline of a {transformer_class} encodes no prompt "
            f"without it ({others}): pass prompt_embeds instead"
        )


def with_tokenizers(encoders: Sequence[str]) -> set[str]:
    """Names of text encoders and of their tokenizers."""
    return {*encoders, *(name.replace("text_encoder", "tokenizer") for name in encoders)}


@torch.no_grad()
def encode_prompt(
    folder: Path,
    index: dict[str, Any],
    transformer_config: dict[str, Any],
    prompt: str,
    skip_text_encoders: Sequence[str],
    options: LoadingOptions,
) -> Tensors:
    """Encode a prompt with the text encoders of a pipeline's folder; its other weights are not read.

    Raises:
        ValueError: an encoder cannot be read.
    """
    parts = text_parts(index)
    with torch.device("meta"):  # a pipeline asks its transformer for some sizes
        transformer = getattr(diffusers, transformer_config["_class_name"]).from_config(transformer_config)
    nothing = {name: None for name, found in index.items() if isinstance(found, list) and name not in parts}
    nothing |= dict.fromkeys(with_tokenizers(skip_text_encoders))
    nothing.pop("scheduler", None)
    try:
        pipeline: Any = getattr(diffusers, index["_class_name"]).from_pretrained(
            folder, **(nothing | {"transformer": transformer}), torch_dtype=options.dtype or torch.float32,
            variant=options.variant, use_safetensors=None if options.allow_pickle else True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise ValueError(
            f"the text encoders of {folder} cannot be read ({first_line(error)}): "
            "pass prompt_embeds, or skip_text_encoders to leave some out"
        ) from error
    return encode_with(pipeline, prompt)


@torch.no_grad()
def encode_with(pipeline: Any, prompt: str, skip_text_encoders: Sequence[str] = ()) -> Tensors:
    """Encode a prompt with a pipeline in memory, without some of its encoders."""
    components = dict(pipeline.components)
    if skip_text_encoders:
        pipeline = type(pipeline)(**(components | dict.fromkeys(with_tokenizers(skip_text_encoders))))
    return ENCODERS[type(components["transformer"]).__name__](pipeline, prompt)


def given_prompt(prompt_embeds: Any) -> Tensors:
    """Tensors of an encoded prompt, from a dictionary or a safetensors file of them.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(prompt_embeds, str | Path):
        try:
            return load_file(prompt_embeds)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"prompt_embeds {prompt_embeds} cannot be read: {first_line(error)}") from error
    if not isinstance(prompt_embeds, dict) or not all(isinstance(x, torch.Tensor) for x in prompt_embeds.values()):
        raise ValueError(
            "prompt_embeds must be a dictionary of tensors by the names of the pipeline's arguments, or a "
            f"safetensors file of them, got {type(prompt_embeds).__name__}"
        )
    return prompt_embeds


def unbatched_prompt(tensors: Tensors, family: Family, shape: Mapping[str, Any]) -> Tensors:
    """Tensors of an encoded prompt without their batch of 1.

    Args:
        tensors: `prompt_embeds` of `(tokens, width)`, masks of `(tokens,)` and pooled ones of `(width,)`, each with or
            without a batch of 1 before.
        family: of the network.
        shape: its config, which has the widths.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or not finite.
    """
    expected = family.conditioning
    if set(tensors) != set(expected):
        raise ValueError(
            f"prompt_embeds must have the tensors {', '.join(expected)} for a {family.transformer_class}, got "
            f"{', '.join(tensors) or 'none'}"
        )
    found: Tensors = {}
    tokens: dict[str, int] = {}
    for name, field in expected.items():
        found[name] = tensor = _without_batch(name, tensors[name], shape[field] if field else None)
        if name.startswith("prompt"):
            needed = shape[family.tokens[name]] if name in family.tokens else len(tensor)
            if len(tensor) != needed:
                raise ValueError(f"prompt_embeds: {name} has {len(tensor)} tokens, but this network takes {needed}")
            before = tokens.setdefault(name[-2:] if name.endswith("_2") else "", len(tensor))
            if len(tensor) != before:
                raise ValueError(f"prompt_embeds: {name} has {len(tensor)} tokens, but others have {before}")
    return found


def _without_batch(name: str, tensor: torch.Tensor, width: int | None) -> torch.Tensor:
    """One tensor without a batch of 1; `width` is not checked if it is `None`."""
    last = [] if "mask" in name else ["width" if width is None else str(width)]
    form = [*(["tokens"] if name.startswith("prompt") else []), *last]
    ndim = len(form)
    found = tensor[0] if tensor.ndim == ndim + 1 and tensor.shape[0] == 1 else tensor
    if found.ndim != ndim or not found.numel() or (width is not None and found.shape[-1] != width):
        expected = f"({', '.join(form)}{',' if ndim == 1 else ''})"
        raise ValueError(
            f"prompt_embeds: {name} must be {expected}, with or without a batch of 1, got {tuple(tensor.shape)}"
        )
    if not torch.isfinite(found).all():
        way_out = ": encode it in bfloat16 (--dtype bfloat16) or float32" if found.dtype == torch.float16 else ""
        raise ValueError(f"prompt_embeds: {name} holds NaN or infinite values in {found.dtype}{way_out}")
    return found
