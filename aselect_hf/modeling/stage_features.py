"""A network of any family as a transformers backbone: for UPerNet, DETR, Mask2Former, DPT and others."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .arguments import known_arguments
from .feature_reader import FeatureReader
from .features import tokens_to_map
from .noisy_backbone import NoisyBackbone


class StageFeatures(BackboneMixin, FeatureReader):
    """Features of several blocks at the chosen timestep. No block after the deepest requested stage is run.

    `config.out_features` (or `out_indices`) names the stages, `config.stage_kind` the kind of feature, and
    `config.reshape_hidden_states=False` gives tokens instead of maps. DPT takes tokens and divides the image by
    `config.patch_size`, so it only fits models in pixel space.
    """

    backbone_class: ClassVar[type[NoisyBackbone]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(self.stage_names)
        setattr(self, self.base_model_prefix, self.backbone_class(config))
        self.freeze_unused()
        self.post_init()

    @property
    def features(self) -> list[str]:
        """Names of the features of `out_features`, except for the stem, which is the input of the first block."""
        blocks = [index - 1 for index, stage in enumerate(self.stage_names) if stage in self.out_features and index]
        return [f"blocks.{block}.{self.config.stage_kind}" for block in blocks] or ["blocks.0.attention_norm"]

    def pad(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Zeros (gray) on the right and below, up to the next multiple of the patch in pixels."""
        multiple = self.config.patch_side * self.config.vae_downsampling
        height, width = pixel_values.shape[-2:]
        return nn.functional.pad(pixel_values, (0, -width % multiple, 0, -height % multiple))

    @known_arguments("timestep", "noise", "class_labels")
    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BackboneOutput:
        r"""
        Args:
            pixel_values: `(batch, channels, height, width)` in [-1, 1].
            kwargs: `timestep`, `noise`, `class_labels`, `output_hidden_states`, `output_attentions` of
                `NoisyBackbone.forward`.

        Returns:
            `feature_maps`, one per stage of `config.out_features`: `(batch, width, height, width)` on the patch grid,
            or without `config.reshape_hidden_states` `(batch, 1 + tokens, width)`, with the mean of the tokens first.
            An image that is not a multiple of the patch is padded with zeros on the right and below, as in detectors.

        Raises:
            ValueError, TypeError: as `NoisyBackbone.forward`.
        """
        stem = "stem" in self.out_features
        output_hidden_states = kwargs.pop("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        latents = self.base_model.prepare_latents(self.pad(pixel_values))
        outputs = self.base_model(
            latents=latents,
            feature=self.features,
            output_hidden_states=stem or output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        stages = list(outputs.last_hidden_state.split(self.config.hidden_size, dim=-1))
        if stem:
            stages = [outputs.hidden_states[0], *stages][: len(self.out_features)]
        if self.config.reshape_hidden_states:
            stages = [tokens_to_map(tokens, self.base_model.grid_size(latents)).contiguous() for tokens in stages]
        else:
            stages = [torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) for tokens in stages]
        return BackboneOutput(
            feature_maps=tuple(stages),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )


__all__ = ["StageFeatures"]
