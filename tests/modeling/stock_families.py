"""What the stock networks compute, and what their pipelines pass to them, read without the adapters."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from torch import nn

Oracle = Callable[[Any, torch.Tensor], tuple[torch.Tensor, float, dict[str, Any]]]


LISTS = ("layers", "transformer_blocks", "joint_transformer_blocks", "single_transformer_blocks", "blocks")
"""Attributes of transformers that hold blocks, in order of computation."""


def first_of(module: nn.Module, *paths: str) -> str:
    """The first of these paths at which the module has a submodule."""
    known = dict(module.named_modules())
    return next(path for path in paths if path in known)


def stock_features(transformer: Any, inputs: dict[str, Any], config: Any) -> dict[str, torch.Tensor]:
    """Every feature of a whole run, by hooks at other places than those of the adapters."""
    found: dict[str, torch.Tensor] = {}
    height, width = config.grid_size
    count, handles = height * width, []
    image_first = type(transformer).__name__ == "ZImageTransformer2DModel"
    last = {"FluxSingleTransformerBlock", "ChromaSingleTransformerBlock"}

    def keep(name: str, value: Any) -> None:
        tokens = value.flatten(2).transpose(1, 2) if value.ndim == 4 else value
        # The text passes some modules after the image, which is kept.
        found.setdefault(name, tokens[:, :count] if image_first else tokens[:, -count:])

    def before(module: nn.Module, name: str) -> None:
        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            keep(name, args[0] if args else kwargs["hidden_states"])

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(module: nn.Module, name: str) -> None:
        handles.append(module.register_forward_hook(lambda _, __, output: keep(name, output)))

    def before_qkv(attention: Any, name: str) -> None:
        """One layer for all three, whose output is cut here by the number of heads."""

        def hook(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
            parts = output.view(*output.shape[:2], 3, attention.heads, attention.head_dim).flatten(3).unbind(2)
            for kind, part in zip(("query", "key", "value"), parts, strict=True):
                keep(f"{name}.{kind}", part)

        before(attention, f"{name}.attention_norm")
        handles.append(attention.img_qkv_proj.register_forward_hook(hook))

    def before_fused(attention: Any, name: str) -> None:
        """One layer for all three and for the MLP."""

        def hook(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
            qkv = output[..., : 3 * attention.inner_dim]
            for kind, part in zip(("query", "key", "value"), qkv.split(attention.inner_dim, dim=-1), strict=True):
                keep(f"{name}.{kind}", part)

        before(attention, f"{name}.attention_norm")
        handles.append(attention.to_qkv_mlp_proj.register_forward_hook(hook))

    blocks: list[Any] = [block for name in LISTS for block in getattr(transformer, name, ())]
    for index, block in enumerate(blocks):
        name, attention = f"blocks.{index}", block.get_submodule(first_of(block, "attn1", "attn", "attention"))
        if hasattr(attention, "img_qkv_proj"):
            before_qkv(attention, name)
        elif hasattr(attention, "to_qkv_mlp_proj"):
            before_fused(attention, name)
        else:
            before(attention.to_q, f"{name}.attention_norm")
            after(attention.to_q, f"{name}.query")
            after(attention.to_k, f"{name}.key")
            after(attention.to_v, f"{name}.value")
        if hasattr(attention, "to_qkv_mlp_proj"):
            pass  # attention and MLP have one output together
        elif hasattr(block, "feed_forward"):
            after(attention.to_out[1], f"{name}.attention")
            before(block.feed_forward, f"{name}.mlp_norm")
            after(block.feed_forward, f"{name}.mlp")
        elif hasattr(block, "down_proj"):
            after(attention, f"{name}.attention")
            before(block.up_proj, f"{name}.mlp_norm")
            after(block.down_proj, f"{name}.mlp")
        elif type(block).__name__ not in last:
            after(attention.to_out[1], f"{name}.attention")
            mlp = block.get_submodule(first_of(block, "ff", "img_mlp"))
            first = first_of(mlp, "conv_inverted", "linear_in", "linear_2", "net.0")
            before(mlp.get_submodule(first), f"{name}.mlp_norm")
            last_layer = first_of(mlp, "conv_point", "linear_out", "out_projection", "net.2")
            after(mlp.get_submodule(last_layer), f"{name}.mlp")
        else:
            after(attention, f"{name}.attention")
        end = transformer.get_submodule(first_of(transformer, "norm_out", "final_layer", "all_final_layer.2-1"))
        before(blocks[index + 1] if index + 1 < len(blocks) else end, f"{name}.hidden")
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
        kwargs |= dict(zip(inspect.signature(own).parameters, args, strict=False))
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


def flux2_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline_class = diffusers.Flux2KleinPipeline if model.config.guidance is None else diffusers.Flux2Pipeline
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    nothing = dict.fromkeys(["text_encoder", "tokenizer"])
    pipeline: Any = pipeline_class(transformer=model.transformer, scheduler=scheduler, vae=vae, **nothing)
    height, width = (4 * side for side in latents.shape[-2:])
    found = run_pipeline(
        pipeline, model, latents, guidance_scale=model.config.guidance or 1.0, height=height, width=width
    )
    noisy = found["hidden_states"].transpose(1, 2).reshape(latents.shape)
    return noisy, 1000 * scheduler.sigmas[1].item(), found


def qwen_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    nothing = dict.fromkeys(["vae", "text_encoder", "tokenizer"])
    pipeline: Any = diffusers.QwenImagePipeline(transformer=model.transformer, scheduler=scheduler, **nothing)
    batch, channels, height, width = latents.shape
    packed = pipeline._pack_latents(latents, batch, channels, height, width)
    found = run_pipeline(pipeline, model, packed, true_cfg_scale=1.0, height=8 * height, width=8 * width)
    noisy = pipeline._unpack_latents(found["hidden_states"], 8 * height, 8 * width, 8)[:, :, 0]
    return noisy, 1000 * scheduler.sigmas[1].item(), found


def lumina2_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    vae = tiny_vae(model.config.num_channels, 8)
    pipeline: Any = diffusers.Lumina2Pipeline(
        transformer=model.transformer, scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None
    )
    pipeline.set_progress_bar_config(disable=True)
    height, width = (8 * side for side in latents.shape[-2:])
    found = record(
        model.transformer,
        lambda: pipeline(
            prompt_embeds=model.conditioning_prompt_embeds[None],
            prompt_attention_mask=model.conditioning_prompt_attention_mask[None].long(), latents=latents,
            num_inference_steps=4, output_type="latent", guidance_scale=1.0, height=height, width=width,
        ),
    )  # fmt: skip
    return found["hidden_states"], 1000 * scheduler.sigmas[1].item(), found


def z_image_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    """Its pipeline takes and passes lists with one tensor an image."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = tiny_vae(model.config.num_channels, 8)
    pipeline: Any = diffusers.ZImagePipeline(
        transformer=model.transformer, scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None
    )
    pipeline.set_progress_bar_config(disable=True)
    height, width = (8 * side for side in latents.shape[-2:])
    found = record(
        model.transformer,
        lambda: pipeline(
            prompt_embeds=[model.conditioning_prompt_embeds], latents=latents, num_inference_steps=4,
            output_type="latent", guidance_scale=0.0, height=height, width=width,
        ),
    )  # fmt: skip
    return found["x"][0][:, 0][None], 1000 * scheduler.sigmas[1].item(), found


