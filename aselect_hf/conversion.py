"""Checkpoints in, checkpoints out: diffusers DiT, original DiT `.pt`, SiT `.pt`, and back to diffusers.

What each source decides, beside its weights:

| source    | noise schedule             | network's time    | timestep frequencies | second norm's eps |
|-----------|----------------------------|-------------------|----------------------|-------------------|
| diffusers | its scheduler's config     | t                 | shift 1              | `norm_eps`        |
| DiT `.pt` | DDPM, linear betas         | t                 | shift 0              | 1e-6              |
| SiT `.pt` | flow matching, velocity    | 1 - t / 1000      | shift 0              | 1e-6              |

The published DiT-XL/2 was trained with shift 0; diffusers runs it with shift 1. A conversion keeps what its source
computes, bit for bit; pass `timestep_freq_shift=0` to undo that for facebook's diffusers repositories.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import pickle
import re
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiTTransformer2DModel
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from aselect_hf.data import SAMPLE_MODEL
from aselect_hf.files import atomic_directory
from aselect_hf.modeling.backbone_aselect_dit import ASelectDiTBackbone
from aselect_hf.modeling.configuration_aselect_dit import SHAPES, ASelectDiTConfig
from aselect_hf.modeling.image_processing_aselect_dit import make_image_processor
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel, ASelectDiTPreTrainedModel
from aselect_hf.modeling.modeling_aselect_dit_heads import (
    ASelectDiTForImageClassification,
    ASelectDiTForSemanticSegmentation,
)

logger = logging.getLogger(__name__)

SourceFormat = Literal["auto", "aselect", "diffusers", "dit", "sit"]
State = dict[str, torch.Tensor]

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
ORIGINAL_KEYS = {
    "patch_embedding": "x_embedder.proj",
    "final_layer.modulation": "final_layer.adaLN_modulation.1",
    "final_layer.proj": "final_layer.linear",
    "condition_embeddings.0.fc1": "t_embedder.mlp.0",
    "condition_embeddings.0.fc2": "t_embedder.mlp.2",
    "condition_embeddings.0.class_embedding": "y_embedder.embedding_table",
}
ORIGINAL_BLOCK_KEYS = {
    "modulation": "adaLN_modulation.1",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
DERIVED_KEYS = {"position_embedding", "evaluation_noise"}
"""Stored buffers that a config says how to make; in a model with a fixed timestep the positions are weights."""
ACTIVATIONS = {"gelu-approximate": "gelu_pytorch_tanh", "gelu": "gelu"}
SCHEDULER_FIELDS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "prediction_type",
)
ORIGINAL_LICENSES = {"dit": "cc-by-nc-4.0", "sit": "mit"}


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path | None = None,
    *,
    to: Literal["aselect", "diffusers"] = "aselect",
    source_format: SourceFormat = "auto",
    vae: str | Path | None = None,
    vae_decoder: bool = False,
    allow_pickle: bool = False,
    fix_timestep: bool = False,
    **config: Any,
) -> Any:
    """Read a checkpoint of any known format, optionally write it in another, and return the model.

    Args:
        source: a diffusers pipeline or transformer folder, one of this package's checkpoints, a Hub id of either, or
            an original DiT or SiT `.pt` file.
        output_dir: where to write; must not exist or be empty.
        to: format written. `"diffusers"` writes a whole `DiTPipeline` where the model carries (or `vae` names) a VAE
            with its decoder, else a transformer and a scheduler folder.
        source_format: how to read `source`; `"auto"` tells by its files, and by its name for a `.pt`.
        vae: folder or Hub id of an `AutoencoderKL` or `AutoencoderTiny` to put inside, in place of the source's own.
        vae_decoder: keep the VAE's decoder (`model.decode`, and sampling after conversion to diffusers).
        allow_pickle: read `.pt` and `.bin` files, with `weights_only=True`; otherwise only safetensors.
        fix_timestep: fold the timestep into the weights, see `ASelectDiTModel.fix_timestep`; a head is kept.
        config: fields of `ASelectDiTConfig` that override the source's (`timestep`, `feature`, `base_model`,
            `base_model_license`, `num_attention_heads` of an unusual `.pt`, ...).

    Raises:
        ValueError: the source is missing, damaged, of another kind, or a pickle without `allow_pickle`.
    """
    if to not in ("aselect", "diffusers"):
        raise ValueError(f"to must be 'aselect' or 'diffusers', got {to!r}")
    if to == "diffusers" and fix_timestep:
        raise ValueError("fix_timestep needs to='aselect': diffusers has no model with a fixed timestep")
    if to == "diffusers":
        vae_decoder = True
    asked = {name: config.pop(name, None) for name in ("timestep", "feature")} if fix_timestep else {}
    model = load_checkpoint(
        source, source_format=source_format, vae=vae, vae_decoder=vae_decoder, allow_pickle=allow_pickle,
        keep_head=fix_timestep, **config,
    )  # fmt: skip
    if fix_timestep:
        model = model.fix_timestep(**asked)
    if output_dir is not None:
        with atomic_directory(output_dir) as folder:
            if to == "aselect":
                save_model(model, folder)
            else:
                save_diffusers(model, folder)
    return model


def load_checkpoint(
    source: str | Path,
    *,
    source_format: SourceFormat = "auto",
    vae: str | Path | None = None,
    vae_decoder: bool = False,
    allow_pickle: bool = False,
    keep_head: bool = False,
    **config: Any,
) -> Any:
    """Read a checkpoint of any known format, with its head if `keep_head`; arguments as in `convert_checkpoint`."""
    name, path = str(source), locate(source, allow_pickle)
    kind = detect_format(path) if source_format == "auto" else source_format
    if kind == "aselect":
        model = load_model(path, saved_class(path) if keep_head else ASelectDiTModel, **config)
        if vae is not None:
            set_vae(getattr(model, model.base_model_prefix, model), load_vae(vae, allow_pickle), vae_decoder)
        return model
    if kind == "diffusers":
        config.setdefault("base_model", name if path != Path(name) else None)
        return load_diffusers(path, vae=vae, vae_decoder=vae_decoder, allow_pickle=allow_pickle, **config)
    if kind in ORIGINAL_LICENSES:
        return _load_original(path, kind, vae=vae, vae_decoder=vae_decoder, allow_pickle=allow_pickle, **config)
    raise ValueError(f"source_format must be one of auto, aselect, diffusers, dit, sit; got {source_format!r}")


def saved_class(folder: Path) -> type[ASelectDiTPreTrainedModel]:
    """The class that a checkpoint of this package was saved with, its head included."""
    names = json.loads((folder / "config.json").read_text()).get("architectures") or []
    classes = (ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation, ASelectDiTBackbone)
    return next((known for known in classes if known.__name__ in names), ASelectDiTModel)


def load_model(
    source: str | Path,
    model_class: type[ASelectDiTPreTrainedModel] = ASelectDiTModel,
    *,
    new_head: bool = False,
    **config: Any,
) -> Any:
    """`from_pretrained` whose errors name the checkpoint: another model type, damaged weights.

    Args:
        source: folder or Hub id; `"sample"` for the model that ships with the package.
        model_class: class to load.
        new_head: let a head that the checkpoint lacks, or has for other classes, be a new one.
        config: config fields to override.
    """
    path = locate(source)
    if detect_format(path) != "aselect":
        raise ValueError(f"{source} is a diffusers checkpoint: convert it first, with ASelectDiTModel.from_diffusers")
    try:
        model, report = model_class.from_pretrained(
            path, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=new_head, **config
        )
    except (SafetensorError, OSError, RuntimeError, TypeError, IndexError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {source} cannot be read: {_first_line(error)}") from error
    derived = () if model.config.fixed_timestep else tuple(DERIVED_KEYS)
    missing = {name for name in report["missing_keys"] if not name.endswith(derived)}
    missing |= {name for name, *_ in report["mismatched_keys"]}
    if new_head:
        missing = {name for name in missing if name.startswith(f"{model.base_model_prefix}.")}
    if missing:
        raise ValueError(f"checkpoint {source} does not fit its config: missing {sorted(missing)}")
    return model


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
    transformer = _from_diffusers(DiTTransformer2DModel, path / "transformer" if pipeline else path, allow_pickle)
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
        "base_model_license": _card_license(path),
    }
    fields |= {name: value for name, value in config.items() if value is not None or name not in fields}
    return _build(fields, _from_diffusers_keys(state, fields), autoencoder, vae_decoder, model_class)


def save_model(model: ASelectDiTPreTrainedModel, folder: str | Path) -> None:
    """Write weights, config, code and the image processor that matches the model: what every pipeline needs."""
    model.save_pretrained(folder)
    if model.config.vae_config is not None or model.config.num_channels in (1, 3):
        segmentation = isinstance(model, ASelectDiTForSemanticSegmentation)
        make_image_processor(model.config, segmentation=segmentation).save_pretrained(folder)


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


def locate(source: str | Path, allow_pickle: bool = False) -> Path:
    """A local path for a path or Hub id (downloaded: configs and weights only); `"sample"` is the shipped model."""
    if str(source) == "sample":
        return SAMPLE_MODEL
    path = Path(source)
    if path.exists():
        return path
    patterns = ["*.json", "*.safetensors", "README.md"] + (["*.bin"] if allow_pickle else [])
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"checkpoint {str(source)!r} is neither a local path nor reachable on the Hub ({_first_line(error)})"
        ) from error


def detect_format(path: Path) -> str:
    """Tell a checkpoint's format by its files.

    Raises:
        ValueError: of a known kind but another model, or of no known kind.
    """
    if path.is_file():
        name = path.name.lower()
        for kind in ORIGINAL_LICENSES:
            if kind in name:
                return kind
        raise ValueError(f"cannot tell whether {path.name} is a DiT or a SiT: pass source_format='dit' or 'sit'")
    if (path / "model_index.json").is_file():
        return "diffusers"
    try:
        fields = json.loads((path / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a checkpoint: no readable config.json or model_index.json") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a checkpoint: its config.json holds no fields")
    if fields.get("model_type") == ASelectDiTConfig.model_type:
        return "aselect"
    class_name, norm_type = fields.get("_class_name"), fields.get("norm_type")
    if class_name == "DiTTransformer2DModel" or (class_name, norm_type) == ("Transformer2DModel", "ada_norm_zero"):
        return "diffusers"  # the second: how diffusers called it before 0.29, the published repositories among them
    found = fields.get("model_type") or fields.get("_class_name") or "unknown"
    raise ValueError(f"{path} holds a model of type {found!r}; accepted are aselect_dit and DiTTransformer2DModel")


def load_vae(source: str | Path, allow_pickle: bool = False) -> Any:
    """An autoencoder from a folder or Hub id."""
    path = locate(source, allow_pickle)
    try:
        name = json.loads((path / "config.json").read_text())["_class_name"]
        autoencoder_class = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}[name]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"vae {source} is neither an AutoencoderKL nor an AutoencoderTiny") from error
    return _from_diffusers(autoencoder_class, path, allow_pickle)


def set_vae(model: ASelectDiTModel, vae: Any, decoder: bool) -> None:
    """Put an autoencoder inside a model, encoder only unless `decoder`."""
    fields = model.config.to_diff_dict() | _vae_fields(vae, decoder) | {"image_size": None}
    checked = ASelectDiTConfig(
        **{key: value for key, value in fields.items() if key in ASelectDiTConfig.__annotations__}
    )
    for name in ("vae_config", "vae_decoder", "image_size"):
        setattr(model.config, name, getattr(checked, name))
    if not decoder:
        vae.decoder = None
        if hasattr(vae, "post_quant_conv"):
            vae.post_quant_conv = None
    model.vae = vae.eval()


def _build(
    fields: dict[str, Any], state: State, vae: Any, vae_decoder: bool, model_class: type[PreTrainedModel]
) -> Any:
    if vae is not None:
        fields = fields | _vae_fields(vae, vae_decoder)
    config = ASelectDiTConfig(**{name: value for name, value in fields.items() if value is not None})
    model: Any = model_class(config)
    dit = getattr(model, model.base_model_prefix, model)
    if vae is not None:
        state = state | {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    expected = dit.state_dict()
    missing = set(expected) - set(state) - DERIVED_KEYS
    wrong = [name for name in set(state) & set(expected) if state[name].shape != expected[name].shape]
    if missing or wrong:
        raise ValueError(
            f"the checkpoint does not fit its config: missing {sorted(missing)}, wrong shape {sorted(wrong)}"
        )
    dtype = state["patch_embedding.weight"].dtype
    dit.load_state_dict({name: state.get(name, tensor) for name, tensor in expected.items()})
    return model.to(dtype).eval()


def _from_diffusers(diffusers_class: Any, path: Path, allow_pickle: bool) -> Any:
    try:
        model, report = diffusers_class.from_pretrained(
            path, use_safetensors=None if allow_pickle else True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"its weights are missing {', '.join(sorted(report['missing_keys']))}")
        return model
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        without = not allow_pickle and not any(path.glob("*.safetensors"))
        hint = "; it has no safetensors: pass allow_pickle=True to read pickles (.bin)" if without else ""
        raise ValueError(
            f"{path} cannot be read as a {diffusers_class.__name__}: {_first_line(error)}{hint}"
        ) from error


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


def _vae_fields(vae: Any, decoder: bool) -> dict[str, Any]:
    config = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}
    config = {"_class_name": type(vae).__name__} | json.loads(json.dumps(config))
    return {"vae_config": config, "vae_decoder": decoder}


def _load_original(
    path: Path, kind: str, *, vae: str | Path | None, vae_decoder: bool, allow_pickle: bool, **config: Any
) -> ASelectDiTModel:
    """An original DiT or SiT `.pt`: a state dict, or a training checkpoint (whose `ema` weights are taken)."""
    if not allow_pickle:
        raise ValueError(f"{path.name} is a pickle: pass allow_pickle=True to read it (with weights_only=True)")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the original training scripts store one
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a state dict: {_first_line(error)}") from error
    state: State = loaded
    for key in ("model", "ema"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            state = loaded[key]
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a DiT state dict but a {type(state).__name__}")
    needed = [f"{name}.weight" for name in ORIGINAL_KEYS.values()] + ["pos_embed", "blocks.0.attn.qkv.weight"]
    if absent := [name for name in needed if name not in state]:
        raise ValueError(f"{path} is not a DiT state dict: {', '.join(absent)} missing")
    hidden_size, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    layers = 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
    heads = {shape["hidden_size"]: shape["num_attention_heads"] for shape in SHAPES.values()}.get(hidden_size)
    if heads is None and "num_attention_heads" not in config:
        raise ValueError(f"a width of {hidden_size} is none of the published shapes: pass num_attention_heads")
    flow = {"type": "flow_matching", "prediction_type": "velocity", "model_time": "data_fraction"}
    fields = {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "patch_size": patch_size,
        "sample_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "num_channels": channels,
        "learned_sigma": state["final_layer.linear.weight"].shape[0] == 2 * channels * patch_size**2,
        "num_condition_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "attention_bias": "blocks.0.attn.qkv.bias" in state,
        "noise_schedule": flow if kind == "sit" else None,
        "base_model_license": ORIGINAL_LICENSES[kind],
    } | config
    converted = {
        f"{ours}.{leaf}": state[f"{theirs}.{leaf}"]
        for ours, theirs in _original_pairs(layers)
        for leaf in ("weight", "bias")
        if f"{theirs}.{leaf}" in state
    }
    for index in range(layers):
        for leaf in ("weight", "bias"):
            qkv = state.get(f"blocks.{index}.attn.qkv.{leaf}")
            for name, part in zip("qkv", qkv.chunk(3) if qkv is not None else (), strict=False):
                converted[f"layers.{index}.attention.{name}_proj.{leaf}"] = part
    autoencoder = load_vae(vae, allow_pickle) if vae is not None else None
    model = _build(fields, converted, autoencoder, vae_decoder, ASelectDiTModel)
    if not torch.allclose(model.position_embedding.float(), state["pos_embed"].float(), atol=1e-4):
        raise ValueError(f"{path}: its position embedding is not DiT's sin-cos table")
    return model


def _original_pairs(layers: int) -> list[tuple[str, str]]:
    blocks = [
        (f"layers.{index}.{ours}", f"blocks.{index}.{theirs}")
        for index in range(layers)
        for ours, theirs in ORIGINAL_BLOCK_KEYS.items()
    ]
    return [*ORIGINAL_KEYS.items(), *blocks]


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


def _card_license(path: Path) -> str | None:
    card = path / "README.md"
    return ModelCard.load(card).data.license if card.is_file() else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
