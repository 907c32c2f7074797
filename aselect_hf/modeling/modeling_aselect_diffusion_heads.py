"""A diffusion transformer of diffusers with a task head: image classification and semantic segmentation."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)

from .configuration_aselect_diffusion import ASelectDiffusionConfig
from .modeling_aselect_diffusion import ASelectDiffusionModel, ASelectDiffusionPreTrainedModel
from .task_models import ImageClassificationModel, SemanticSegmentationModel


class ASelectDiffusionForImageClassification(ImageClassificationModel, ASelectDiffusionPreTrainedModel):
    """Image classifier: pooled tokens, norm, linear layer."""

    config_class = ASelectDiffusionConfig
    backbone_class = ASelectDiffusionModel


class ASelectDiffusionForSemanticSegmentation(SemanticSegmentationModel, ASelectDiffusionPreTrainedModel):
    """Semantic segmentation with a linear or a UPerNet head, see `config.segmentation_head`."""

    config_class = ASelectDiffusionConfig
    backbone_class = ASelectDiffusionModel


# Pipelines call models that are not in these tables "not supported".
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.setdefault(
    "aselect_diffusion", ASelectDiffusionForImageClassification.__name__
)
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.setdefault(
    "aselect_diffusion", ASelectDiffusionForSemanticSegmentation.__name__
)

__all__ = ["ASelectDiffusionForImageClassification", "ASelectDiffusionForSemanticSegmentation"]
