"""The DiT with a task head: image classification and semantic segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.utils.generic import can_return_tuple

from .configuration_aselect_dit import ASelectDiTConfig
from .feature_reader import ASelectDiTFeatureReader
from .heads import (
    ASelectDiTAttentivePooling,
    ASelectDiTClassificationHead,
    ASelectDiTLinearSegmentationHead,
    ASelectDiTUperNetHead,
)
from .modeling_aselect_dit import ASelectDiTModel


class ASelectDiTHeadModel(ASelectDiTFeatureReader):
    """Features of one or several blocks at one or several timesteps, for a head."""

    accepts_loss_kwargs = False  # losses are means over the batch: Trainer divides them under gradient accumulation

    def __init__(self, config: ASelectDiTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dit = ASelectDiTModel(config)
        self.freeze_unused()

    @property
    def features(self) -> list[str]:
        return self.config.head_features or [str(self.config.feature)]

    @property
    def timesteps(self) -> Sequence[int | None]:
        """Timesteps that are read; `None` is the model's own."""
        return self.config.head_timesteps or [None]

    @property
    def head_shape(self) -> tuple[int, int]:
        """Number of features and the width of each: its timesteps side by side."""
        return len(self.features), len(self.timesteps) * self.config.hidden_size

    def read_features(self, latents: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, BaseModelOutputWithPooling]:
        """`(batch, tokens, *head_shape)`, and the DiT's output at the first timestep."""
        if fixed := {"feature", "timestep"} & kwargs.keys():
            raise ValueError(f"{min(fixed)} of a head is fixed: set config.head_features and config.head_timesteps")
        runs = [
            self.dit(latents=latents, feature=self.features, timestep=timestep, return_dict=True, **kwargs)
            for timestep in self.timesteps
        ]
        tokens = [run.last_hidden_state.unflatten(-1, (len(self.features), -1)) for run in runs]
        return torch.cat(tokens, dim=-1), runs[0]


class ASelectDiTForImageClassification(ASelectDiTHeadModel):
    """Image classifier: pooled tokens, norm, linear layer."""

    def __init__(self, config: ASelectDiTConfig) -> None:
        super().__init__(config)
        self.classifier = ASelectDiTClassificationHead(config, *self.head_shape)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ASelectDiTAttentivePooling):
            init.normal_(module.query, std=self.config.initializer_range)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values, latents: one of them, as in `ASelectDiTModel.forward`.
            labels: `(batch,)` classes, or what `config.problem_type` says: `(batch, num_labels)` floats for
                `"multi_label_classification"` and `"regression"`.
            kwargs: `noise`, `class_labels`, `output_hidden_states`, `output_attentions` of `ASelectDiTModel.forward`.

        Returns:
            `logits` `(batch, num_labels)`; with `labels`, their `loss`. Hidden states and attentions, where asked
            for, are those at the first timestep.

        Raises:
            ValueError: as `ASelectDiTModel.forward`.
        """
        tokens, outputs = self.read_features(self.dit.prepare_latents(pixel_values, latents), **kwargs)
        logits = self.classifier(tokens)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class ASelectDiTForSemanticSegmentation(ASelectDiTHeadModel):
    """Semantic segmentation with a linear or a UPerNet head, see `config.segmentation_head`."""

    def __init__(self, config: ASelectDiTConfig) -> None:
        super().__init__(config)
        upernet = config.segmentation_head == "upernet"
        self.decode_head = (ASelectDiTUperNetHead if upernet else ASelectDiTLinearSegmentationHead)(
            config, *self.head_shape
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput:
        r"""
        Args:
            pixel_values, latents: one of them, as in `ASelectDiTModel.forward`.
            labels: `(batch, height, width)` classes of any resolution; `config.semantic_loss_ignore_index` is ignored.
            kwargs: `noise`, `class_labels`, `output_hidden_states`, `output_attentions` of `ASelectDiTModel.forward`.

        Returns:
            `logits` `(batch, num_labels, height, width)` on the patch grid (linear head) or at four times its
            resolution (UPerNet); `post_process_semantic_segmentation` of the image processor resizes them. With
            `labels`, the cross-entropy `loss` at the labels' resolution. Hidden states and attentions, where asked
            for, are those at the first timestep.

        Raises:
            ValueError: as `ASelectDiTModel.forward`; labels of another shape, or of a model with a single label.
        """
        latents = self.dit.prepare_latents(pixel_values, latents)
        if labels is not None and (labels.ndim != 3 or len(labels) != len(latents)):
            raise ValueError(f"labels must be ({len(latents)}, height, width), got {tuple(labels.shape)}")
        if labels is not None and self.config.num_labels == 1:
            raise ValueError("num_labels must be at least 2 to train: the cross-entropy of a single label is 0")
        tokens, outputs = self.read_features(latents, **kwargs)
        logits = self.decode_head(tokens, self.dit.grid_size(latents))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, ignore_index=self.config.semantic_loss_ignore_index)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["ASelectDiTForImageClassification", "ASelectDiTForSemanticSegmentation"]
