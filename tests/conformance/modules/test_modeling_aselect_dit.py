"""transformers' common tests on the classes of this package; a class takes part as soon as `aselect_hf` exports it.

Collected by `python -m tests.conformance.run` only: the imports from `tests` are transformers' own sources.
Every skip and override below says why.
"""

from __future__ import annotations

import unittest
from typing import Any
from unittest import mock

import torch
from tests.test_backbone_common import BackboneTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)
from tests.test_modeling_common import ModelTesterMixin, floats_tensor
from transformers import initialization
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto import modeling_auto as auto
from transformers.testing_utils import require_torch, require_vision, torch_device

import aselect_hf
from aselect_hf import ASelectDiTConfig
from aselect_hf.modeling.image_processing_aselect_dit import ASelectDiTImageProcessor

TABLES: dict[str, dict[str, Any]] = {
    "ASelectDiTModel": auto.MODEL_MAPPING_NAMES,
    "ASelectDiTForImageClassification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "ASelectDiTForSemanticSegmentation": auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    "ASelectDiTBackbone": auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
}
"""Every model class, with the static table in which the mixins look up by name which labels and outputs it has."""

CLASSES = {name: getattr(aselect_hf, name) for name in TABLES if hasattr(aselect_hf, name)}
for name in CLASSES:
    TABLES[name][ASelectDiTConfig.model_type] = name


