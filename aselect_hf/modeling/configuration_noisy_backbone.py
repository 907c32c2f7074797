"""What the configs of all diffusion backbones share: the noise, the chosen feature and timestep, the VAE, the heads."""

from __future__ import annotations

import os
import re
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import logging

from .features import FEATURE_KINDS, FeatureName, default_feature, parse_feature
from .fixing import FixedTimestepMixin
from .noise_schedule import NoiseSchedule

logger = logging.get_logger(__name__)

MAX_SIZE = 2**16
MAX_NOISE = 2**28
CHOICES = {
    "head_norm": ("layer_norm", "batch_norm", "none"),
    "pooling": ("mean", "attentive", "transformer"),
    "segmentation_head": ("linear", "upernet"),
}
VAE_WIDTHS = {
    "AutoencoderKL": "block_out_channels",
    "AutoencoderTiny": "encoder_block_out_channels",
    "AutoencoderDC": "encoder_block_out_channels",
    "AutoencoderKLFlux2": "block_out_channels",
    "AutoencoderKLQwenImage": "dim_mult",
}
"""The autoencoders that a checkpoint can carry, with the field of their config that has one entry per level."""
VAE_PACKED = {"AutoencoderKLFlux2": 2}
"""Side of the squares of latents that are packed into one, by autoencoder; 1 for the others."""
UPERNET_LEVELS = 4
GROUP_CHANNELS = 16
"""Channels that the UPerNet head normalizes together."""
POOLING_HEADS = 8
"""Attention heads of a pooling transformer."""

NEVER_STORED = (
    *("token", "revision", "cache_dir", "local_files_only", "force_download"),
    *("subfolder", "variant", "allow_pickle"),
)
"""Loading arguments, which say where a checkpoint is and who may read it."""
SECRET_WORD = r"(?:token|password|passwd|secret|signature|credentials?|(?:api|access)[_-]?key)"
SECRET_NAME = re.compile(rf"(?:.*[_-])?{SECRET_WORD}", re.IGNORECASE)


def never_stored(name: str) -> bool:
    """Whether a keyword is a loading argument or looks like a secret, and must not become a config field."""
    return name in NEVER_STORED or SECRET_NAME.fullmatch(name) is not None


