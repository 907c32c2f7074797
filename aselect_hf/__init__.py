"""Diffusion Transformers as vision backbones, at the timestep their own features choose."""

from typing import Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from aselect_hf.conversion import convert_checkpoint
from aselect_hf.hub import push_to_hub
from aselect_hf.modeling.backbone_aselect_dit import ASelectDiTBackbone
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.image_processing_aselect_dit import ASelectDiTImageProcessor, make_image_processor
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.modeling.modeling_aselect_dit_heads import (
    ASelectDiTForImageClassification,
    ASelectDiTForSemanticSegmentation,
)
from aselect_hf.modeling.noisy_pretrained import READERS
from aselect_hf.selection import TimestepSelection, select_timestep
from aselect_hf.selection.high_frequency_ratio import high_frequency_ratio

__version__ = "0.1.0"


def _read_diffusers(source: Any, **kwargs: Any) -> Any:
    from aselect_hf.conversion import load_diffusers

    return load_diffusers(source, **kwargs)


READERS["diffusers"] = _read_diffusers

AutoConfig.register(ASelectDiTConfig.model_type, ASelectDiTConfig, exist_ok=True)
AutoModel.register(ASelectDiTConfig, ASelectDiTModel, exist_ok=True)
AutoBackbone.register(ASelectDiTConfig, ASelectDiTBackbone, exist_ok=True)
AutoModelForImageClassification.register(ASelectDiTConfig, ASelectDiTForImageClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(ASelectDiTConfig, ASelectDiTForSemanticSegmentation, exist_ok=True)
AutoImageProcessor.register(ASelectDiTConfig, image_processor_classes={"pil": ASelectDiTImageProcessor}, exist_ok=True)
# There is none. Unless that is said here, `pipeline` asks to run the code of a saved folder, to look for one there.
# (`AutoVideoProcessor.register` would say the same, but needs torchvision.)
VIDEO_PROCESSOR_MAPPING.register(ASelectDiTConfig, {"torchvision": None}, exist_ok=True)  # type: ignore[arg-type]

__all__ = [
    "ASelectDiTBackbone",
    "ASelectDiTConfig",
    "ASelectDiTForImageClassification",
    "ASelectDiTForSemanticSegmentation",
    "ASelectDiTModel",
    "TimestepSelection",
    "convert_checkpoint",
    "high_frequency_ratio",
    "make_image_processor",
    "push_to_hub",
    "select_timestep",
]
