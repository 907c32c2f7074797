"""diffusers' DiT, to ours and back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from transformers import PreTrainedModel

from aselect_hf.conversion.assemble import (
    State,
    build,
    from_diffusers_folder,
    load_vae,
)
from aselect_hf.conversion.locate import card_license, detect_format, locate
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel

logger = logging.getLogger(__name__)

SHARED_KEYS = {
    "patch_embedding": "pos_embed.proj",
    "final_layer.modulation": "proj_out_1",
    "final_layer.proj": "proj_out_2",
}
BLOCK_KEYS = {
    "modulation": "norm1.linear",
    "attention.q_proj": "attn1.to_q",
    "attention.k_proj": "attn1.to_k",
    "attention.v_proj": "attn1.to_v",
    "attention.o_proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
CONDITION_KEYS = {
    "fc1": "timestep_embedder.linear_1",
    "fc2": "timestep_embedder.linear_2",
    "class_embedding": "class_embedder.embedding_table",
}
ACTIVATIONS = {"gelu-approximate": "gelu_pytorch_tanh", "gelu": "gelu"}
SCHEDULER_FIELDS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "prediction_type",
)


def load_diffusers(
    source: str | Path,
    *,
    model_class: type[PreTrainedModel] = ASelectDiTModel,
    vae: str | Path | None = None,
    vae_decoder: bool = False,
    allow_pickle: bool = False,
    **config: Any,
) -> Any:
    """Convert a diffusers DiT: a pipeline folder, a transformer folder or a Hub id; see `convert_checkpoint`."""
    path = locate(source, allow_pickle)
    pipeline = (path / "model_index.json").is_file()
    if detect_format(path / "transformer" if pipeline else path) != "diffusers":
        raise ValueError(f"{source} is an aselect_dit checkpoint already: load it with from_pretrained")
    transformer = from_diffusers_folder(DiTTransformer2DModel, path / "transformer" if pipeline else path, allow_pickle)
    autoencoder = None
    if vae is not None:
        autoencoder = load_vae(vae, allow_pickle)
    elif pipeline and (path / "vae").is_dir():
        autoencoder = load_vae(path / "vae", allow_pickle)
    scheduler = next(iter(path.glob("scheduler/scheduler_config.json")), None)
    if scheduler is None:
        logger.warning("%s has no scheduler: assuming DDPM with linear betas, predicting epsilon", source)
    state = transformer.state_dict()
    per_block = not _embedders_equal(state, transformer.config.num_layers)
    fields = _diffusers_fields(dict(transformer.config)) | {
        "per_block_conditioning": per_block,
        "noise_schedule": _schedule_fields(json.loads(scheduler.read_text())) if scheduler else None,
        "base_model": str(source) if path != Path(source) else None,
        "base_model_license": card_license(path),
    }
    fields |= {name: value for name, value in config.items() if value is not None or name not in fields}
    return build(fields, _from_diffusers_keys(state, fields), autoencoder, vae_decoder, model_class)


def save_diffusers(model: ASelectDiTModel, folder: Path) -> None:
    """Write the DiT as diffusers does: a whole pipeline if the VAE can decode, else transformer and scheduler."""
    transformer, scheduler = to_diffusers(model)
    if model.vae is not None and model.config.vae_decoder:
        from diffusers import DiTPipeline  # here: importing pipelines is slow and noisy

        pipeline: Any = DiTPipeline(transformer=transformer, vae=model.vae, scheduler=scheduler)
        pipeline.save_pretrained(folder)
        return
    logger.warning("the model has no VAE decoder: writing transformer and scheduler; add a VAE with vae=...")
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")


def to_diffusers(model: ASelectDiTModel) -> tuple[Any, Any]:
    """The same network as a diffusers transformer, with a scheduler of its noise schedule.

    Raises:
        ValueError: diffusers' class has no such network (flow matching, an MLP ratio other than 4).
    """
    config, schedule = model.config, model.noise_schedule
    if config.fixed_timestep:
        raise config.fixed_error("conversion to diffusers")
    if schedule.type != "ddpm":
        raise ValueError("diffusers' DiT pipeline has no flow-matching model: only DDPM checkpoints convert to it")
    if config.mlp_ratio != 4:
        raise ValueError(f"diffusers' DiT has an MLP ratio of 4; this model has {config.mlp_ratio}")
    if config.timestep_freq_shift != 1:
        logger.warning("diffusers embeds timesteps with a frequency shift of 1, this model was trained with 0: "
                       "its predictions will differ slightly")  # fmt: skip
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[config.hidden_act]
    transformer: Any = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.hidden_size // config.num_attention_heads,
        in_channels=config.num_channels,
        out_channels=config.num_channels * (2 if config.learned_sigma else 1),
        num_layers=config.num_hidden_layers,
        attention_bias=config.attention_bias,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        activation_fn=activation,
        num_embeds_ada_norm=config.num_condition_classes,
        norm_eps=config.mlp_norm_eps,
    )
    ours = model.state_dict()
    theirs = {
        name: ours[key]
        for name, key in _key_pairs(config.num_hidden_layers, config.per_block_conditioning)
        if key in ours
    }
    transformer.load_state_dict(theirs)
    fields = {name: value for name in SCHEDULER_FIELDS if (value := getattr(schedule, name)) is not None}
    return transformer.to(model.dtype).eval(), DDIMScheduler(**fields, clip_sample=False)


def _diffusers_fields(config: dict[str, Any]) -> dict[str, Any]:
    if config["norm_elementwise_affine"] or config["activation_fn"] not in ACTIVATIONS:
        raise ValueError(
            "only DiTs with norm_elementwise_affine=False and a gelu activation convert; got "
            f"{config['norm_elementwise_affine']} and {config['activation_fn']!r}"
        )
    channels, out_channels = config["in_channels"], config["out_channels"] or config["in_channels"]
    if out_channels not in (channels, 2 * channels):
        raise ValueError(f"out_channels={out_channels} must be in_channels={channels} or twice that (learned sigma)")
    return {
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "patch_size": config["patch_size"],
        "sample_size": config["sample_size"],
        "num_channels": channels,
        "learned_sigma": out_channels == 2 * channels,
        "num_condition_classes": config["num_embeds_ada_norm"],
        "attention_bias": config["attention_bias"],
        "hidden_act": ACTIVATIONS[config["activation_fn"]],
        "mlp_norm_eps": config["norm_eps"],
        "timestep_freq_shift": 1,
    }


def _schedule_fields(scheduler: dict[str, Any]) -> dict[str, Any]:
    if "FlowMatch" in scheduler.get("_class_name", ""):
        return {"type": "flow_matching", "num_train_timesteps": scheduler.get("num_train_timesteps", 1000)}
    fields = {name: scheduler[name] for name in SCHEDULER_FIELDS if scheduler.get(name) is not None}
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("schedulers with rescale_betas_zero_snr=True are not supported: pass trained_betas instead")
    return {"type": "ddpm"} | fields


def _key_pairs(layers: int, per_block: bool) -> list[tuple[str, str]]:
    """`(diffusers key, our key)` of every tensor, `.weight` and `.bias` included."""
    modules = [(theirs, ours) for ours, theirs in SHARED_KEYS.items()]
    for index in range(layers):
        block = f"transformer_blocks.{index}"
        modules += [(f"{block}.{theirs}", f"layers.{index}.{ours}") for ours, theirs in BLOCK_KEYS.items()]
        condition = f"condition_embeddings.{index if per_block else 0}"
        modules += [(f"{block}.norm1.emb.{theirs}", f"{condition}.{ours}") for ours, theirs in CONDITION_KEYS.items()]
    return [(f"{theirs}.{leaf}", f"{ours}.{leaf}") for theirs, ours in modules for leaf in ("weight", "bias")]


def _from_diffusers_keys(state: State, fields: dict[str, Any]) -> State:
    pairs = _key_pairs(fields["num_hidden_layers"], fields["per_block_conditioning"])
    return {ours: state[theirs] for theirs, ours in pairs if theirs in state}


def _embedders_equal(state: State, layers: int) -> bool:
    """Whether every block carries the same timestep and class embedders (the published DiT does)."""
    first = "transformer_blocks.0.norm1.emb."
    names = [name for name in state if name.startswith(first)]
    return all(
        torch.equal(state[name], state[name.replace(first, f"transformer_blocks.{index}.norm1.emb.")])
        for name in names
        for index in range(1, layers)
    )
