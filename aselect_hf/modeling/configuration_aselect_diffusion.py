"""Configuration of a pretrained diffusion transformer of diffusers used as a vision backbone at a chosen timestep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict

from .configuration_noisy_backbone import MAX_SIZE, NoisyBackboneConfig
from .families import FAMILIES, find_family
from .family import Family
from .features import FeatureName, parse_feature

if TYPE_CHECKING:
    # Saving a config copies the files that it imports, directly or not. These imports make a saved folder complete.
    from .backbone_aselect_diffusion import ASelectDiffusionBackbone  # noqa: F401
    from .image_processing_aselect_dit import ASelectDiTImageProcessor  # noqa: F401
    from .modeling_aselect_diffusion import ASelectDiffusionModel  # noqa: F401
    from .modeling_aselect_diffusion_heads import ASelectDiffusionForImageClassification  # noqa: F401

MAX_LAYERS = 1024
POSITION_TABLES = {"SD3Transformer2DModel": "pos_embed_max_size"}
"""Classes that read positions from the middle of a square table, and the field with its side in tokens."""
AUTO_MAP = {
    "AutoConfig": "configuration_aselect_diffusion.ASelectDiffusionConfig",
    "AutoModel": "modeling_aselect_diffusion.ASelectDiffusionModel",
    "AutoBackbone": "backbone_aselect_diffusion.ASelectDiffusionBackbone",
    "AutoModelForImageClassification": "modeling_aselect_diffusion_heads.ASelectDiffusionForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_aselect_diffusion_heads.ASelectDiffusionForSemanticSegmentation",
}


@strict
class ASelectDiffusionConfig(NoisyBackboneConfig):
    r"""
    Args:
        transformer_class: name of the class in diffusers, one of `families.FAMILIES`.
        transformer_config: config of that class, unchanged; its depth is that of the whole network.
        kept_blocks: number of blocks that are there, the first ones (default: all).
        kept_positions: side in tokens of what is there of the position table, its middle (default: all). Larger images
            are refused, and all others have the same positions as with the whole table.
        conditioning: shapes of the stored tensors of the prompt, without a batch, by the pipeline's argument names.
        prompt: text that they encode, for the record.
        skipped_text_encoders: names of the text encoders that were left out when the prompt was encoded.
        guidance: guidance scale that the network takes as an input, if it does.
        merged_tokens: with a fixed timestep, how many text tokens of the prompt each remaining one stands for.
        initializer_range: standard deviation of new weights of a head.
        kwargs: fields that all families share, see [`NoisyBackboneConfig`].

    Raises:
        ValueError: fields contradict each other; the message names them.
    """

    model_type = "aselect_diffusion"
    auto_classes = AUTO_MAP

    transformer_class: str = "SD3Transformer2DModel"
    transformer_config: dict | None = None
    kept_blocks: int | None = None
    kept_positions: int | None = None
    conditioning: dict | None = None
    prompt: str = ""
    skipped_text_encoders: list[str] | None = None
    guidance: float | int | None = None
    merged_tokens: list[int] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        family = find_family(self.transformer_class)
        self.check_positions()
        shape = self.shape
        for name, default in family.defaults.items():
            if isinstance(default, int) and not isinstance(default, bool):
                value = shape[name]
                most = MAX_LAYERS if name in {stack.depth for stack in family.stacks} else MAX_SIZE
                if not isinstance(value, int) or not 0 < value <= most:
                    raise ValueError(f"transformer_config must have {name} in 1..{most}, got {value!r}")
        if reason := family.refusal(shape):
            raise ValueError(f"this {self.transformer_class} is not supported: {reason}")
        if self.noise_schedule is None:
            self.noise_schedule = dict(family.schedule)
        depth = family.depth(shape)
        if self.kept_blocks is not None and not 1 <= self.kept_blocks <= depth:
            raise ValueError(f"kept_blocks must be in 1..{depth}, the depth of the network, got {self.kept_blocks}")
        if self.guidance is not None and not family.guided(shape):
            raise ValueError(
                f"guidance={self.guidance}, but this {self.transformer_class} takes no guidance: leave it out"
            )
        if self.guidance is None and family.guided(shape):
            self.guidance = 1.0
        self.check_conditioning()
        super().__post_init__(**kwargs)

    @property
    def family(self) -> Family:
        return FAMILIES[self.transformer_class]

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of `transformer_config` that are read here, with defaults and with the kept positions."""
        return dict(find_family(self.transformer_class).defaults) | self.built_config

    @property
    def built_config(self) -> dict[str, Any]:
        """`transformer_config` with the kept positions, from which the network is built."""
        built = dict(self.transformer_config or {})
        if self.kept_positions is not None and self.transformer_class in POSITION_TABLES:
            built[POSITION_TABLES[self.transformer_class]] = self.kept_positions
        return built

    def check_positions(self) -> None:
        """Refuse a part of the position table that does not share its middle with the whole."""
        if self.kept_positions is None:
            return
        field = POSITION_TABLES.get(self.transformer_class)
        if field is None:
            raise ValueError(f"kept_positions={self.kept_positions}, but a {self.transformer_class} has no such table")
        side = (self.transformer_config or {}).get(field, self.family.defaults[field])
        if not isinstance(side, int):
            return  # refused by the check of all fields
        if not 0 < self.kept_positions <= side or (side - self.kept_positions) % 2:
            raise ValueError(f"kept_positions must be in 1..{side} and differ from it by an even number, got "
                             f"{self.kept_positions}")  # fmt: skip

    @property
    def position_limit(self) -> str:
        """Why larger images are refused, for errors."""
        return "the positions of this network end at a patch grid of" if self.kept_positions is None else (
            "convert the source again with that image_size, because positions were kept up to a patch grid of"
        )  # fmt: skip

    def check_conditioning(self) -> None:
        """Refuse stored tensors that the network cannot take."""
        expected, shape = self.family.conditioning, self.shape
        tokens = {name: shape[field] for name, field in self.family.tokens.items()}
        if self.conditioning is None:
            self.conditioning = {
                name: [tokens.get(name, 1)] * name.startswith("prompt") + ([shape[width]] if width else [])
                for name, width in expected.items()
            }
        if set(self.conditioning) != set(expected):
            raise ValueError(f"conditioning must have the tensors {sorted(expected)}, got {sorted(self.conditioning)}")
        for name, width in expected.items():
            size = self.conditioning[name]
            if (
                not isinstance(size, list)
                or not size
                or not all(isinstance(x, int) and 0 < x <= MAX_SIZE for x in size)
            ):
                raise ValueError(f"conditioning {name} must have a shape without batch, got {size!r}")
            if width is not None and size[-1] != shape[width]:
                raise ValueError(f"conditioning {name} must end in {width}={shape[width]}, got {tuple(size)}")
            if size[0] != tokens.get(name, size[0]):
                raise ValueError(
                    f"conditioning {name} must have {self.family.tokens[name]}={tokens[name]} tokens, got {size[0]}"
                )

    @property
    def is_whole(self) -> bool:
        """Whether all blocks are there, so that the network can denoise."""
        return self.num_hidden_layers == self.family.depth(self.shape)

    @property
    def num_hidden_layers(self) -> int:
        return self.kept_blocks or self.family.depth(self.shape)

    @property
    def hidden_size(self) -> int:
        return self.family.width(self.shape)

    @property
    def num_attention_heads(self) -> int:
        return self.family.heads(self.shape)

    @property
    def num_channels(self) -> int:
        return self.family.channels(self.shape)

    @property
    def sample_size(self) -> int:
        if self.image_size is None:
            return self.family.sample_size(self.shape)
        return self.image_size // self.vae_downsampling

    @property
    def grid_size(self) -> tuple[int, int]:
        side = self.sample_size // self.family.patch(self.shape)
        return side, side

    @property
    def patch_size(self) -> int:
        return self.family.patch(self.shape)

    @property
    def network(self) -> str:
        return f"{self.transformer_class}, width {self.hidden_size}"

    @property
    def folded_network(self) -> str:
        if self.family.fold != "joint":
            return "ViT"
        tokens = len(self.merged_tokens or [1])
        return f"network of image tokens and {tokens} text token{'s' if tokens > 1 else ''}"

    @property
    def feature_kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        """Kinds of features that some block has."""
        return tuple(dict.fromkeys(kind for stack in self.family.stacks for kind in stack.taps))

    def list_features(self) -> list[str]:
        if self.fixed_to is not None:
            return super().list_features()
        return [str(FeatureName(i, kind)) for i in range(self.num_hidden_layers) for kind in self.kinds_of(i)]

    def kinds_of(self, block: int) -> tuple[str, ...]:
        """Kinds of features of a block."""
        return tuple(self.family.locate(self.shape, block)[0].taps)

    def resolve_feature(self, name: str) -> FeatureName:
        feature = parse_feature(name, self.num_hidden_layers, self.feature_kinds)
        if feature.kind not in (kinds := self.kinds_of(feature.block)):
            raise ValueError(f"feature {name!r}: block {feature.block} has the kinds {', '.join(kinds)}")
        return feature

    def vit_fields(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": 4 * self.hidden_size,
            "hidden_act": "gelu_pytorch_tanh",
            "image_size": self.sample_size,
            "patch_size": self.patch_size,
            "num_channels": self.num_channels,
        }

    def feature_width(self, *names: str) -> int:
        width = self.family.key_width
        widths = {
            width(self.shape) if width and self.resolve_feature(name).kind in ("key", "value") else self.hidden_size
            for name in names
        }
        if len(widths) > 1:
            raise ValueError(f"features must have one width; {', '.join(names)} have {sorted(widths)}")
        return widths.pop() if widths else self.hidden_size

    def check_shape(self) -> None:
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} gives latents of {self.sample_size}, not a multiple of {self.patch_size}"
            )
        most = self.family.max_grid(self.shape)
        if most is not None and self.grid_size[0] > most:
            raise ValueError(
                f"image_size={self.image_size} is too large: {self.position_limit} {most}x{most}, "
                f"which is image_size={most * self.patch_size * self.vae_downsampling}"
            )
        super().check_shape()


ASelectDiffusionConfig.register_for_auto_class()

__all__ = ["ASelectDiffusionConfig"]
