"""Conversion of diffusers' DiT to ours and back."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiTTransformer2DModel, SchedulerMixin
from transformers import PreTrainedModel

from aselect_hf.conversion.assemble import build, load_vae
from aselect_hf.conversion.licenses import license_fields
from aselect_hf.conversion.locate import LoadingOptions, Source, detect_format, locate, split_keywords
from aselect_hf.conversion.weights import State, check_depth, read_state, refuse_quantized, weight_files
from aselect_hf.files import read_json
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel, sincos_positions
from aselect_hf.modeling.noisy_backbone import NoisyBackbone

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
HOOKED = {"hidden": "", "query": "attn1.to_q", "key": "attn1.to_k", "value": "attn1.to_v"}
"""Features that a hook on a block of diffusers can read, with the module that gives them."""
ACTIVATIONS = {"gelu-approximate": "gelu_pytorch_tanh", "gelu": "gelu"}
SCHEDULER_FIELDS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "prediction_type",
)


POSITIONS = "pos_embed.pos_embed"
"""A table that newer versions of diffusers compute; it is compared with ours, not loaded."""


@dataclass
class DiffusersModel:
    """A diffusers DiT with the parts of its pipeline, from a folder or from memory."""

    name: str
    config: dict[str, Any]
    state: State
    vae: Any = None
    scheduler: dict[str, Any] | None = None
    id2label: dict[str, str] | None = None


def load_diffusers(
    source: Any,
    *,
    model_class: type[PreTrainedModel] = ASelectDiTModel,
    vae: Any = None,
    vae_decoder: bool = False,
    scheduler: Any = None,
    options: LoadingOptions | None = None,
    **keywords: Any,
) -> Any:
    """Convert a diffusers DiT to a model of this package.

    Args:
        source: a pipeline folder, a transformer folder or a Hub id; or a `DiTPipeline` or `DiTTransformer2DModel` in
            memory, which is copied.
        model_class: class to build, with or without a head.
        vae: folder, Hub id or autoencoder that replaces the source's VAE.
        vae_decoder: keep the VAE's decoder.
        scheduler: a diffusers scheduler or its config that replaces the source's scheduler.
        options: loading options; they replace those among `keywords`.
        keywords: loading options (`token`, `revision`, `cache_dir`, `local_files_only`, `force_download`, `subfolder`,
            `variant`, `allow_pickle`, and `dtype`, which includes the VAE: `model.vae.float()` encodes in full
            precision); and fields of `ASelectDiTConfig` that override the source's.

    Raises:
        TypeError: a keyword is unknown.
        ValueError: the source is missing or damaged, or is another network.
    """
    asked, config = split_keywords("from_diffusers", keywords)
    options = options or asked
    if isinstance(source, str | Path):
        source = locate(source, options, with_vae=vae is None)
    if isinstance(source, Source):
        found, origin = _from_folder(source, options, vae is None)
    else:
        found, origin = _from_memory(source), {}
    if vae is not None:
        found.vae = load_vae(vae, options)
    if scheduler is not None:
        found.scheduler = scheduler_config(scheduler)
    if found.scheduler is None and "noise_schedule" not in config:
        logger.warning("%s has no scheduler: assuming DDPM with linear betas and epsilon prediction", found.name)
    fields = _diffusers_fields(found.config)
    layers = fields["num_hidden_layers"]
    check_depth(found.name, layers, found.state, "transformer_blocks")
    per_block = not _embedders_equal(found.state, layers)
    pairs = _key_pairs(layers, per_block)
    fields |= origin | {
        "per_block_conditioning": per_block,
        "noise_schedule": schedule_fields(found.scheduler) if found.scheduler else None,
        "scheduler_config": found.scheduler,
        "condition_id2label": found.id2label,
    }
    fields |= {name: value for name, value in config.items() if value is not None or name not in fields}
    _check_positions(found, fields)
    model = build(
        fields, {ours: found.state[theirs] for theirs, ours in pairs if theirs in found.state}, found.vae, vae_decoder,
        model_class, name=found.name, unused=set(found.state) - _computed(pairs, layers), dtype=options.dtype,
    )  # fmt: skip
    if isinstance(source, Source):
        model.license_files = source.license_files
    return model


def _from_folder(place: Source, options: LoadingOptions, with_vae: bool) -> tuple[DiffusersModel, dict[str, Any]]:
    """Read the DiT of a folder or repository; also return its origin as config fields."""
    index = place.path / "model_index.json"
    pipeline = index.is_file()
    folder = place.path / "transformer" if pipeline else place.path
    if detect_format(folder) != "diffusers":
        raise ValueError(
            f"{place.path} is an aselect_dit or aselect_diffusion checkpoint: load it with from_pretrained"
        )
    config = read_fields(folder / "config.json")
    refuse_quantized(str(folder), config)
    state = read_state(weight_files(folder, options.variant, options.allow_pickle))
    found = DiffusersModel(str(folder), config, state)
    if pipeline and with_vae and (place.path / "vae").is_dir():
        found.vae = load_vae(place.path / "vae", options)
    if (scheduler := place.path / "scheduler" / "scheduler_config.json").is_file():
        found.scheduler = scheduler_config(read_fields(scheduler))
    if pipeline:
        found.id2label = read_fields(index).get("id2label")
    origin = {"base_model": place.hub_id} | license_fields(place.card, place.hub_id)
    return found, origin


def _from_memory(source: Any) -> DiffusersModel:
    """Read a transformer, or a pipeline with a `transformer`, in memory.

    Raises:
        ValueError: the transformer has another class.
    """
    transformer: Any = getattr(source, "transformer", source)
    found_class = type(transformer)
    if not issubclass(found_class, DiTTransformer2DModel):
        raise ValueError(
            "source must be a path, a Hub id, a DiTTransformer2DModel or a pipeline with one, got a "
            f"{found_class.__name__}"
        )
    refuse_quantized(type(source).__name__, transformer.config, transformer.named_parameters())
    found = DiffusersModel(type(source).__name__, dict(transformer.config), transformer.state_dict())
    if source is not transformer:
        found.vae = load_vae(source.vae) if getattr(source, "vae", None) is not None else None
        found.scheduler = scheduler_config(source.scheduler)
        labels: dict[str, list[str]] = {}
        for label, index in getattr(source, "labels", {}).items():
            labels.setdefault(str(index), []).append(label)
        found.id2label = {index: ", ".join(names) for index, names in labels.items()} or None
    return found


def read_fields(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def save_diffusers(model: ASelectDiTModel, folder: Path) -> None:
    """Write a diffusers pipeline if the VAE can decode, else only the transformer and the scheduler."""
    transformer, scheduler = to_diffusers(model)
    if model.vae is not None and model.config.vae_decoder:
        from diffusers import DiTPipeline  # imported here, because importing pipelines is slow and noisy

        id2label = model.config.condition_id2label
        labels = {int(index): label for index, label in (id2label or {}).items()} or None
        pipeline: Any = DiTPipeline(transformer=transformer, vae=model.vae, scheduler=scheduler, id2label=labels)
        if id2label:
            pipeline.register_to_config(id2label=id2label)  # DiTPipeline reads this field but does not write it
        pipeline.save_pretrained(folder)
        return
    logger.warning("the model has no VAE decoder: only transformer and scheduler are written; pass vae to add one")
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")


def to_diffusers(model: ASelectDiTModel) -> tuple[Any, Any]:
    """Convert a model to a diffusers transformer and a scheduler with its noise schedule.

    Raises:
        ValueError: the model is no DiT, or has flow matching, a fixed timestep, an MLP ratio other than 4, or no GELU
            activation.
    """
    if not isinstance(model, ASelectDiTModel):
        raise ValueError(f"only a DiT converts to diffusers, this is a {type(model).__name__}: use its source")
    config, schedule = model.config, model.noise_schedule
    if config.fixed_timestep:
        raise config.fixed_error("conversion to diffusers")
    if schedule.type != "ddpm":
        raise ValueError("diffusers' DiT pipeline does not support flow matching: only DDPM checkpoints convert to it")
    if config.mlp_ratio != 4:
        raise ValueError(f"diffusers' DiT needs an MLP ratio of 4, but this model has {config.mlp_ratio}")
    if config.timestep_freq_shift != 1:
        logger.warning("diffusers embeds timesteps with a frequency shift of 1, but this model was trained with 0: "
                       "its predictions will differ slightly")  # fmt: skip
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if config.hidden_act not in activations:
        raise ValueError(f"diffusers' DiT needs {' or '.join(activations)}, but this model has {config.hidden_act}")
    transformer: Any = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.hidden_size // config.num_attention_heads,
        in_channels=config.num_channels,
        out_channels=config.num_channels * (2 if config.learned_sigma else 1),
        num_layers=config.num_hidden_layers,
        attention_bias=config.attention_bias,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        activation_fn=activations[config.hidden_act],
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
    return transformer.to(model.dtype).eval(), _scheduler_of(model)


def diffusers_peer(model: NoisyBackbone, feature: str) -> tuple[Any, Any, torch.nn.Module]:
    """As `to_diffusers`, to compare with on the device of `model`, and the module whose output is `feature`.

    The transformer has the model's own timestep frequencies, which diffusers cannot save.

    Raises:
        ValueError: as `to_diffusers`, or the model is no DiT.
    """
    if not isinstance(model, ASelectDiTModel):
        raise ValueError(f"diffusers' DiT is not the network of a {type(model).__name__}")
    twin = copy.copy(model)
    twin.config = copy.deepcopy(model.config)
    twin.config.timestep_freq_shift = 1
    transformer, scheduler = to_diffusers(twin)
    blocks = transformer.transformer_blocks
    for each in blocks:
        each.norm1.emb.time_proj.downscale_freq_shift = model.config.timestep_freq_shift
    block, kind = model.config.resolve_feature(feature)
    return transformer.to(model.device), scheduler, blocks[block].get_submodule(HOOKED[kind])


def _scheduler_of(model: ASelectDiTModel) -> Any:
    """The scheduler that came with the weights (default: DDIM), set to the model's own noise schedule."""
    stored = model.config.scheduler_config or {"_class_name": "DDIMScheduler", "clip_sample": False}
    return scheduler_of(stored | {name: getattr(model.noise_schedule, name) for name in SCHEDULER_FIELDS})


