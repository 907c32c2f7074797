"""Configuration of a Diffusion Transformer used as a vision backbone at a chosen timestep."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .features import FEATURE_KINDS, default_feature, parse_feature
from .noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    # Saving a config copies the files it imports, however indirectly: these lines are what makes a saved folder whole.
    from .backbone_aselect_dit import ASelectDiTBackbone  # noqa: F401
    from .image_processing_aselect_dit import ASelectDiTImageProcessor  # noqa: F401
    from .modeling_aselect_dit import ASelectDiTModel  # noqa: F401
    from .modeling_aselect_dit_heads import ASelectDiTForImageClassification  # noqa: F401

SHAPES = {
    "DiT-S": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "DiT-B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "DiT-L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "DiT-XL": {"hidden_size": 1152, "num_hidden_layers": 28, "num_attention_heads": 16},
}
PRESETS = {f"{name}/{patch}": shape | {"patch_size": patch} for name, shape in SHAPES.items() for patch in (2, 4, 8)}
"""The published shapes (Peebles & Xie 2023, table 1) with patch sizes 2, 4 and 8."""

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "sample_size", "num_channels")
MAX_SIZE = 2**16
MAX_NOISE = 2**28
CHOICES = {
    "head_norm": ("layer_norm", "batch_norm"),
    "pooling": ("mean", "attentive"),
    "segmentation_head": ("linear", "upernet"),
    "stage_kind": FEATURE_KINDS,
}
UPERNET_LEVELS = 4
GROUP_CHANNELS = 16
"""Channels that the UPerNet head normalises together."""

AUTO_MAP = {
    "AutoConfig": "configuration_aselect_dit.ASelectDiTConfig",
    "AutoModel": "modeling_aselect_dit.ASelectDiTModel",
    "AutoBackbone": "backbone_aselect_dit.ASelectDiTBackbone",
    "AutoModelForImageClassification": "modeling_aselect_dit_heads.ASelectDiTForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_aselect_dit_heads.ASelectDiTForSemanticSegmentation",
}
"""Where transformers finds each class in a saved folder. The image processor's own file names its class."""


