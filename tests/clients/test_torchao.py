"""int8 weights of torchao through transformers' `TorchAoConfig`: quantized, saved, loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, TorchAoConfig

quantization = pytest.importorskip(
    "torchao.quantization", reason="torchao is not installed: pip install 'aselect-hf[clients]'"
)


@pytest.mark.parametrize("name", ["ours", "ours-classifier", "ours-fixed-classifier", "vit", "vit-classifier"])
def test_int8_weights_are_saved_and_loaded(name: str, save: Any, pixels: torch.Tensor, tmp_path: Path) -> None:
    model = save(name, tmp_path / "model")
    auto: Any = AutoModelForImageClassification if name.endswith("classifier") else AutoModel
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = auto.from_pretrained(tmp_path / "model", quantization_config=config)
    with torch.no_grad():
        expected, found = model(pixels)[0], quantized(pixels)[0]
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.05 * expected.norm()
    quantized.save_pretrained(tmp_path / "quantized")
    loaded = auto.from_pretrained(tmp_path / "quantized")
    with torch.no_grad():
        assert torch.equal(loaded(pixels)[0], found)


def test_a_quantized_model_cannot_be_fixed_to_a_timestep(build: Any) -> None:
    model = build("ours")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"needs weights that are not quantized, but .* is a Int8Tensor"):
        model.fix_timestep()
