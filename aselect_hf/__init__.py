"""Diffusion Transformers as vision backbones, at the timestep their own features choose.

Importing the package registers its config, models and image processor with the Auto classes of transformers. Names that
need more than transformers are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from aselect_hf.modeling.backbone_aselect_diffusion import ASelectDiffusionBackbone
from aselect_hf.modeling.backbone_aselect_dit import ASelectDiTBackbone
from aselect_hf.modeling.configuration_aselect_diffusion import ASelectDiffusionConfig
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.image_processing_aselect_dit import ASelectDiTImageProcessor, make_image_processor
from aselect_hf.modeling.modeling_aselect_diffusion import ASelectDiffusionModel
from aselect_hf.modeling.modeling_aselect_diffusion_heads import (
    ASelectDiffusionForImageClassification,
    ASelectDiffusionForSemanticSegmentation,
)
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.modeling.modeling_aselect_dit_heads import (
    ASelectDiTForImageClassification,
    ASelectDiTForSemanticSegmentation,
)
from aselect_hf.modeling.noisy_pretrained import READERS

if TYPE_CHECKING:
    from aselect_hf.audit import audit_timestep, find_massive_channels
    from aselect_hf.compare import compare_strategies
    from aselect_hf.conversion import convert_checkpoint, from_diffusers
    from aselect_hf.hub import push_to_hub
    from aselect_hf.pictures import attention_maps, noise_strip, pca_map, similarity_map
    from aselect_hf.selection import TimestepSelection, select_timestep
    from aselect_hf.selection.high_frequency_ratio import high_frequency_ratio

__version__ = "0.1.0"

CLASSES: tuple[tuple[Any, ...], ...] = (
    (
        *(ASelectDiTConfig, ASelectDiTModel, ASelectDiTBackbone),
        *(ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation),
    ),
    (
        *(ASelectDiffusionConfig, ASelectDiffusionModel, ASelectDiffusionBackbone),
        *(ASelectDiffusionForImageClassification, ASelectDiffusionForSemanticSegmentation),
    ),
)
"""Per model type: its config, model, backbone, classifier and segmenter."""

for config_class, model_class, backbone_class, classifier_class, segmenter_class in CLASSES:
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    AutoBackbone.register(config_class, backbone_class, exist_ok=True)
    AutoModelForImageClassification.register(config_class, classifier_class, exist_ok=True)
    AutoModelForSemanticSegmentation.register(config_class, segmenter_class, exist_ok=True)
    AutoImageProcessor.register(config_class, image_processor_classes={"pil": ASelectDiTImageProcessor}, exist_ok=True)
    # There is none. Unless that is said here, `pipeline` asks to run the code of a saved folder, to look for one there.
    # (`AutoVideoProcessor.register` would say the same, but needs torchvision.)
    VIDEO_PROCESSOR_MAPPING.register(config_class, {"torchvision": None}, exist_ok=True)  # type: ignore[arg-type]


def _read_diffusers(source: Any, **kwargs: Any) -> Any:
    return import_module("aselect_hf.conversion").from_diffusers(source, **kwargs)


READERS["diffusers"] = _read_diffusers

LAZY = {
    "TimestepSelection": "selection",
    "attention_maps": "pictures",
    "audit_timestep": "audit",
    "compare_strategies": "compare",
    "convert_checkpoint": "conversion",
    "find_massive_channels": "audit",
    "from_diffusers": "conversion",
    "high_frequency_ratio": "selection.high_frequency_ratio",
    "noise_strip": "pictures",
    "pca_map": "pictures",
    "push_to_hub": "hub",
    "select_timestep": "selection",
    "similarity_map": "pictures",
}
"""Public names that are imported on first use, and where each is found."""
ROOMS = ("audit", "compare", "conversion", "data", "hub", "pictures", "selection")
"""Subpackages that are imported on first use, as in `aselect_hf.hub.push_folder`."""

__all__ = [
    "ASelectDiTBackbone",
    "ASelectDiTConfig",
    "ASelectDiTForImageClassification",
    "ASelectDiTForSemanticSegmentation",
    "ASelectDiTModel",
    "ASelectDiffusionBackbone",
    "ASelectDiffusionConfig",
    "ASelectDiffusionForImageClassification",
    "ASelectDiffusionForSemanticSegmentation",
    "ASelectDiffusionModel",
    "TimestepSelection",
    "attention_maps",
    "audit_timestep",
    "compare_strategies",
    "convert_checkpoint",
    "find_massive_channels",
    "from_diffusers",
    "high_frequency_ratio",
    "make_image_processor",
    "noise_strip",
    "pca_map",
    "push_to_hub",
    "select_timestep",
    "similarity_map",
]


if not TYPE_CHECKING:  # or type checkers would believe every name to be there

    def __getattr__(name: str) -> Any:
        if name in ROOMS:
            return import_module(f"{__name__}.{name}")
        if name not in LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{LAZY[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY, *ROOMS})