def scheduler_of(fields: dict[str, Any]) -> Any:
    """The scheduler that a config describes; fields that its class does not have are left out."""
    scheduler_class = _scheduler_class(fields)
    return scheduler_class(**{name: fields[name] for name in _defaults(scheduler_class) if name in fields})


def _scheduler_class(config: dict[str, Any]) -> Any:
    """The diffusers class that a scheduler's config names.

    Raises:
        ValueError: diffusers has no such scheduler.
    """
    name = config.get("_class_name", "DDIMScheduler")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, SchedulerMixin):
        raise ValueError(f"diffusers has no scheduler {name!r}: pass noise_schedule or scheduler")
    return found


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """The complete config of a scheduler, defaults included and ready for JSON, from the scheduler or its config."""
    config = dict(getattr(scheduler, "config", scheduler))
    scheduler_class = type(scheduler) if isinstance(scheduler, SchedulerMixin) else _scheduler_class(config)
    fields = _defaults(scheduler_class)
    fields |= {name: value for name, value in config.items() if name in fields}
    return {"_class_name": scheduler_class.__name__} | json.loads(json.dumps(fields, default=list))


def schedule_fields(scheduler: dict[str, Any]) -> dict[str, Any]:
    """The noise schedule in a scheduler's config, without its options for sampling."""
    name = scheduler["_class_name"]
    if "FlowMatch" in name:
        if scheduler.get("invert_sigmas"):
            raise ValueError(f"{name} with invert_sigmas=True is not supported: pass noise_schedule")
        return {"type": "flow_matching", "num_train_timesteps": scheduler.get("num_train_timesteps", 1000)}
    if "beta_schedule" not in scheduler:
        raise ValueError(
            f"{name} is neither a DDPM scheduler (no beta_schedule) nor a flow-matching one: pass noise_schedule"
        )
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("schedulers with rescale_betas_zero_snr=True are not supported: pass trained_betas instead")
    return {"type": "ddpm"} | {name: scheduler[name] for name in SCHEDULER_FIELDS if scheduler.get(name) is not None}


