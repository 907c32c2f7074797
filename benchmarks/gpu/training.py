"""A class-conditional DiT in pixel space, trained by the package's own `pretrain` for as long as time allows."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from aselect_hf import ASelectDiTModel
from aselect_hf.files import read_json
from aselect_hf.training.arguments import DataArguments, PretrainingArguments, PretrainModelArguments
from aselect_hf.training.pretrain import DenoisingObjective, build_config, pretrain
from benchmarks.gpu.stage import Stage, synchronize

IMAGES = "learned_sigma=false,num_channels=3,num_condition_classes=10"
MODELS = {
    False: PretrainModelArguments(preset="DiT-S/2", config_overrides=f"sample_size=32,{IMAGES}"),
    True: PretrainModelArguments(
        config_overrides=f"hidden_size=32,num_hidden_layers=3,num_attention_heads=2,patch_size=8,sample_size=32,{IMAGES}"
    ),
}
BATCH = {False: 256, True: 8}
SHORT, LONG = {False: 20, True: 1}, {False: 80, True: 4}
"""Steps of two runs; the difference of their times gives the time per step without the start."""
BARE_SECONDS = {False: 6.0, True: 0.5}
RESERVE = {False: 12.0, True: 2.0}
"""Seconds for the start of the run, and for writing the model."""
SHARE = 0.95
"""Share of the remaining time that the steps are planned for."""


def model_dir(stage: Stage) -> Path:
    return stage.setting.scratch / "cifar10-dit"


def train(stage: Stage) -> None:
    """Run bare loops for comparison, two short runs to time a step, and the full run; also save float16 weights."""
    tiny, folder = stage.setting.tiny, model_dir(stage)
    for checks in (True, False):
        name = "bare loop" + ("" if checks else ", without checks of the inputs")
        with stage.attempt(name):
            stage.note(name, bare_loop(stage, checks))
    workers = max(1, min(14, (os.cpu_count() or 2) - 2)) if stage.device.type == "cuda" else 0
    try:
        run(stage, 2, "2 steps", workers)
    except Exception as error:
        stage.skip(f"{workers} processes that decode", error)
        workers = 0
    seconds = [run(stage, steps, f"{steps} steps", workers)["seconds"] for steps in (SHORT[tiny], LONG[tiny])]
    per_step = max(1e-4, (seconds[1] - seconds[0]) / (LONG[tiny] - SHORT[tiny]))
    stage.note("seconds_per_step", per_step)
    stage.note("images_per_second", BATCH[tiny] / per_step)
    steps = LONG[tiny] if tiny else max(LONG[tiny], int(SHARE * (stage.left - RESERVE[tiny]) / per_step))
    stage.note("workers", workers)
    record = run(stage, steps, folder.name, workers)
    stage.note("run", record | {"images": record["steps"] * BATCH[tiny]})
    keep_half(folder, stage.setting.scratch / "checkpoint")


def run(stage: Stage, steps: int, name: str, workers: int) -> dict[str, Any]:
    """Run `pretrain` for `steps` steps and return its record. A signal stops it when the stage ends."""
    AcceleratorState._reset_state(reset_partial_state=True)
    tiny, folder, cuda = stage.setting.tiny, stage.setting.scratch / name, stage.device.type == "cuda"
    shutil.rmtree(folder, ignore_errors=True)
    args = PretrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH[tiny], learning_rate=5e-4,
        num_warmup_steps=min(300, steps // 10), max_train_steps=steps, ema_decay=0.999 if steps > 2000 else 0.99,
        mixed_precision="bf16" if cuda else "no", logging_steps=max(1, min(100, steps // 4)),
    )  # fmt: skip
    data = DataArguments(
        dataset_name=str(stage.setting.data),
        dataloader_num_workers=workers,
        cache_dir=str(stage.setting.scratch / "cache"),
    )
    with stopped_after(max(1.0, stage.left - RESERVE[tiny] / 2)):
        model = pretrain(MODELS[tiny], data, args)
    if (folder / "training.json").is_file():
        record = read_json(folder / "training.json")
        record["arguments"]["output_dir"] = folder.name  # results are published without the machine's paths
        return record
    model.cpu().save_pretrained(folder)  # stopped early: these are the last weights, not their average
    progress = read_json(max(folder.glob("checkpoint*"), key=os.path.getmtime) / "progress.json")
    return {"steps": progress["step"], "seconds": progress["seconds"], "history": progress["history"], "stopped": True}


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Send a training in the block the stop signal of a cluster after some seconds; ignore it outside of a training."""
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, previous)


def bare_loop(stage: Stage, checks: bool) -> dict[str, float]:
    """Speed of the same network without the package's loop: random images on the device, and no weight average."""
    tiny, device = stage.setting.tiny, stage.device
    torch.manual_seed(0)
    model = ASelectDiTModel(build_config(MODELS[tiny])).to(device)
    objective, optimizer = DenoisingObjective(model), torch.optim.AdamW(model.parameters(), lr=1e-4)
    if not checks:
        model._check_input = model._check_labels = lambda *_, **__: None  # type: ignore[assignment, method-assign]
    pixels = torch.rand(BATCH[tiny], 3, 32, 32, device=device) * 2 - 1
    batch = {"pixel_values": pixels, "labels": torch.arange(len(pixels), device=device) % 10}
    steps, started = 0, 0.0
    while not steps or time.perf_counter() - started < BARE_SECONDS[tiny]:
        if steps == 0 and started == 0.0:
            for _ in range(3):
                bare_step(objective, optimizer, batch)
            synchronize(device)
            started = time.perf_counter()
        bare_step(objective, optimizer, batch)
        steps += 1
        if steps % 10 == 0 or tiny:
            synchronize(device)
    synchronize(device)
    seconds = time.perf_counter() - started
    return {"steps": steps, "seconds": seconds, "images_per_second": steps * len(pixels) / seconds}


def bare_step(objective: DenoisingObjective, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    cuda = batch["labels"].device.type == "cuda"
    with torch.autocast("cuda", dtype=torch.bfloat16) if cuda else nullcontext():
        loss = objective(batch, DeviceDraws(batch["labels"]))["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


class DeviceDraws:
    """Like `SampleDraws`, but draws the whole batch on the device: fast, but numbers depend on the batch."""

    def __init__(self, like: torch.Tensor) -> None:
        self.count, self.device = len(like), like.device

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(self.count, *shape, device=self.device)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.count, *shape, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, (self.count, *shape), device=self.device)


def keep_half(folder: Path, output: Path) -> None:
    """Save the trained weights in float16, in files of less than 16 MB."""
    shutil.rmtree(output, ignore_errors=True)
    model = ASelectDiTModel.from_pretrained(folder, dtype=torch.float16)
    model.save_pretrained(output, max_shard_size="15MB")