class ASelectDiTModelTester:
    """A tiny configuration and inputs for it, with the attributes that the mixins read from a model tester."""

    batch_size = 3
    image_size = 8
    patch_size = 2
    num_channels = 3
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    seq_length = (image_size // patch_size) ** 2
    is_training = True

    def __init__(self, parent: unittest.TestCase, feature: str | None, **head: Any) -> None:
        self.parent = parent
        self.feature = feature
        self.head = head

    def get_config(self) -> ASelectDiTConfig:
        return ASelectDiTConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            mlp_ratio=2,
            patch_size=self.patch_size,
            sample_size=self.image_size,
            num_channels=self.num_channels,
            num_condition_classes=10,
            vae_config=None,
            timestep=50,
            feature=self.feature,
            **self.head,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[ASelectDiTConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(shape).to(torch_device)}


zeros_ = initialization.zeros_


def nearly_zeros_(tensor: torch.Tensor) -> torch.Tensor:
    """Small random numbers for parameters; the running statistics of BatchNorm stay zero."""
    return initialization.normal_(tensor, std=0.2) if isinstance(tensor, torch.nn.Parameter) else zeros_(tensor)


@require_torch
class ASelectDiTModelTest(ModelTesterMixin, unittest.TestCase):
    """All model classes on the last block's output: the whole network runs."""

    all_model_classes = tuple(CLASSES.values())
    feature = "blocks.-1.hidden"
    head: dict[str, Any] = {}  # noqa: RUF012
    test_resize_embeddings = False  # there is no vocabulary to resize
    test_can_init_all_missing_weights_before_2023 = True  # else skipped: it reads a model's year off a copyright line

    def setUp(self) -> None:
        # adaLN-Zero starts every block as the identity, which would hide from the tests what blocks do.
        zeros = mock.patch.object(initialization, "zeros_", nearly_zeros_)
        zeros.start()
        self.addCleanup(zeros.stop)
        self.model_tester = ASelectDiTModelTester(self, self.feature, **self.head)
        self.config_tester = ConfigTester(self, config_class=ASelectDiTConfig, has_text_modality=False, hidden_size=32)

    def test_can_load_ignoring_mismatched_shapes(self) -> None:
        """Without the patch of `setUp`: this one checks that the biases of new heads are near zero."""
        self.doCleanups()
        super().test_can_load_ignoring_mismatched_shapes()

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        """`test_eager_matches_sdpa_inference` fills any argument called `noise` with one number per patch, for ViTMAE's
        random masking; ours is the diffusion noise, of the shape of the latents."""
        inputs_dict = {name: value for name, value in inputs_dict.items() if name != "noise"}
        return super()._prepare_for_class(inputs_dict, model_class, return_labels)

    def test_model_get_set_embeddings(self) -> None:
        """As in transformers' own vision models: the input embedding is a convolution, the mixin expects a table."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            assert isinstance(model.get_input_embeddings(), torch.nn.Conv2d)
            replacement = torch.nn.Conv2d(3, 32, 2, 2)
            model.set_input_embeddings(replacement)
            assert model.get_input_embeddings() is replacement


@require_torch
class ASelectDiTEarlyExitModelTest(ASelectDiTModelTest):
    """The same on a feature inside the first block: what comes after it does not run unless it is asked for."""

    feature = "blocks.0.attention"


@require_torch
class ASelectDiTFixedTimestepModelTest(ASelectDiTModelTest):
    """The plain blocks of a fixed timestep, with a gate and an affine norm that could not be folded."""

    feature = "blocks.1.hidden"
    head: dict[str, Any] = {  # noqa: RUF012
        "fixed_timestep": True,
        "fixed_to": {
            "timestep": 50,
            "features": ["blocks.0.attention", "blocks.0.mlp_norm", "blocks.1.hidden"],
            "class_label": None,
            "noise_seed": 0,
            "num_noise_draws": 1,
        },
    }


@require_torch
class ASelectDiTLargeHeadsModelTest(ASelectDiTModelTest):
    """Heads with every option, on several features and timesteps."""

    all_model_classes = tuple(model_class for name, model_class in CLASSES.items() if "For" in name)
    feature = None
    head: dict[str, Any] = {  # noqa: RUF012
        "head_features": ["blocks.0.query", "blocks.0.hidden", "blocks.1.key", "blocks.1.mlp_norm"],
        "head_timesteps": [20, 100],
        "head_norm": "batch_norm",
        "pooling": "attentive",
        "segmentation_head": "upernet",
        "segmentation_head_channels": 16,
    }


if "ASelectDiTBackbone" in CLASSES:

    @require_torch
    class ASelectDiTBackboneTest(BackboneTesterMixin, unittest.TestCase):
        all_model_classes = (CLASSES["ASelectDiTBackbone"],)
        config_class = CLASSES["ASelectDiTBackbone"].config_class

        def setUp(self) -> None:
            self.model_tester = ASelectDiTModelTester(self, feature=None)


class ASelectDiTImageProcessingTester(ImageProcessingTester):
    """Color images and logits for the processor of one-channel models."""

    def __init__(self, parent: unittest.TestCase, **kwargs: Any) -> None:
        kwargs.setdefault("size", {"shortest_edge": 20})
        kwargs.setdefault("crop_size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self) -> dict[str, type]:
        """The mixin's own looks the names of classes inside transformers up by the name of the test folder."""
        return {"pil": ASelectDiTImageProcessor}

    def prepare_post_process_semantic_segmentation_inputs(self) -> tuple[dict[str, Any], dict[str, int]]:
        logits = torch.randn(self.batch_size, 4, 6, 5)
        return {"outputs": SemanticSegmenterOutput(logits=logits)}, {"num_labels": 4, "height": 6, "width": 5}

    def expected_output_image_shape(self, images: list[Any]) -> tuple[int, ...]:
        """Color becomes luminance: one channel."""
        _, *size = super().expected_output_image_shape(images)
        return (1, *size)


@require_torch
@require_vision
class ASelectDiTImageProcessingTest(
    ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase
):
    image_processor_tester_class = ASelectDiTImageProcessingTester
    test_cast_dtype = True

    @unittest.skip("a fourth channel is transparency here, composited on white")
    def test_call_numpy_4_channels(self) -> None: ...

    @unittest.skip("a rule for models added to transformers' own repository; this processor needs Pillow only")
    def test_new_models_require_torchvision_backend(self) -> None: ...

    @unittest.skip("its subprocess imports transformers alone, which finds only classes of its own by their name")
    def test_pil_can_run_without_torchvision(self) -> None: ...
