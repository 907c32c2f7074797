"""What the stock networks compute, and what their pipelines pass to them, read without the adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from torch import nn

Oracle = Callable[[Any, torch.Tensor], tuple[torch.Tensor, float, dict[str, Any]]]


def stock_features(transformer: Any, inputs: dict[str, Any], config: Any) -> dict[str, torch.Tensor]:
    """Every feature of a whole run, by hooks at other places than those of the adapters."""
    found: dict[str, torch.Tensor] = {}
    height, width = config.grid_size
    count, handles = height * width, []
    last = {"FluxSingleTransformerBlock", "ChromaSingleTransformerBlock"}

    def keep(name: str, value: Any) -> None:
        found[name] = (value.flatten(2).transpose(1, 2) if value.ndim == 4 else value)[:, -count:]

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


def run_pipeline(pipeline: Any, model: Any, latents: torch.Tensor, **arguments: Any) -> dict[str, Any]:
    """What a pipeline passes to the transformer at the second of four steps, with the stored prompt."""
    pipeline.set_progress_bar_config(disable=True)
    prompt = {name: getattr(model, f"conditioning_{name}")[None] for name in model.config.conditioning}
    return record(
        model.transformer,
        lambda: pipeline(**prompt, latents=latents, num_inference_steps=4, output_type="latent", **arguments),
    )


def sd3_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    nothing = dict.fromkeys(f"{part}{end}" for part in ("text_encoder", "tokenizer") for end in ("", "_2", "_3"))
    vae = tiny_vae(model.config.num_channels)
    pipeline: Any = diffusers.StableDiffusion3Pipeline(
        transformer=model.transformer, scheduler=scheduler, vae=vae, **nothing
    )
    height, width = (2 * side for side in latents.shape[-2:])
    found = run_pipeline(pipeline, model, latents, guidance_scale=0.0, height=height, width=width)
    return found["hidden_states"], 1000 * scheduler.sigmas[1].item(), found


def packed_oracle(pipeline_class: str) -> Oracle:
    """Of FLUX.1 and Chroma. Latents are packed and unpacked by the pipeline's own methods."""

    def oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        nothing = dict.fromkeys(["text_encoder", "tokenizer"])
        if pipeline_class == "FluxPipeline":
            nothing |= dict.fromkeys(["text_encoder_2", "tokenizer_2"])
        vae = tiny_vae(model.config.num_channels)
        pipeline: Any = getattr(diffusers, pipeline_class)(
            transformer=model.transformer, scheduler=scheduler, vae=vae, **nothing
        )
        batch, channels, height, width = latents.shape
        packed = pipeline._pack_latents(latents, batch, channels, height, width)
        found = run_pipeline(
            pipeline, model, packed, guidance_scale=model.config.guidance or 0.0, height=2 * height, width=2 * width
        )
        noisy = pipeline._unpack_latents(found["hidden_states"], 2 * height, 2 * width, 2)
        return noisy, 1000 * scheduler.sigmas[1].item(), found

    return oracle


def pixart_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    alpha = model.transformer.use_additional_conditions
    scheduler = diffusers.DPMSolverMultistepScheduler()
    vae = tiny_vae(model.config.num_channels, 8)
    pipeline: Any = (diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline)(
        transformer=model.transformer, scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None
    )
    height, width = (8 * side for side in latents.shape[-2:])
    found = run_pipeline(
        pipeline, model, latents, guidance_scale=1.0, height=height, width=width, use_resolution_binning=False,
        negative_prompt=None,
    )  # fmt: skip
    return found["hidden_states"], scheduler.timesteps[1].item(), found


def sana_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    """The time is 1000 times the sigma of the step, up to the rounding of the sampler's own timesteps."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    pipeline: Any = diffusers.SanaPipeline(
        transformer=model.transformer, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None
    )
    height, width = (32 * side for side in latents.shape[-2:])
    found = run_pipeline(
        pipeline, model, latents, guidance_scale=1.0, height=height, width=width, use_resolution_binning=False,
        negative_prompt=None,
    )  # fmt: skip
    time = scheduler.timesteps[1].item()
    assert abs(time - 1000 * scheduler.sigmas[1].item()) < 1
    return found["hidden_states"], time, found


ORACLES: dict[str, Oracle] = {
    "SD3Transformer2DModel": sd3_oracle,
    "FluxTransformer2DModel": packed_oracle("FluxPipeline"),
    "ChromaTransformer2DModel": packed_oracle("ChromaPipeline"),
    "PixArtTransformer2DModel": pixart_oracle,
    "SanaTransformer2DModel": sana_oracle,
}
