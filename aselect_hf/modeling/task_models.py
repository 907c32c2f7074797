"""A backbone of any family with a task head: image classification and semantic segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.utils.generic import can_return_tuple

from .arguments import known_arguments
from .feature_reader import FeatureReader
from .finite import check_finite
from .heads import (
    ASelectDiTAttentivePooling,
    ASelectDiTClassificationHead,
    ASelectDiTLinearSegmentationHead,
    ASelectDiTTransformerPooling,
    ASelectDiTUperNetHead,
)
from .noisy_backbone import NoisyBackbone

OF_THE_BACKBONE = ("noise", "class_labels", "timestep", "feature")
"""Arguments passed to `read_features`, which refuses the last two."""


class TaskModel(FeatureReader):
    """Features of one or several blocks at one or several timesteps, for a head."""

    backbone_class: ClassVar[type[NoisyBackbone]]

    accepts_loss_kwargs = True  # Trainer then passes num_items_in_batch

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        config.architectures = [type(self).__name__]  # read by `make_image_processor`
        setattr(self, self.base_model_prefix, self.backbone_class(config))
        self.freeze_unused()

    @property
    def features(self) -> list[str]:
        return self.config.head_features or [str(self.config.feature)]

    @property
    def timesteps(self) -> Sequence[int | None]:
        return self.config.head_timesteps or [None]

    @property
    def head_shape(self) -> tuple[int, int]:
        """Number of features, and the width of each over all timesteps."""
        return len(self.features), len(self.timesteps) * self.config.feature_width(*self.features)

    def read_features(self, latents: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, BaseModelOutputWithPooling]:
        """`(batch, tokens, *head_shape)`, and the backbone's output at the first timestep."""
        if fixed := {"feature", "timestep"} & kwargs.keys():
            raise ValueError(f"{min(fixed)} of a head cannot vary: set config.head_features and config.head_timesteps")
        runs = [
            self.base_model(latents=latents, feature=self.features, timestep=timestep, return_dict=True, **kwargs)
            for timestep in self.timesteps
        ]
        tokens = [run.last_hidden_state for run in runs]  # each (batch, tokens, features * width)
        tokens = [x.view(*x.shape[:-1], len(self.features), self.config.feature_width(*self.features)) for x in tokens]
        return torch.cat(tokens, dim=-1), runs[0]

    def checked(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits; they must be finite in evaluation mode."""
        if not self.training:
            check_finite([logits], "the head gives NaN or infinite values", next(self.base_model.parameters()))
        return logits


class ImageClassificationModel(TaskModel):
    """Image classifier: pooled tokens, norm, linear layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = ASelectDiTClassificationHead(config, *self.head_shape)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ASelectDiTAttentivePooling):
            init.normal_(module.query, std=self.config.initializer_range)
        elif isinstance(module, ASelectDiTTransformerPooling):
            init.normal_(module.class_token, std=self.config.initializer_range)

    @known_arguments(*OF_THE_BACKBONE)
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values, latents: one of them, as in `NoisyBackbone.forward`.
            labels: `(batch,)` classes, or what `config.problem_type` says: `(batch, num_labels)` floats for
                `"multi_label_classification"` and `"regression"`.
            num_items_in_batch: divisor of the sum of the losses (default: the number of labels here). transformers'
                `Trainer` passes the number of labels in all batches of an optimizer step.
            kwargs: `noise`, `class_labels`, `output_hidden_states`, `output_attentions` of `NoisyBackbone.forward`.

        Returns:
            `logits` `(batch, num_labels)`; with `labels`, their `loss`. Hidden states and attentions, if requested,
            are those at the first timestep.

        Raises:
            ValueError, TypeError: as `NoisyBackbone.forward`.
        """
        tokens, outputs = self.read_features(self.base_model.prepare_latents(pixel_values, latents), **kwargs)
        logits = self.checked(self.classifier(tokens))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch=num_items_in_batch)
            if num_items_in_batch is not None and self.config.problem_type != "single_label_classification":
                loss = loss * labels.numel() / num_items_in_batch  # transformers leaves these two a mean
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SemanticSegmentationModel(TaskModel):
    """Semantic segmentation with a linear or a UPerNet head, see `config.segmentation_head`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        upernet = config.segmentation_head == "upernet"
        head_class = ASelectDiTUperNetHead if upernet else ASelectDiTLinearSegmentationHead
        self.decode_head = head_class(config, *self.head_shape)
        self.post_init()

    @known_arguments(*OF_THE_BACKBONE)
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput:
        r"""
        Args:
            pixel_values, latents: one of them, as in `NoisyBackbone.forward`.
            labels: `(batch, height, width)` classes of any resolution; `config.semantic_loss_ignore_index` is ignored.
            num_items_in_batch: in training mode, divisor of the sum of the losses (default, and always in evaluation:
                the number of pixels here that are not ignored). transformers' `Trainer` passes the number of pixels in
                all batches of an optimizer step, including those with label 255.
            kwargs: `noise`, `class_labels`, `output_hidden_states`, `output_attentions` of `NoisyBackbone.forward`.

        Returns:
            `logits` `(batch, num_labels, height, width)` on the patch grid (linear head) or at four times its
            resolution (UPerNet); `post_process_semantic_segmentation` of the image processor resizes them. With
            `labels`, the cross-entropy `loss` at the labels' resolution, 0 if all are ignored. Hidden states and
            attentions, if requested, are those at the first timestep.

        Raises:
            ValueError, TypeError: as `NoisyBackbone.forward`; labels have a wrong shape, or there is only one label.
        """
        latents = self.base_model.prepare_latents(pixel_values, latents)
        if labels is not None and (labels.ndim != 3 or labels.shape[0] != latents.shape[0]):
            raise ValueError(f"labels must be ({latents.shape[0]}, height, width), got {tuple(labels.shape)}")
        if labels is not None and self.config.num_labels == 1:
            raise ValueError("num_labels must be at least 2 to train: the cross-entropy of a single label is 0")
        tokens, outputs = self.read_features(latents, **kwargs)
        logits = self.checked(self.decode_head(tokens, self.base_model.grid_size(latents)))
        loss = None
        if labels is not None:
            ignore_index = self.config.semantic_loss_ignore_index
            if num_items_in_batch is None or not self.training:
                num_items_in_batch = (labels != ignore_index).sum().clamp(min=1)
            precise = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a sum over pixels overflows float16
            loss = self.loss_function(precise, labels, ignore_index=ignore_index, num_items_in_batch=num_items_in_batch)
        return SemanticSegmenterOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["ImageClassificationModel", "SemanticSegmentationModel"]
