"""Prompts, encoded once by the text encoders of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from aselect_hf.conversion.locate import LoadingOptions
from aselect_hf.conversion.weights import first_line

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


def _masked(pipeline: Any, prompt: str) -> Tensors:
    embeds, mask, _, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


ENCODERS: dict[str, Callable[[Any, str], Tensors]] = {
    "SD3Transformer2DModel": _pooled,
    "FluxTransformer2DModel": _flux,
    "ChromaTransformer2DModel": _chroma,
    "PixArtTransformer2DModel": _masked,
    "SanaTransformer2DModel": _masked,
}
"""By class of the transformer: what a pipeline's `encode_prompt` returns, by the names of the pipeline's arguments."""


def text_parts(index: dict[str, Any]) -> list[str]:
    """Names of the text encoders and tokenizers in a `model_index.json` that are there."""
    return [
        name
        for name, found in index.items()
        if name.startswith(("text_encoder", "tokenizer")) and isinstance(found, list) and found[0] is not None
    ]


def skipped_parts(skip_text_encoders: Sequence[str], parts: Sequence[str]) -> set[str]:
    """The encoders to leave out, with their tokenizers.

    Raises:
        ValueError: the pipeline has no such encoder, or none would be left.
    """
    encoders = [name for name in parts if name.startswith("text_encoder")]
    for name in skip_text_encoders:
        if name not in encoders:
            raise ValueError(f"skip_text_encoders has {name!r}, but this pipeline has {', '.join(encoders) or 'none'}")
    if encoders and set(encoders) <= set(skip_text_encoders):
        raise ValueError("skip_text_encoders leaves no text encoder: pass prompt_embeds instead")
    return {*skip_text_encoders, *(name.replace("text_encoder", "tokenizer") for name in skip_text_encoders)}


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
        ValueError: an encoder is missing or cannot be read.
    """
    parts = text_parts(index)
    skipped = skipped_parts(skip_text_encoders, parts)
    if not parts:
        raise ValueError(f"{folder} has no text encoder: pass prompt_embeds")
    with torch.device("meta"):  # a pipeline asks its transformer for some sizes
        transformer = getattr(diffusers, transformer_config["_class_name"]).from_config(transformer_config)
    nothing = {name: None for name, found in index.items() if isinstance(found, list) and name not in parts}
    nothing |= dict.fromkeys(skipped)
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
    """Encode a prompt with a pipeline in memory.

    Raises:
        ValueError: it has no text encoder.
    """
    components = dict(pipeline.components)
    parts = [name for name in components if name.startswith("text_encoder") and components[name] is not None]
    if not parts:
        raise ValueError("the pipeline has no text encoder: pass prompt_embeds")
    if skipped := skipped_parts(skip_text_encoders, parts):
        pipeline = type(pipeline)(**(components | dict.fromkeys(skipped)))
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
