"""Programs that nobody here wrote, on our models and on transformers' own: what works there, works here.

Run with `make test-clients`. Every test makes the same calls on a control (ViT, Dinov2, Segformer): what fails on
both is another library's fault. `docs/clients.md` lists the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)

from aselect_hf import ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation, ASelectDiTModel
from aselect_hf.conversion import save_model

NAMES = {0: "dark", 1: "light"}
SIZE: dict[str, int] = {"image_size": 16, "patch_size": 4, "num_channels": 3}
OURS: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "patch_size": 4,
    "sample_size": 16,
    "num_channels": 3,
    "feature": "blocks.-1.hidden",
}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    **SIZE,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("clients")


@pytest.fixture
def build(make_config: Callable, randomize: Callable) -> Callable[..., Any]:
    """`build(name, **config)`: one of our models or of the controls, of random weights."""

    def model(name: str, **config: Any) -> Any:
        torch.manual_seed(0)
        labels = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
        if name == "ours":
            return randomize(ASelectDiTModel(make_config(**OURS | config)))
        if name == "ours-classifier":
            return randomize(ASelectDiTForImageClassification(make_config(**OURS | labels | config)))
        if name == "ours-fixed-classifier":
            return model("ours-classifier", **config).fix_timestep()
        if name == "ours-segmenter":
            return randomize(ASelectDiTForSemanticSegmentation(make_config(**OURS | labels | config)))
        if name == "vit":
            return ViTModel(ViTConfig(**VIT | config)).eval()
        if name == "vit-classifier":
            return ViTForImageClassification(ViTConfig(**VIT | labels | config)).eval()
        assert name == "segformer"
        sizes: dict[str, Any] = {
            "hidden_sizes": [16] * 4,
            "num_attention_heads": [1] * 4,
            "depths": [1] * 4,
            "decoder_hidden_size": 16,
        }
        sizes["sr_ratios"] = [1] * 4
        return SegformerForSemanticSegmentation(SegformerConfig(**sizes, **labels, **config)).eval()

    return model


@pytest.fixture
def save(build: Callable) -> Callable[[str, Path], Any]:
    """`save(name, folder)`: `build(name)` with its image processor, as a checkpoint."""

    def write(name: str, folder: Path) -> Any:
        model = build(name)
        if name.startswith("ours"):
            save_model(model, folder)
            return model
        model.save_pretrained(folder)
        square = {"height": 16, "width": 16}
        processor = SegformerImageProcessorPil if name == "segformer" else ViTImageProcessorPil
        processor(size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
        return model

    return write


@pytest.fixture
def pixels(normal: Callable) -> torch.Tensor:
    return normal(3, 3, 16, 16).clamp(-1, 1)
