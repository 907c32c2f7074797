"""`aselect export`: one file that gives the model's outputs for any batch, or an error and no file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from aselect_hf import ASelectDiTConfig, ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation
from aselect_hf.conversion import export, save_model
from aselect_hf.conversion.export import export_model

TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "sample_size": 16,
    "num_channels": 3, "num_condition_classes": 0, "timestep": 40, "num_labels": 3,
}  # fmt: skip
HEADS = {"classifier": ASelectDiTForImageClassification, "segmenter": ASelectDiTForSemanticSegmentation}


@pytest.fixture(params=HEADS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model = HEADS[request.param](ASelectDiTConfig(**TINY)).eval()
    save_model(model, tmp_path / "model")
    return model, tmp_path / "model"


def test_an_onnx_file_takes_levels_and_gives_the_logits_of_the_model(saved, tmp_path):
    model, folder = saved
    report = export_model(folder, tmp_path / "onnx", uint8=True, quantize=True)
    levels = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    with torch.no_grad():
        expected = model(torch.from_numpy(levels).float() / 127.5 - 1).logits.numpy()
    for file, tolerance in (("model.onnx", 1e-4), ("model-int8.onnx", 0.1)):
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / file)
        (logits,) = session.run(["logits"], {"pixel_values": levels})
        assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()
    written = json.loads((tmp_path / "onnx/export.json").read_text())
    assert written["timestep"] == 40
    assert written["labels"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert report.difference < 1e-4
    assert report.quantized_difference is not None


def test_a_program_takes_any_batch(saved, tmp_path):
    model, folder = saved
    export_model(folder, tmp_path / "program", format="torch-export")
    program = torch.export.load(tmp_path / "program/model.pt2").module()
    for batch in (1, 7):
        pixels = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(program(pixels)[0], model(pixels).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"format": "tflite"}, "format must be one of onnx, torch-export; got 'tflite'"),
        ({"format": "torch-export", "quantize": True}, "quantize is of format='onnx', got format='torch-export'"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(keywords, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model("sample", tmp_path / "out", **keywords)
    assert not (tmp_path / "out").exists()


def test_a_file_with_other_outputs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(
        export, "_write_program", lambda exported, path: lambda pixels: [x + 1 for x in exported(pixels)]
    )
    with pytest.raises(ValueError, match=r"model.pt2 gives other outputs than the model: relative difference"):
        export_model("sample", tmp_path / "out", format="torch-export")
    assert not (tmp_path / "out").exists()
