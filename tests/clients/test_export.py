"""`torch.export` and both ONNX exporters: the file runs with any batch, whatever batch it was made from."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("ours", {"feature": "blocks.1.query"}),
    "three-draws": ("ours", {"num_noise_draws": 3}),
    "classifier": ("ours-classifier", {}),
    "attentive": ("ours-classifier", {"pooling": "attentive", "head_norm": "batch_norm"}),
    "two-timesteps": (
        "ours-classifier",
        {"head_timesteps": [10, 100], "head_features": ["blocks.0.key", "blocks.2.mlp"]},
    ),
    "fixed-classifier": ("ours-fixed-classifier", {}),
    "segmenter": ("ours-segmenter", {}),
    "upernet": ("ours-segmenter", {"segmentation_head": "upernet", "segmentation_head_channels": 16}),
    "vit": ("vit-classifier", {}),
}
SLOW = ("plain", "classifier", "fixed-classifier", "segmenter", "vit")
"""What the newer ONNX exporter is run on: it takes a quarter of a minute each."""


class FirstOutput(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values)[0]


@pytest.fixture
def wrapped(build: Any) -> Callable[[str], FirstOutput]:
    return lambda name: FirstOutput(build(MODELS[name][0], **MODELS[name][1])).eval()


def check_every_batch(run: Callable, model: FirstOutput, normal: Any) -> None:
    for batch in (1, 2, 5):
        images = normal(batch, 3, 16, 16, seed=batch)
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images), rtol=1e-5, atol=1e-5)


def run_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    session = onnxruntime.InferenceSession(path)
    return lambda images: torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])


@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name: str, wrapped: Any, normal: Any) -> None:
    """From a batch of 2; a batch of 1 is a constant to torch.export, for ViT too."""
    model = wrapped(name)
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (normal(2, 3, 16, 16),), dynamic_shapes=shapes)
    check_every_batch(program.module(), model, normal)


@pytest.mark.parametrize(("batch", "name"), itertools.product((1, 2), SLOW))
def test_onnx_from_a_program(name: str, batch: int, wrapped: Any, normal: Any, tmp_path: Path) -> None:
    model, path = wrapped(name), tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    example = (normal(batch, 3, 16, 16),)
    torch.onnx.export(model, example, path, input_names=["pixel_values"], dynamo=True, dynamic_shapes=shapes)
    check_every_batch(run_onnx(path), model, normal)


@pytest.mark.parametrize(("batch", "name"), itertools.product((1, 2), MODELS))
def test_onnx_from_a_trace(name: str, batch: int, wrapped: Any, normal: Any, tmp_path: Path) -> None:
    if name == "upernet":
        pytest.skip("torch: 'Unsupported: ONNX export of operator adaptive_avg_pool2d', for transformers' UPerNet too")
    model, path = wrapped(name), tmp_path / "model.onnx"
    axes = {"pixel_values": {0: "batch"}, "output": {0: "batch"}}
    names = {"input_names": ["pixel_values"], "output_names": ["output"]}
    torch.onnx.export(model, (normal(batch, 3, 16, 16),), path, dynamo=False, dynamic_axes=axes, **names)
    check_every_batch(run_onnx(path), model, normal)
