"""What the stock networks compute, and what their pipelines pass to them, read without the adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

Oracle = Callable[[Any, torch.Tensor], tuple[torch.Tensor, float, dict[str, Any]]]


def stock_features(transformer: Any, inputs: dict[str, Any], config: Any) -> dict[str, torch.Tensor]:
    """Every feature of a whole run, by hooks at other places than those of the adapters."""
    found: dict[str, torch.Tensor] = {}
    height, width = config.grid_size
    count, handles = height * width, []
    last = {"FluxSingleTransformerBlock"}

    def keep(name: str, value: Any) -> None:
        found[name] = value[:, -count:]

    def before(module: nn.Module, name: str) -> None:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            keep(name, args[0] if args else kwargs["hidden_states"])

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(module: nn.Module, name: str) -> None:
        handles.append(module.register_forward_hook(lambda _, __, output: keep(name, output)))

    blocks: list[Any] = [
        block
        for name in ("transformer_blocks", "single_transformer_blocks")
        for block in getattr(transformer, name, ())
    ]
    for index, block in enumerate(blocks):
        name, attention = f"blocks.{index}", getattr(block, "attn1", None) or block.attn
        before(attention.to_q, f"{name}.attention_norm")
        after(attention.to_q, f"{name}.query")
        after(attention.to_k, f"{name}.key")
        after(attention.to_v, f"{name}.value")
        if type(block).__name__ not in last:
            after(attention.to_out[1], f"{name}.attention")
            first = block.ff.conv_inverted if hasattr(block.ff, "conv_inverted") else block.ff.net[0]
            before(first, f"{name}.mlp_norm")
            after(block.ff.conv_point if hasattr(block.ff, "conv_point") else block.ff.net[2], f"{name}.mlp")
        else:
            after(attention, f"{name}.attention")
        before(blocks[index + 1] if index + 1 < len(blocks) else transformer.norm_out, f"{name}.hidden")
    transformer(**inputs)
    for handle in handles:
        handle.remove()
    order = {name: place for place, name in enumerate(config.list_features())}
    return dict(sorted(found.items(), key=lambda pair: order[pair[0]]))


def tiny_vae(channels: int, downsampling: int = 2) -> Any:
    levels = downsampling.bit_length()
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        scaling_factor=0.2,
        shift_factor=0.1,
    )


class RecordedError(Exception):
    """The pipeline has passed its inputs on."""


def record(transformer: Any, run: Callable[[], Any], step: int = 1) -> dict[str, Any]:
    """Keyword arguments of the transformer's call at a step of a pipeline."""
    calls: list[dict[str, Any]] = []
    own = transformer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs["hidden_states"] = args[0]
        calls.append(kwargs)
        if len(calls) > step:
            raise RecordedError
        return own(**kwargs)

    transformer.forward = forward
    try:
        with contextlib.suppress(RecordedError):
            run()
    finally:
        del transformer.forward
    return {
        name: value
        for name, value in calls[step].items()
        if value is not None and name not in ("return_dict", "joint_attention_kwargs", "attention_kwargs")
    }


def sd3_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=model.transformer, scheduler=scheduler, vae=tiny_vae(model.config.num_channels),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    found = record(
        model.transformer,
        lambda: pipeline(
            prompt_embeds=model.conditioning_prompt_embeds[None],
            pooled_prompt_embeds=model.conditioning_pooled_prompt_embeds[None],
            latents=latents, guidance_scale=0.0, num_inference_steps=4, output_type="latent",
            height=2 * latents.shape[-2], width=2 * latents.shape[-1],
        ),
    )  # fmt: skip
    return found["hidden_states"], 1000 * scheduler.sigmas[1].item(), found


ORACLES: dict[str, Oracle] = {"SD3Transformer2DModel": sd3_oracle}