@strict
class ASelectDiTConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Args:
        hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio: shape of the transformer.
        patch_size: side of a patch, in what the DiT sees (latents, or pixels without a VAE).
        sample_size: side of what the DiT sees; `num_channels` its channels.
        image_size: side in pixels; derived from `sample_size` and the VAE when not given.
        learned_sigma: whether the network also outputs a variance (ignored by everything but conversion).
        num_condition_classes: classes the diffusion model was conditioned on; one more row is the null class.
            0 for an unconditional model.
        attention_bias, hidden_act, mlp_norm_eps: as in the original network.
        timestep_freq_shift: 0 for the original DiT's timestep embedding, 1 for the one diffusers trains.
        per_block_conditioning: every block carries its own timestep and class embedders (DiTs trained in diffusers).
        vae_config: config of the `AutoencoderKL` or `AutoencoderTiny` inside the checkpoint; `None` for pixel space.
        vae_decoder: keep the VAE's decoder too.
        noise_schedule: fields of [`NoiseSchedule`]; DDPM with linear betas by default.
        timestep: the timestep chosen for features; `None` until one is selected.
        feature: name of the feature, `blocks.<i>.<kind>`; by default the query at 0.45 of the depth.
        noise_seed, num_noise_draws: seed and number of the stored evaluation noises; features average over them.
        selection: how `timestep` was chosen (method, options, curve), written by `TimestepSelection.apply`.
        base_model, base_model_license: where the weights came from, for the model card.
        head_features: features a head reads, concatenated along the width; default `[feature]`. The UPerNet head
            takes one, for all levels of its pyramid, or four, the finest level's first.
        head_timesteps: timesteps a head reads, one run each, concatenated along the width; default `[timestep]`.
        head_norm: `"layer_norm"` or `"batch_norm"` before the head's last linear layer.
        pooling: of tokens for classification: `"mean"`, or `"attentive"` (cross-attention from a learned query).
        segmentation_head: `"linear"` (per token) or `"upernet"`, with `segmentation_head_channels` (a multiple of 16).
        semantic_loss_ignore_index: label of the pixels that the segmentation loss leaves out.
        stage_kind: kind of the features a backbone returns: stage `i` is `blocks.<i - 1>.<stage_kind>`. Which stages,
            `out_features` or `out_indices` say, as for every transformers backbone; `stem` is the embedded input.
        reshape_hidden_states: whether a backbone returns maps `(batch, width, height, width)`, or else tokens
            `(batch, 1 + tokens, width)`, their mean first, as DPT reads them.

    Raises:
        ValueError: fields contradict each other; the message names them.
    """

    model_type = "aselect_dit"

    hidden_size: int = 1152
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    mlp_ratio: float | int = 4.0
    patch_size: int = 2
    sample_size: int = 32
    num_channels: int = 4
    image_size: int | None = None
    learned_sigma: bool = True
    num_condition_classes: int = 1000
    attention_bias: bool = True
    attention_dropout: float | int = 0.0
    hidden_act: str = "gelu_pytorch_tanh"
    mlp_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    timestep_freq_shift: int = 0
    per_block_conditioning: bool = False
    vae_config: dict | None = None
    vae_decoder: bool = False
    noise_schedule: dict | None = None
    timestep: int | None = None
    feature: str | None = None
    noise_seed: int = 0
    num_noise_draws: int = 1
    selection: dict | None = None
    base_model: str | None = None
    base_model_license: str | None = None
    head_features: list[str] | None = None
    head_timesteps: list[int] | None = None
    head_norm: str = "layer_norm"
    pooling: str = "mean"
    segmentation_head: str = "linear"
    segmentation_head_channels: int = 256
    semantic_loss_ignore_index: int = 255
    stage_kind: str = "hidden"
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                raise ValueError(f"{name} must be an integer in 1..{MAX_SIZE}, got {value!r}")
        self.check_vae()
        self.noise_schedule = NoiseSchedule.from_dict(self.noise_schedule or {}).to_dict()
        if self.feature is None:
            self.feature = default_feature(self.num_hidden_layers)
        if self.image_size is None:
            self.image_size = self.sample_size * self.vae_downsampling
        self.check_shape()
        self.check_choice()
        self.check_head()
        kwargs.pop("stage_names", None)
        self.stage_names = ["stem", *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1))]
        self.set_output_features_output_indices(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the code of every class: `trust_remote_code=True` loads without this package."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but a config of another model type is an error, not a warning."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(f"this checkpoint holds a model of type {found!r}, not {cls.model_type!r}")
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> ASelectDiTConfig:
        """One of the published shapes, such as `"DiT-XL/2"`, with any field overridden."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; accepted are {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | overrides))

    @property
    def vae_downsampling(self) -> int:
        """Pixels per latent, along one side; 1 without a VAE."""
        if self.vae_config is None:
            return 1
        if self.vae_config.get("_class_name") == "AutoencoderTiny":
            return 2 ** (len(self.vae_config["encoder_block_out_channels"]) - 1)
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Height and width of the patch grid at the trained resolution."""
        side = self.sample_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def check_shape(self) -> None:
        """Refuse sizes that contradict each other."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 4 for 2-D sin-cos positions")
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size={self.sample_size} must be a multiple of patch_size={self.patch_size}")
        if not self.mlp_ratio * self.hidden_size >= 1:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown to transformers.activations")
        for name, least, most in (("num_condition_classes", 0, 2**24), ("num_noise_draws", 1, 1024)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be in {least}..{most}, got {getattr(self, name)}")
        if not 0 <= self.noise_seed < 2**63:
            raise ValueError(f"noise_seed must be in 0..2**63 - 1, got {self.noise_seed}")
        noise = self.num_noise_draws * self.num_channels * self.sample_size**2
        if noise > MAX_NOISE:
            raise ValueError(
                f"num_noise_draws={self.num_noise_draws}, num_channels={self.num_channels} and "
                f"sample_size={self.sample_size} make {noise} stored noise values, more than {MAX_NOISE}"
            )
        if self.image_size != self.sample_size * self.vae_downsampling:
            raise ValueError(
                f"image_size={self.image_size} contradicts sample_size={self.sample_size}: "
                f"with a downsampling of {self.vae_downsampling} it is {self.sample_size * self.vae_downsampling}"
            )

    def check_vae(self) -> None:
        """Refuse a VAE that is unknown or does not fit what the DiT sees."""
        if self.vae_config is None:
            return
        name = self.vae_config.get("_class_name", "AutoencoderKL")
        if name not in ("AutoencoderKL", "AutoencoderTiny"):
            raise ValueError(f"vae_config must be of an AutoencoderKL or AutoencoderTiny, got {name!r}")
        widths = "encoder_block_out_channels" if name == "AutoencoderTiny" else "block_out_channels"
        if not self.vae_config.get(widths):
            raise ValueError(f"vae_config of an {name} must have {widths}")
        channels = self.vae_config.get("latent_channels", 4)
        if channels != self.num_channels:
            raise ValueError(f"num_channels={self.num_channels} contradicts the VAE's latent_channels={channels}")

    def check_choice(self) -> None:
        """Refuse a feature or timestep this network does not have."""
        parse_feature(self.feature or "", self.num_hidden_layers)
        if self.timestep is not None:
            NoiseSchedule.from_dict(self.noise_schedule or {}).check_timestep(self.timestep)

    def check_head(self) -> None:
        """Refuse a head that is unknown, or reads what this network does not have."""
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {getattr(self, name)!r}")
        for name in ("head_features", "head_timesteps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, list) or not value):
                raise ValueError(f"{name} must be a non-empty list, or None for the model's own; got {value!r}")
        for feature in self.head_features or ():
            parse_feature(feature, self.num_hidden_layers)
        schedule = NoiseSchedule.from_dict(self.noise_schedule or {})
        for timestep in self.head_timesteps or ():
            schedule.check_timestep(timestep)
        count = len(self.head_features or [self.feature])
        if self.segmentation_head == "upernet" and count not in (1, UPERNET_LEVELS):
            raise ValueError(f"head_features of an upernet head must be one or {UPERNET_LEVELS} names, got {count}")
        channels = self.segmentation_head_channels
        if not GROUP_CHANNELS <= channels <= MAX_SIZE or channels % GROUP_CHANNELS:
            raise ValueError(f"segmentation_head_channels must be a multiple of {GROUP_CHANNELS}, got {channels}")


ASelectDiTConfig.register_for_auto_class()

__all__ = ["PRESETS", "ASelectDiTConfig"]
