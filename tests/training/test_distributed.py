"""Real processes: killed, asked to stop, and two at once over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from aselect_hf.tasks import SEGMENTATION
from aselect_hf.training.arguments import (
    DataArguments,
    PretrainingArguments,
    PretrainModelArguments,
    TaskDataArguments,
    TaskModelArguments,
    TrainingArguments,
)
from aselect_hf.training.checkpoints import problem_of
from aselect_hf.training.parsing import parse_arguments
from aselect_hf.training.pretrain import pretrain
from aselect_hf.training.task import TaskRun

from .toys import MaskedPictures, segmenter
from .two_processes import MASKED, PATIENCE, train

ROOT = Path(__file__).parents[2]
MODEL = (
    "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,mlp_ratio=2,patch_size=4,sample_size=8,num_channels=1,"
    "learned_sigma=false,num_condition_classes=2"
)


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the processes that are started: the number of threads changes the last bits of a sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def flags(tmp_path):
    """`flags(name, **arguments)`: a command line of the pretraining script on a folder of 22 images."""
    generator = np.random.default_rng(0)
    for index in range(22):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (8, 8), np.uint8)).save(path)

    def build(name: str, **arguments) -> list[str]:
        values = {
            "config_overrides": MODEL,
            "train_dir": tmp_path / "images",
            "output_dir": tmp_path / name,
            "cache_dir": tmp_path / "cache",
            "per_device_train_batch_size": 4,
            "learning_rate": 0.001,
            "ema_decay": 0.9,
            "logging_steps": 1,
        }
        return [f"--{key}={value}" for key, value in (values | arguments).items()]

    return build


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | more


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "aselect_hf.training.pretrain", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_here(arguments: list[str]) -> None:
    pretrain(*parse_arguments((PretrainModelArguments, DataArguments, PretrainingArguments), None, arguments))


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = list(folder.glob("checkpoint-*/manifest.json"))
        if found:
            return found[0].parent
        time.sleep(0.002)
    raise AssertionError(f"no checkpoint appeared: {process.communicate()[0]}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_stopped_and_resumed_ends_in_the_same_weights(flags, tmp_path, number):
    run = {"max_train_steps": 100, "checkpointing_steps": 7}
    process = start(flags("stopped", **run))
    wait_for_checkpoint(process, tmp_path / "stopped")
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert not (tmp_path / "stopped" / "model.safetensors").exists(), "stopped too late to test anything"
    if number == signal.SIGTERM:
        assert process.returncode == 0, output
        assert "to resume, run the same command with --resume_from_checkpoint latest" in output
    else:
        assert process.returncode == -signal.SIGKILL
    run_here(flags("whole", max_train_steps=100))
    run_here(flags("stopped", **run, resume_from_checkpoint="latest"))
    for name in ("whole", "stopped"):
        assert len(json.loads((tmp_path / name / "training.json").read_text())["history"]) == 100
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert not list((tmp_path / "stopped").glob(".checkpoint-*"))


@pytest.fixture
def two_processes(flags, tmp_path):
    """Everything two processes have to show, in one launch: imports are what takes the time."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "-m", "tests.training.two_processes"]
    arguments = flags("two", max_train_steps=12, gradient_accumulation_steps=2, num_processes=2, checkpointing_steps=5)
    command += [str(tmp_path / "toy"), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-8000:]
    return {int(path.stem): json.loads(path.read_text()) for path in (tmp_path / "toy").glob("*.json")}


def test_two_processes(two_processes, flags, tmp_path):
    first, second = two_processes[0], two_processes[1]

    # Pretraining: one process with twice the batch ends in the same weights, by the same losses.
    run_here(flags("one", max_train_steps=12, gradient_accumulation_steps=2, per_device_train_batch_size=8))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)
    one_history, two_history = (
        json.loads((tmp_path / name / "training.json").read_text())["history"] for name in ("one", "two")
    )
    assert len(one_history) == len(two_history) == 12
    for entry, other in zip(one_history, two_history, strict=True):
        assert entry == pytest.approx(other, rel=1e-5, abs=1e-9)

    # A checkpoint of two processes goes on in one.
    checkpoint = tmp_path / "two" / "checkpoint-10"
    options = {"max_train_steps": 12, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    run_here(flags("moved", **options, resume_from_checkpoint=checkpoint))
    moved = load_file(tmp_path / "moved" / "model.safetensors")
    for name in one:
        torch.testing.assert_close(moved[name], one[name], rtol=1e-5, atol=1e-5)

    # A signal to one of them stops both after the same step, and both go on to the weights of an undisturbed run.
    assert first["interrupted"] == second["interrupted"] == [4, True]
    assert first["resumed"] == second["resumed"] == first["whole"] == second["whole"]

    # An uneven stream: each has its own shard, neither waits for the other, and a resumed run sees the same batches.
    assert set(chain(*first["stream"])) == {0, 2, 4, 6}  # 8 is no whole batch of two
    assert set(chain(*second["stream"])) == {1, 3, 5, 7}
    assert first["stream_resumed"] == first["stream"][5:]
    assert second["stream_resumed"] == second["stream"][5:]

    # Masks: whatever share of the pixels each pass of each process ignores, all weigh the same; the gate learns alike.
    # (AdamW makes much of the last digits of a gradient that is almost zero: a tenth of one step's length is allowed.)
    whole = MASKED | {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
    masked = train(tmp_path / "masked", segmenter(gate=True), MaskedPictures(), **whole)
    for found in (first, second):
        for values, expected in zip(found["masked"], masked.toy.state_dict().values(), strict=True):
            torch.testing.assert_close(values, expected.flatten().tolist(), rtol=1e-3, atol=1e-4)
        for entry, expected in zip(found["masked_history"], masked.record["history"], strict=True):
            assert entry == pytest.approx(expected, rel=1e-4, abs=1e-9)

    # The wrapper is gone before its process group is: the other way round, gloo's threads may wait forever.
    assert first["wrappers at the end"] == second["wrappers at the end"] == 0

    # A disk that is full for one of them ends both in the same error, and the last good checkpoint stays.
    assert "the last good one is" in first["full_disk"]
    assert "the last good one is" in second["full_disk"]
    names = sorted(path.name for path in (tmp_path / "toy" / "full").iterdir())
    assert names == ["checkpoint-2"]
    assert problem_of(tmp_path / "toy" / "full" / "checkpoint-2") is None


def test_two_processes_train_a_task_like_one(tmp_path):
    """Gate, both losses, flips, ignored pixels, an uneven last batch in evaluation: same metrics, same weights."""

    def task_flags(name: str, batch_size: int) -> list[str]:
        return [
            "--model_name_or_path=sample", "--dataset_name=sample", "--max_train_samples=32", "--timesteps=4",
            "--validation_split=validation", "--max_eval_samples=13", f"--per_device_train_batch_size={batch_size}",
            "--per_device_eval_batch_size=4", "--max_train_steps=6", "--learning_rate=1e-3", "--reduce_labels",
            "--method=gate", "--logging_steps=1", f"--output_dir={tmp_path / name}",
            f"--cache_dir={tmp_path / 'cache'}",
        ]  # fmt: skip

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "aselect_hf.training.segment", *task_flags("two", 4)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es) on cpu" in done.stdout
    arguments = parse_arguments((TaskModelArguments, TaskDataArguments, TrainingArguments), None, task_flags("one", 8))
    TaskRun(SEGMENTATION, *arguments).run()
    one, two = (json.loads((tmp_path / name / "training.json").read_text())["history"] for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in first.items():  # Adam divides by the size of a gradient, and so shows the rounding of tiny ones
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-4)
