"""A diffusion transformer of diffusers as a transformers backbone: for UPerNet, DETR, DPT and others."""

from __future__ import annotations

from .configuration_aselect_diffusion import ASelectDiffusionConfig
from .modeling_aselect_diffusion import ASelectDiffusionModel, ASelectDiffusionPreTrainedModel
from .stage_features import StageFeatures


class ASelectDiffusionBackbone(StageFeatures, ASelectDiffusionPreTrainedModel):
    __doc__ = StageFeatures.__doc__
    config_class = ASelectDiffusionConfig
    backbone_class = ASelectDiffusionModel


__all__ = ["ASelectDiffusionBackbone"]