def _defaults(diffusers_class: Any) -> dict[str, Any]:
    """Config fields of a diffusers class that have defaults."""
    parameters = inspect.signature(diffusers_class).parameters.items()
    return {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}


def _diffusers_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The shape of a diffusers DiT as fields of our config; absent fields have diffusers' defaults."""
    config = _defaults(DiTTransformer2DModel) | config
    if config["norm_elementwise_affine"] or config["activation_fn"] not in ACTIVATIONS:
        raise ValueError(
            "only DiTs with norm_elementwise_affine=False and a GELU activation can be converted, got "
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


def _key_pairs(layers: int, per_block: bool) -> list[tuple[str, str]]:
    """`(diffusers key, our key)` of every tensor, `.weight` and `.bias` included."""
    modules = [(theirs, ours) for ours, theirs in SHARED_KEYS.items()]
    for index in range(layers):
        block = f"transformer_blocks.{index}"
        modules += [(f"{block}.{theirs}", f"layers.{index}.{ours}") for ours, theirs in BLOCK_KEYS.items()]
        condition = f"condition_embeddings.{index if per_block else 0}"
        modules += [(f"{block}.norm1.emb.{theirs}", f"{condition}.{ours}") for ours, theirs in CONDITION_KEYS.items()]
    return [(f"{theirs}.{leaf}", f"{ours}.{leaf}") for theirs, ours in modules for leaf in ("weight", "bias")]


def _embedders_equal(state: State, layers: int) -> bool:
    """Whether every block carries the same timestep and class embedders (the published DiT does)."""
    first = "transformer_blocks.0.norm1.emb."
    names = [name for name in state if name.startswith(first)]
    others = [(name, name.replace(first, f"transformer_blocks.{index}.norm1.emb.")) for name in names
              for index in range(1, layers)]  # fmt: skip
    return all(other in state and torch.equal(state[name], state[other]) for name, other in others)


def _computed(pairs: list[tuple[str, str]], layers: int) -> set[str]:
    """The diffusers keys that our network uses, and redundant ones (repeated embedders, positions)."""
    repeated = {theirs for theirs, _ in _key_pairs(layers, per_block=True)}
    return {theirs for theirs, _ in pairs} | repeated | {POSITIONS}


def _check_positions(found: DiffusersModel, fields: dict[str, Any]) -> None:
    if (stored := found.state.get(POSITIONS)) is None:
        return
    side = fields["sample_size"] // fields["patch_size"]
    table = sincos_positions(fields["hidden_size"], (side, side), (side, side))
    if stored.shape != table.shape or not torch.allclose(stored.float(), table, atol=1e-2):
        raise ValueError(f"{found.name}: {POSITIONS} is not DiT's sin-cos table")
