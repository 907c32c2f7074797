"""The DiT as a transformers backbone: for UPerNet, DETR, Mask2Former, DPT and whatever takes a `backbone_config`."""

from __future__ import annotations

from typing import Any

import torch
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_aselect_dit import ASelectDiTConfig
from .feature_reader import ASelectDiTFeatureReader
from .features import tokens_to_map
from .modeling_aselect_dit import ASelectDiTModel


class ASelectDiTBackbone(BackboneMixin, ASelectDiTFeatureReader):
    """Features of several blocks at the chosen timestep; no block after the deepest stage asked for is run.

    `config.out_features` (or `out_indices`) names the stages, `config.stage_kind` the kind of feature, and
    `config.reshape_hidden_states=False` gives tokens instead of maps. DPT takes tokens, and divides the image by
    `config.patch_size`: it fits models in pixel space only.
    """

    def __init__(self, config: ASelectDiTConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(self.stage_names)
        self.dit = ASelectDiTModel(config)
        self.freeze_unused()
        self.post_init()

    @property
    def features(self) -> list[str]:
        """Names of the features behind `out_features`, the stem left out (it is the input of the first block)."""
        blocks = [index - 1 for index, stage in enumerate(self.stage_names) if stage in self.out_features and index]
        return [f"blocks.{block}.{self.config.stage_kind}" for block in blocks] or ["blocks.0.attention_norm"]

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BackboneOutput:
        r"""
        Args:
            pixel_values: `(batch, channels, height, width)` in [-1, 1].
            kwargs: the other arguments of `ASelectDiTModel.forward`, but for `feature` and `latents`.

        Returns:
            `feature_maps`, one per stage of `config.out_features`: `(batch, width, height, width)` on the patch grid,
            or `(batch, 1 + tokens, width)`, the tokens' mean first, where `config.reshape_hidden_states` is off.

        Raises:
            ValueError: as `ASelectDiTModel.forward`.
        """
        stem = "stem" in self.out_features
        output_hidden_states = kwargs.pop("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        latents = self.dit.prepare_latents(pixel_values)
        outputs = self.dit(
            latents=latents, feature=self.features, output_hidden_states=stem or output_hidden_states, **kwargs
        )
        stages = list(outputs.last_hidden_state.split(self.config.hidden_size, dim=-1))
        if stem:
            stages = [outputs.hidden_states[0], *stages][: len(self.out_features)]
        if self.config.reshape_hidden_states:
            stages = [tokens_to_map(tokens, self.dit.grid_size(latents)).contiguous() for tokens in stages]
        else:
            stages = [torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) for tokens in stages]
        return BackboneOutput(
            feature_maps=tuple(stages),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )


__all__ = ["ASelectDiTBackbone"]