@strict
class NoisyBackboneConfig(FixedTimestepMixin, BackboneConfigMixin, PreTrainedConfig):
    r"""
    The config of a `NoisyBackbone`. A family adds the shape of its network, and overrides what raises
    `NotImplementedError` here, by fields or properties.

    Args:
        vae_config: config of the autoencoder inside the checkpoint, one of `VAE_WIDTHS`; `None` for pixel space.
        vae_decoder: keep the VAE's decoder too.
        image_size: side in pixels (default: from `sample_size` and the VAE).
        noise_schedule: fields of [`NoiseSchedule`] (default: DDPM with linear betas).
        timestep: the timestep chosen for features; `None` until one is selected.
        feature: name of the feature, `blocks.<i>.<kind>` (default: the query at 0.40 of the depth).
        channel_discard: channels of features that are set to 0 wherever the features are read, such as
            `{"blocks.8.hidden": [17, 98]}`: a remedy for massive activations (DiTF, arXiv 2505.18584).
        noise_seed, num_noise_draws: seed and number of the stored evaluation noises; features average over them.
        fixed_timestep: whether the weights are folded for one timestep, class and noise (`model.fix_timestep`).
        fixed_to: what they are folded for, and the features that are left.
        selection: how `timestep` was chosen (method, options, curve), written by `TimestepSelection.apply`.
        base_model, base_model_license: where the weights came from, for the model card; several licenses are a list.
        base_model_license_name, base_model_license_link: of a license that is `"other"`.
        base_model_gated: whether the base model's terms had to be accepted on its page.
        scheduler_config: the scheduler that the weights came with, for conversion back to diffusers.
        head_features: features that a head reads, concatenated along the width (default: `[feature]`). The UPerNet head
            takes one, for all levels of its pyramid, or four, starting with that of the finest level.
        head_timesteps: timesteps that a head reads, one run each, concatenated along the width (default: `[timestep]`).
        head_norm: `"layer_norm"`, `"batch_norm"` or `"none"` before the head's last linear layer.
        pooling: of tokens for classification: `"mean"`, `"attentive"` (cross-attention from a learned query), or
            `"transformer"` (a class token in two transformer blocks of `pooling_width`, a multiple of 8).
        segmentation_head: `"linear"` (per token) or `"upernet"`, with `segmentation_head_channels` (a multiple of 16).
        semantic_loss_ignore_index: label of the pixels that the segmentation loss leaves out.
        stage_kind: kind of the features that a backbone returns: stage `i` is `blocks.<i - 1>.<stage_kind>`, and `stem`
            is the embedded input. As in every transformers backbone, `out_features` or `out_indices` select the stages.
        reshape_hidden_states: whether a backbone returns maps `(batch, width, height, width)`, or else tokens
            `(batch, 1 + tokens, width)`, with their mean first, as DPT reads them.

    Raises:
        ValueError: fields contradict each other; the message names them.
    """

    auto_classes: ClassVar[dict[str, str]] = {}
    """Where transformers finds each class in a saved folder. The image processor's own file names its class."""
    feature_kinds: ClassVar[tuple[str, ...]] = FEATURE_KINDS
    """Kinds of features, in the order in which a block computes them; the last one is its output."""

    vae_config: dict | None = None
    vae_decoder: bool = False
    image_size: int | None = None
    noise_schedule: dict | None = None
    timestep: int | None = None
    feature: str | None = None
    channel_discard: dict | None = None
    noise_seed: int = 0
    num_noise_draws: int = 1
    fixed_timestep: bool = False
    fixed_to: dict | None = None
    selection: dict | None = None
    base_model: str | None = None
    base_model_license: str | list[str] | None = None
    base_model_license_name: str | None = None
    base_model_license_link: str | None = None
    base_model_gated: bool = False
    scheduler_config: dict | None = None
    head_features: list[str] | None = None
    head_timesteps: list[int] | None = None
    head_norm: str = "layer_norm"
    pooling: str = "mean"
    pooling_width: int = 800
    segmentation_head: str = "linear"
    segmentation_head_channels: int = 256
    semantic_loss_ignore_index: int = 255
    stage_kind: str = "hidden"
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if refused := sorted(filter(never_stored, kwargs)):
            raise TypeError(
                f"{type(self).__name__}() got {refused[0]!r}, which is never stored in a config: "
                "pass it to from_pretrained or from_diffusers"
            )
        self.check_vae()
        self.noise_schedule = NoiseSchedule.from_dict(self.noise_schedule or {}).to_dict()
        if self.feature is None:
            self.feature = default_feature(self.num_hidden_layers)
        if self.image_size is None:
            self.image_size = self.sample_size * self.vae_downsampling
        self.check_shape()
        self.check_choice()
        self.check_head()
        self.check_channels()
        self.check_fixed()
        kwargs.pop("stage_names", None)
        self.stage_names = ["stem", *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1))]
        self.set_output_features_output_indices(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the code of every class, so that `trust_remote_code=True` needs no package."""
        self.auto_map = dict(self.auto_classes)
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but a config of another model type is an error, not a warning."""
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(f"this checkpoint holds a model of type {found!r}, not {cls.model_type!r}")
        if stored := sorted(filter(never_stored, config_dict)):
            logger.warning_once(f"config.json holds {', '.join(stored)}, which is ignored; revoke it if it is a secret")
        return super().from_dict({k: v for k, v in config_dict.items() if k not in stored}, **kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        raise NotImplementedError

    @property
    def num_channels(self) -> int:
        """Channels of what the network sees: latents, or pixels without a VAE."""
        raise NotImplementedError

    @property
    def sample_size(self) -> int:
        """Side of what the network sees at the trained resolution."""
        raise NotImplementedError

    @property
    def grid_size(self) -> tuple[int, int]:
        """Height and width of the patch grid at the trained resolution."""
        raise NotImplementedError

    @property
    def network(self) -> str:
        """Description of the network in a model card, after its number of blocks."""
        raise NotImplementedError

    @property
    def folded_network(self) -> str:
        """What a fixed timestep leaves of the network, in a model card, after "a plain"."""
        return "ViT"

    def vit_fields(self) -> dict[str, Any]:
        """Fields of the `ViTConfig` of a plain ViT of the same shape, on what the network sees."""
        raise NotImplementedError

    def feature_width(self, *names: str) -> int:
        """Width of these features.

        Raises:
            ValueError: their widths differ.
        """
        raise NotImplementedError

    @property
    def null_class(self) -> int | None:
        """The label for no class, which follows those of all classes; `None` if the network takes no labels."""
        return None

    @property
    def is_whole(self) -> bool:
        """Whether all blocks are there, so that the network can denoise."""
        return not self.fixed_timestep

    @property
    def patch_side(self) -> int:
        """Side of a token in what the network sees."""
        return self.sample_size // self.grid_size[0]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def image_channels(self) -> int:
        return self.num_channels if self.vae_config is None else self.vae_config.get("in_channels", 3)

    @property
    def takes_pictures(self) -> bool:
        """Whether its pixels are gray or RGB, which an image processor needs."""
        return self.image_channels in (1, 3)

    @property
    def vae_downsampling(self) -> int:
        """Pixels per latent along one side; 1 without a VAE."""
        if self.vae_config is None:
            return 1
        name = self.vae_config.get("_class_name", "AutoencoderKL")
        return VAE_PACKED.get(name, 1) * 2 ** (len(self.vae_config[VAE_WIDTHS[name]]) - 1)

    def resolve_feature(self, name: str) -> FeatureName:
        """Block and kind of a feature.

        Raises:
            ValueError: this network has no such feature.
        """
        return parse_feature(name, self.num_hidden_layers, self.feature_kinds)

    def check_shape(self) -> None:
        """Refuse sizes that contradict each other."""
        if not 1 <= self.num_noise_draws <= 1024:
            raise ValueError(f"num_noise_draws must be in 1..1024, got {self.num_noise_draws}")
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
                f"with a downsampling of {self.vae_downsampling} it must be {self.sample_size * self.vae_downsampling}"
            )

    def check_vae(self) -> None:
        """Refuse a VAE that is unknown or does not fit what the network sees."""
        if self.vae_config is None:
            return
        name = self.vae_config.get("_class_name", "AutoencoderKL")
        if name not in VAE_WIDTHS:
            raise ValueError(f"vae_config must describe an {' or '.join(VAE_WIDTHS)}, got {name!r}")
        widths = VAE_WIDTHS[name]
        if not self.vae_config.get(widths):
            raise ValueError(f"vae_config of an {name} must have {widths}")
        field = "z_dim" if name == "AutoencoderKLQwenImage" else "latent_channels"
        channels, side = self.vae_config.get(field, 4), VAE_PACKED.get(name, 1)
        if channels * side**2 != self.num_channels:
            packed = f", of which {side}x{side} are packed into one" if side > 1 else ""
            raise ValueError(f"num_channels={self.num_channels} contradicts the VAE's {field}={channels}{packed}")

    def check_choice(self) -> None:
        """Refuse a feature or timestep that this network does not have."""
        self.resolve_feature(self.feature or "")
        if self.timestep is not None:
            NoiseSchedule.from_dict(self.noise_schedule or {}).check_timestep(self.timestep)

    def check_channels(self) -> None:
        """Refuse to discard channels that a feature does not have; names become those of `list_features`."""
        discarded = {}
        for name, channels in (self.channel_discard or {}).items():
            feature = str(self.resolve_feature(name))
            width = self.feature_width(feature)
            if not isinstance(channels, list) or not all(type(x) is int and 0 <= x < width for x in channels):
                raise ValueError(
                    f"channel_discard of {name!r} must be a list of channels in 0..{width - 1}, got {channels!r}"
                )
            discarded[feature] = sorted(set(channels))
        self.channel_discard = discarded or None

    def check_head(self) -> None:
        """Refuse a head that is unknown, or reads what this network does not have."""
        for name, accepted in (CHOICES | {"stage_kind": self.feature_kinds}).items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {getattr(self, name)!r}")
        for name in ("head_features", "head_timesteps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, list) or not value):
                raise ValueError(f"{name} must be a non-empty list, or None for the model's own; got {value!r}")
        for feature in self.head_features or ():
            self.resolve_feature(feature)
        schedule = NoiseSchedule.from_dict(self.noise_schedule or {})
        for timestep in self.head_timesteps or ():
            schedule.check_timestep(timestep)
        count = len(self.head_features or [self.feature])
        if self.segmentation_head == "upernet" and count not in (1, UPERNET_LEVELS):
            raise ValueError(f"head_features of an upernet head must be one or {UPERNET_LEVELS} names, got {count}")
        channels = self.segmentation_head_channels
        if not GROUP_CHANNELS <= channels <= MAX_SIZE or channels % GROUP_CHANNELS:
            raise ValueError(f"segmentation_head_channels must be a multiple of {GROUP_CHANNELS}, got {channels}")
        if not POOLING_HEADS <= self.pooling_width <= MAX_SIZE or self.pooling_width % POOLING_HEADS:
            raise ValueError(f"pooling_width must be a multiple of {POOLING_HEADS}, got {self.pooling_width}")


__all__ = ["NoisyBackboneConfig"]
