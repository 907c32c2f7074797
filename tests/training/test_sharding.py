"""Weights divided among processes by FSDP2: the numbers of one process, and checkpoints for any number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils.other import get_free_port
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from aselect_hf import ASelectDiTForImageClassification, ASelectDiTModel
from aselect_hf.tasks import CLASSIFICATION
from aselect_hf.training.arguments import (
    DataArguments,
    PretrainingArguments,
    PretrainModelArguments,
    TaskDataArguments,
    TaskModelArguments,
    TrainingArguments,
)
from aselect_hf.training.draws import SampleDraws
from aselect_hf.training.loop import Trainer
from aselect_hf.training.parsing import parse_arguments
from aselect_hf.training.pretrain import pretrain
from aselect_hf.training.sharding import refuse_sharding, whole_weights
from aselect_hf.training.task import TaskRun

from .sharded import allow_sharding
from .toys import MaskedPictures, Toy, collate, segmenter

ROOT = Path(__file__).parents[2]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
PRETRAIN = (
    "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,mlp_ratio=2,patch_size=7,sample_size=28,num_channels=1,"
    "learned_sigma=false,num_condition_classes=10"
)


@pytest.fixture
def run_toy(tmp_path, monkeypatch):
    """`run_toy(name, sharded, **arguments)`: a trained toy, in this process alone, scored with its averaged weights."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    alone["MASTER_PORT"] = str(get_free_port())  # tests may run side by side

    def run(name: str, sharded: bool, objective: Any = None, dataset: Any = range(20), **arguments: Any) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        with monkeypatch.context() as patch:
            for key, value in (FSDP | alone | {"ACCELERATE_USE_CPU": "true"}).items() if sharded else ():
                patch.setenv(key, value)
            if sharded:
                allow_sharding()
            defaults = {"per_device_train_batch_size": 4, "max_train_steps": 8, "learning_rate": 0.05, "eval_steps": 3}
            args = TrainingArguments(str(tmp_path / name), ema_decay=0.9, logging_steps=1, **defaults | arguments)

            @torch.no_grad()
            def score(step: int) -> dict[str, float]:
                batch = collate([1, 2])
                return {"score": float(trainer.objective(batch, SampleDraws(0, step, [0, 1]))["loss"])}

            make_batch = getattr(dataset, "collate", collate)
            trainer = Trainer(objective or Toy(0.5), dataset, make_batch, args, evaluate=None if objective else score)
            trainer.record = trainer.train()
        return trainer

    yield run
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_sharded_run_and_its_checkpoints_have_the_numbers_of_a_plain_one(run_toy):
    plain = run_toy("plain", sharded=False)
    sharded = run_toy("sharded", sharded=True, checkpointing_steps="4")
    assert isinstance(sharded.objective, FSDPModule)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters)
    assert "sharded weights" in sharded.describe()
    resumed = run_toy("resumed", sharded=True, resume_from_checkpoint=str(sharded.output_dir / "checkpoint-4"))
    for other in (sharded, resumed):  # the average is that of foreach operations in the plain run alone
        for found, expected in zip(other.record["history"], plain.record["history"], strict=True):
            assert found == pytest.approx(expected, rel=1e-6)
        weights = whole_weights(other.accelerator, other.objective)
        for name, value in plain.objective.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-7)


def test_lower_precision_is_that_of_a_plain_run(run_toy):
    """A policy that casts the parameters themselves would give bfloat16 heads, which compute in float32."""
    runs = [
        run_toy(str(sharded), sharded, segmenter(), MaskedPictures(), mixed_precision="bf16")
        for sharded in (False, True)
    ]
    assert runs[0].record["history"] == runs[1].record["history"]
    assert isinstance(runs[1].objective.dit.layers[0], FSDPModule)


def test_options_that_read_weights_between_steps_are_refused(run_toy):
    accelerator = run_toy("run", sharded=True).accelerator
    with pytest.raises(ValueError, match="method=gate does not work with sharded weights"):
        refuse_sharding(accelerator, "method=gate")


def test_sharding_that_accelerate_would_leave_out_is_an_error(make_trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate does not shard on cpu"):
        make_trainer()


def start_sharded(processes: int, script: str, *flags: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "tests.training.sharded", script, *flags]
    environment = os.environ | FSDP | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    assert f"{processes} process(es) on cpu, mixed precision no, sharded weights" in done.stdout


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    for name, value in one.items():  # Adam divides by the size of a gradient, and so shows the rounding of tiny ones
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_a_sharded_backbone_like_one_whole(tmp_path):
    """Whole backbone, both losses, averaged weights, evaluations; resumed by one process."""

    def flags(name: str, batch_size: int, **more: object) -> list[str]:
        values = {
            "model_name_or_path": "sample", "dataset_name": "sample", "max_train_samples": 32,
            "validation_split": "validation", "max_eval_samples": 13, "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": 4, "max_train_steps": 6, "learning_rate": 1e-3, "method": "fixed",
            "timestep": 50, "logging_steps": 1, "eval_steps": 2, "ema_decay": 0.9, "cache_dir": tmp_path / "cache",
            "output_dir": tmp_path / name,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in (values | more).items()]

    arguments = parse_arguments((TaskModelArguments, TaskDataArguments, TrainingArguments), None, flags("whole", 8))
    TaskRun(CLASSIFICATION, *arguments).run()
    start_sharded(2, "classify", *flags("two", 4, checkpointing_steps=4))
    start_sharded(1, "classify", *flags("one", 8, resume_from_checkpoint=tmp_path / "two" / "checkpoint-4"))
    whole = history(tmp_path / "whole")
    for name in ("two", "one"):
        assert_same_weights(tmp_path / "whole", tmp_path / name)
        for entry, expected in zip(history(tmp_path / name), whole, strict=True):
            assert entry == pytest.approx(expected, rel=1e-4, abs=1e-6)
    first, second = (
        ASelectDiTForImageClassification.from_pretrained(tmp_path / name).eval() for name in ("whole", "two")
    )
    assert first.config.timestep == second.config.timestep == 50
    pixels = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(first(pixels).logits, second(pixels).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_two_processes_pretrain_a_sharded_backbone_like_one_whole(tmp_path):
    def flags(name: str, batch_size: int, **more: object) -> list[str]:
        values = {
            "config_overrides": PRETRAIN, "dataset_name": "sample", "max_train_samples": 32, "max_train_steps": 6,
            "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
            "ema_decay": 0.9, "logging_steps": 1, "output_dir": tmp_path / name,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in (values | more).items()]

    pretrain(*parse_arguments((PretrainModelArguments, DataArguments, PretrainingArguments), None, flags("whole", 8)))
    start_sharded(2, "pretrain", *flags("two", 4, checkpointing_steps=4))
    start_sharded(1, "pretrain", *flags("one", 8, resume_from_checkpoint=tmp_path / "two" / "checkpoint-4"))
    ASelectDiTModel.from_pretrained(tmp_path / "two")
    for name in ("two", "one"):
        assert_same_weights(tmp_path / "whole", tmp_path / name)


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "training.json").read_text())["history"]
