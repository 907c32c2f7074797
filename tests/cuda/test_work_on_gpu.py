"""The package's work on a GPU: choosing a timestep, training, benchmarks; the same results as on the CPU."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from aselect_hf import select_timestep
from aselect_hf.conversion import save_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.selection import RULES
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.sweep import HFRSweep
from aselect_hf.speed import benchmark_model
from aselect_hf.tasks import CLASSIFICATION
from aselect_hf.training.arguments import (
    DataArguments,
    PretrainModelArguments,
    TaskDataArguments,
    TaskModelArguments,
    TrainingArguments,
)
from aselect_hf.training.pretrain import pretrain
from aselect_hf.training.task import TaskRun
from benchmarks.gpu.speed import tf32

NOISY_SCORES = ("gate",)
"""Strategies that train: rounding grows with every step."""


@pytest.fixture
def pictures(normal: Any) -> ImageData:
    """Two classes of 8 x 8 images that a mean tells apart."""
    labels = np.arange(48) % 2
    pixels = (0.3 * normal(48, 2, 8, 8) + torch.from_numpy(labels - 0.5)[:, None, None, None]).float().clamp(-1, 1)
    return ImageData(pixels, labels)


@pytest.mark.parametrize("method", RULES)
def test_every_strategy_scores_as_on_the_cpu(
    make_model: Any, pictures: ImageData, device: torch.device, tmp_path: Path, method: str
) -> None:
    options: dict[str, Any] = {"timesteps": [0, 50, 300, 900], "progress": False, "method": method}
    if method in ("grid", "gate", "fixed"):
        options |= {"grid": {"cache_dir": tmp_path}, "gate": {"timesteps": [0, 300], "num_epochs": 2}}.get(method, {})
    model = make_model()
    expected = select_timestep(model, pictures, **options)
    found = select_timestep(copy.deepcopy(model).to(device), pictures, **options | {"cache_dir": tmp_path / "other"})
    assert found.timesteps == expected.timesteps
    tolerance = 0.1 if method in NOISY_SCORES else 0.02
    np.testing.assert_allclose(found.scores, expected.scores, rtol=tolerance, atol=tolerance)
    ranked = sorted(expected.scores)
    if len(ranked) < 2 or ranked[-1] - ranked[-2] > 2 * tolerance * max(1, abs(ranked[-1])):
        assert found.timestep == expected.timestep


def test_a_batch_that_does_not_fit_is_halved(make_model: Any, normal: Any, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("no GPU memory to run out of")
    model = make_model(hidden_size=384, num_attention_heads=6, sample_size=32).to(device)
    images = ImageData(normal(64, 2, 32, 32))

    def ratios(batch_size: int | None) -> tuple[np.ndarray, int]:
        inputs = SelectionInputs(model, images, None, "blocks.-1.hidden", [0, 50, 300, 900], 0, batch_size, None, False)
        sweep = HFRSweep(inputs, {}, False)
        with torch.inference_mode():
            sweep.run([0, 1, 2, 3], 64)
        return sweep.raw, sweep.batch_size

    expected, _ = ratios(32)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 300 * 2**20) / total)
    try:
        found, batch_size = ratios(None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= batch_size < 256
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`on_cpu(function)`: its result with accelerate kept off the GPU."""

    def run(function: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        try:
            return function()
        finally:
            monkeypatch.delenv("ACCELERATE_USE_CPU")
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


@pytest.mark.parametrize("flags", [{"freeze_backbone": True}, {}, {"lora_rank": 2}, {"method": "gate"}])
def test_classify_learns_as_on_the_cpu(
    make_model: Any, train_dir: Path, tmp_path: Path, device: torch.device, on_cpu: Any, flags: dict[str, Any]
) -> None:
    if flags.get("lora_rank"):
        pytest.importorskip("peft")
    save_model(make_model(num_channels=1, feature="blocks.1.hidden"), tmp_path / "model")

    def losses(name: str) -> list[float]:
        chosen = {} if "method" in flags else {"method": "fixed", "timestep": 50}
        model = TaskModelArguments(str(tmp_path / "model"), **chosen, **flags)
        data = TaskDataArguments(train_dir=str(train_dir), train_val_split=0.25, cache_dir=str(tmp_path / "cache"))
        args = TrainingArguments(
            output_dir=str(tmp_path / name), max_train_steps=4, logging_steps=1, per_device_train_batch_size=8,
            learning_rate=1e-3,
        )  # fmt: skip
        run = TaskRun(CLASSIFICATION, model, data, args)
        assert (run.state.device.type == "cpu") == (name == "cpu" or device.type == "cpu")
        report = run.run()
        assert report is not None
        history = json.loads((tmp_path / name / "training.json").read_text())["history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    expected = on_cpu(lambda: losses("cpu"))
    np.testing.assert_allclose(losses(device.type), expected, rtol=0.02)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_pretraining_learns_as_on_the_cpu(
    train_dir: Path, tmp_path: Path, device: torch.device, on_cpu: Any, precision: str
) -> None:
    if device.type == "cpu" and precision == "fp16":
        pytest.skip("accelerate has no fp16 on the CPU")
    shape = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,patch_size=4,sample_size=8,num_channels=1"

    def losses(name: str, mixed_precision: str) -> list[float]:
        pretrain(
            PretrainModelArguments(config_overrides=f"{shape},learned_sigma=false,num_condition_classes=2"),
            DataArguments(train_dir=str(train_dir), cache_dir=str(tmp_path / "cache")),
            TrainingArguments(
                output_dir=str(tmp_path / name), max_train_steps=5, logging_steps=1, per_device_train_batch_size=8,
                learning_rate=1e-2, ema_decay=0.5, mixed_precision=mixed_precision,
            ),
        )  # fmt: skip
        return [entry["loss"] for entry in json.loads((tmp_path / name / "training.json").read_text())["history"]]

    expected = on_cpu(lambda: losses("cpu", "no"))
    np.testing.assert_allclose(losses("found", precision), expected, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("allowed", [False, True])
def test_contenders_of_the_benchmark_agree(
    make_model: Any, device: torch.device, dtype: torch.dtype, allowed: bool
) -> None:
    model = make_model(mlp_ratio=4, num_hidden_layers=4).to(device, dtype)
    with tf32(allowed):
        result = benchmark_model(model, batch_sizes=[1, 2], rounds=3, progress=False)
    assert len(result.rows) == 10
    assert all(row.peak_memory_bytes and row.peak_memory_bytes > 0 for row in result.rows) or os.name != "posix"