def prx_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline: Any = diffusers.PRXPipeline(
        transformer=model.transformer, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None
    )
    height, width = (8 * side for side in latents.shape[-2:])
    found = run_pipeline(
        pipeline, model, latents, guidance_scale=1.0, height=height, width=width, use_resolution_binning=False
    )
    return found["hidden_states"], 1000 * scheduler.sigmas[1].item(), found


def auraflow_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    """The mask is not passed on: its pipeline has set masked tokens to zero when it encoded them."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    vae = tiny_vae(model.config.num_channels)
    pipeline: Any = diffusers.AuraFlowPipeline(
        transformer=model.transformer, scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None
    )
    height, width = (2 * side for side in latents.shape[-2:])
    found = run_pipeline(
        pipeline, model, latents, guidance_scale=1.0, height=height, width=width,
        prompt_attention_mask=torch.ones(1, 5),
    )  # fmt: skip
    return found["hidden_states"], 1000 * scheduler.sigmas[1].item(), found


def cogview_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    """The noise of the step is its sigma, and the time that the pipeline passes is another one."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_image_seq_len=256, base_shift=0.25, max_shift=0.75
    )
    vae = tiny_vae(model.config.num_channels, 8)
    pipeline: Any = diffusers.CogView4Pipeline(
        transformer=model.transformer, scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None
    )
    height, width = (8 * side for side in latents.shape[-2:])
    found = run_pipeline(pipeline, model, latents, guidance_scale=1.0, height=height, width=width)
    time = 1000 * scheduler.sigmas[1].item()
    assert abs(time - found["timestep"].item()) > 50
    return found["hidden_states"], time, found


def hunyuan_oracle(model: Any, latents: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.018, prediction_type="v_prediction"
    )
    vae = tiny_vae(model.config.num_channels, 8)
    nothing = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    pipeline: Any = diffusers.HunyuanDiTPipeline(
        transformer=model.transformer, scheduler=scheduler, vae=vae, requires_safety_checker=False, **nothing
    )
    height, width = (8 * side for side in latents.shape[-2:])
    found = run_pipeline(
        pipeline, model, latents, guidance_scale=1.0, height=height, width=width, use_resolution_binning=False
    )
    return found["hidden_states"], scheduler.timesteps[1].item(), found


ORACLES: dict[str, Oracle] = {
    "SD3Transformer2DModel": sd3_oracle,
    "FluxTransformer2DModel": packed_oracle("FluxPipeline"),
    "ChromaTransformer2DModel": packed_oracle("ChromaPipeline"),
    "PixArtTransformer2DModel": pixart_oracle,
    "SanaTransformer2DModel": sana_oracle,
    "Flux2Transformer2DModel": flux2_oracle,
    "QwenImageTransformer2DModel": qwen_oracle,
    "Lumina2Transformer2DModel": lumina2_oracle,
    "ZImageTransformer2DModel": z_image_oracle,
    "PRXTransformer2DModel": prx_oracle,
    "AuraFlowTransformer2DModel": auraflow_oracle,
    "HunyuanDiT2DModel": hunyuan_oracle,
    "CogView4Transformer2DModel": cogview_oracle,
}
