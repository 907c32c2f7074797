"""Configuration of a Diffusion Transformer used as a vision backbone at a chosen timestep."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .features import default_feature, parse_feature
from .noise_schedule import NoiseSchedule

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


@strict
class ASelectDiTConfig(PreTrainedConfig):
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
        super().__post_init__(**kwargs)

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
        if self.num_condition_classes < 0 or self.num_noise_draws < 1:
            raise ValueError(
                "num_condition_classes must be at least 0 and num_noise_draws at least 1, "
                f"got {self.num_condition_classes} and {self.num_noise_draws}"
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


__all__ = ["PRESETS", "ASelectDiTConfig"]
