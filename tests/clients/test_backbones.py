"""Detectors and segmenters of transformers on our backbone, with their own image processors; Dinov2 is the control."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoBackbone,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SegformerImageProcessorPil,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

STAGES = [1, 2, 3, 4]
BACKBONES = ("backbone.", "pixel_level_module.encoder.")
IMAGE = np.random.default_rng(0).integers(0, 256, (50, 67, 3), dtype=np.uint8)


@pytest.fixture
def make_backbone(make_config: Callable) -> Callable[..., Any]:
    """`make_backbone(name, **config)`: the config of a backbone of four blocks with patches of 4 x 4."""

    def config(name: str, **options: Any) -> Any:
        shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 4}
        options = {"out_indices": STAGES} | options
        if name == "ours":
            return make_config(**shape, sample_size=16, num_channels=3, **options)
        return Dinov2Config(**shape, image_size=16, **options)

    return config


@pytest.fixture(params=["ours", "dinov2"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def train_and_reload(model: Any, loss: torch.Tensor, inputs: dict, output: str, folder: Path) -> None:
    """A backward pass reaches the backbone; a saved and loaded model gives the same numbers."""
    loss.backward()
    parameters = [p for name, p in model.named_parameters() if any(part in name for part in BACKBONES)]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    model.eval().save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[output], model(**inputs)[output], rtol=1e-5, atol=1e-5)


def test_upernet(name: str, make_backbone: Any, tmp_path: Path) -> None:
    config = UperNetConfig(
        backbone_config=make_backbone(name), hidden_size=16, use_auxiliary_head=False, num_labels=3, pool_scales=[1, 2]
    )
    model = UperNetForSemanticSegmentation(config).train()
    processor = SegformerImageProcessorPil(size={"height": 16, "width": 16})
    inputs = processor([IMAGE] * 2, segmentation_maps=[IMAGE[..., 0] % 3] * 2, return_tensors="pt")
    outputs = model(**inputs, output_hidden_states=True)
    assert outputs.logits.shape == (2, 3, 16, 16)
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(50, 67)] * 2)
    assert maps[0].shape == (50, 67)
    train_and_reload(model, outputs.loss, inputs, "logits", tmp_path)


def test_mask2former(name: str, make_backbone: Any, tmp_path: Path) -> None:
    config = Mask2FormerConfig(
        backbone_config=make_backbone(name),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5, num_labels=3,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config).train()
    processor = Mask2FormerImageProcessorPil(size={"height": 32, "width": 48}, ignore_index=255)
    inputs = processor([IMAGE], segmentation_maps=[IMAGE[..., 0] % 3], return_tensors="pt")
    outputs = model(**inputs)
    assert processor.post_process_semantic_segmentation(outputs, target_sizes=[(50, 67)])[0].shape == (50, 67)
    inputs = {"pixel_values": inputs["pixel_values"], "pixel_mask": inputs["pixel_mask"]}
    train_and_reload(model, outputs.loss, inputs, "class_queries_logits", tmp_path)


@pytest.mark.parametrize("size", [{"shortest_edge": 50, "longest_edge": 67}, {"height": 32, "width": 48}], ids=repr)
def test_detr(name: str, size: dict[str, int], make_backbone: Any, tmp_path: Path) -> None:
    """Sides of any length: 50 x 67 pixels are no multiple of the patch."""
    config = DetrConfig(
        backbone_config=make_backbone(name, out_indices=[4]), use_timm_backbone=False,
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, num_labels=3,
    )  # fmt: skip
    model = DetrForObjectDetection(config).train()
    boxes = [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [5, 6, 20, 30], "area": 600, "iscrowd": 0}]
    processor = DetrImageProcessorPil(size=size)
    annotations = [{"image_id": index, "annotations": boxes} for index in range(2)]
    inputs = processor([IMAGE, IMAGE[:40]], annotations=annotations, return_tensors="pt")
    outputs = model(**inputs)
    found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(50, 67)] * 2)
    assert len(found) == 2
    assert found[0]["boxes"].shape == (5, 4)
    inputs = {"pixel_values": inputs["pixel_values"], "pixel_mask": inputs["pixel_mask"]}
    train_and_reload(model, outputs.loss, inputs, "logits", tmp_path)


def test_dpt(name: str, make_backbone: Any, tmp_path: Path) -> None:
    config = DPTConfig(
        backbone_config=make_backbone(name, reshape_hidden_states=False),
        neck_hidden_sizes=[16, 16, 16, 16], fusion_hidden_size=16, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    model = DPTForDepthEstimation(config).train()
    processor = DPTImageProcessorPil(size={"height": 16, "width": 16})
    inputs = processor([IMAGE], return_tensors="pt")
    outputs = model(**inputs)
    depth = processor.post_process_depth_estimation(outputs, target_sizes=[(50, 67)])
    assert depth[0]["predicted_depth"].shape == (50, 67)
    train_and_reload(model, outputs.predicted_depth.mean(), inputs, "predicted_depth", tmp_path)


@pytest.mark.parametrize("size", [(16, 16), (50, 67), (3, 5)])
def test_the_feature_map_of_any_size(name: str, size: tuple[int, int], make_backbone: Any, normal: Any) -> None:
    """A remainder becomes a last row and column here (padded); Dinov2 cuts it off."""
    backbone = AutoBackbone.from_config(make_backbone(name)).eval()
    if name == "dinov2" and min(size) < 4:
        pytest.skip("Dinov2 has no patch left of an image smaller than its patch")
    with torch.no_grad():
        maps = backbone(normal(2, 3, *size)).feature_maps
    rounded = [-(-side // 4) if name == "ours" else side // 4 for side in size]
    assert all(tuple(stage.shape) == (2, 32, *rounded) for stage in maps)
