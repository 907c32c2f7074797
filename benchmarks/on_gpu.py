"""Everything that needs a GPU, in one command of a few minutes. If it is killed, earlier measurements are kept.

    python -m benchmarks.build_cifar10 package data/cifar10-small --num_train 16000 --num_validation 2000 --format webp
    python -m benchmarks.on_gpu --data data/cifar10-small --output_dir runs/on-gpu
    python -m benchmarks.on_gpu --cpu --tiny
    python -m benchmarks.on_gpu --report runs/on-gpu/on-gpu.json

If packages are old or missing on a machine without a network, prepare a folder: `pip install --no-deps --target site`
with the versions of `constraints.txt` that the machine lacks. Pack the folder (`tar cJf`, a third of the wheels' size),
unpack it there, and put it first in `PYTHONPATH`.

Each stage has its own time limit; `train` and `curve` also use the time that earlier stages leave:

    environment   card, driver, versions
    tests         `tests/cuda`, in their own process
    throughput    images per second compared with diffusers and a plain ViT, and peak memory
    attention     all attention kernels, with and without `torch.compile`
    batch_size    automatic batch size of HFR with all and with little memory, and its speed
    train         DiT-S/2, class-conditional, in pixel space, by the package's `pretrain`, compared with a bare loop
    curve         probes of that DiT at 20 timesteps with stored and fresh noise, and the picks of every rule

`OUTPUT_DIR/on-gpu.json` holds the results and is written after every number. `--report` copies them to
`benchmarks/results/on-gpu-<card>.json`, writes their tables beside it and prints them. `SCRATCH/checkpoint` holds the
trained weights in float16.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import torch

from aselect_hf.files import read_json, write_json, write_text
from aselect_hf.versions import hardware, installed_versions
from benchmarks.gpu.curve import curve
from benchmarks.gpu.report import markdown
from benchmarks.gpu.speed import attention_and_compile, hfr_batch_size, throughput
from benchmarks.gpu.stage import Setting, Stage
from benchmarks.gpu.training import train

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MINUTES = 8.5
TAIL = 6000


def environment(stage: Stage) -> None:
    """Everything that the numbers depend on: hardware and versions."""
    stage.note("hardware", hardware(stage.device))
    stage.note("processors", os.cpu_count())
    stage.note("versions", installed_versions())
    if stage.device.type == "cuda":
        properties = torch.cuda.get_device_properties(stage.device)
        stage.note("memory_bytes", properties.total_memory)
        stage.note("cuda", torch.version.cuda)
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
        with stage.attempt("nvidia-smi"):
            stage.note("nvidia_smi", subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())


def tests(stage: Stage) -> None:
    """Run pytest in its own process, so that a crash of the GPU there does not affect other stages."""
    variables = os.environ | {"ASELECT_TEST_DEVICE": stage.device.type, "PYTHONUNBUFFERED": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider", "tests/cuda"]
    if stage.setting.tiny:
        command += ["-k", "features_are_those"]
    with tempfile.TemporaryFile("w+") as log:
        try:
            code: int | None = subprocess.run(
                command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, timeout=max(5, stage.left)
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        text = log.read()
    stage.note("exit_code", code)
    stage.note("summary", text.strip().splitlines()[-1] if text.strip() else "")
    if code != 0:
        stage.note("log", text[-TAIL:])
    print(text[-TAIL:])


STAGES: dict[str, tuple[Callable[[Stage], None], float]] = {
    "environment": (environment, 5),
    "tests": (tests, 110),
    "throughput": (throughput, 65),
    "attention": (attention_and_compile, 90),
    "batch_size": (hfr_batch_size, 30),
    "train": (train, 110),
    "curve": (curve, 100),
}
"""Stages with their seconds; `train` and `curve` get more if earlier stages leave time."""


def run_stages(setting: Setting, names: list[str], ends: float) -> None:
    """Run the stages in order. `train` and `curve` may take all the time that later stages do not need."""
    for place, name in enumerate(names):
        function, seconds = STAGES[name]
        later = sum(STAGES[other][1] for other in names[place + 1 :])
        left = ends - time.perf_counter()
        if name in ("train", "curve"):
            seconds = max(0.0, left - later)
        record: dict[str, Any] = {}
        setting.results[name] = record
        started = time.perf_counter()
        stage = Stage(setting, record, started + min(seconds, left))
        print(f"== {name}: {min(seconds, left):.0f} s of {left:.0f} s", flush=True)
        try:
            function(stage)
        except Exception:
            stage.note("error", traceback.format_exc()[-TAIL:])
            print(record["error"], flush=True)
        stage.note("stage_seconds", round(time.perf_counter() - started, 1))


def tiny_data(folder: Path) -> Path:
    """Write noise of three brightnesses as parquet files."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("validation", 24)):
        labels = [index % 3 for index in range(count)]
        images = [rng.integers(70 * x, 70 * x + 60, (32, 32, 3), dtype=np.uint8) for x in labels]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
        data = datasets.Dataset.from_dict({"image": images, "label": labels}, features)
        folder.mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def report(path: Path) -> None:
    """Copy results to `RESULTS` under the name of the card, and print their tables."""
    results = read_json(path)
    card = re.sub(r"[^a-z0-9]+", "-", results["environment"]["hardware"].lower()).strip("-")
    text = markdown(results)
    write_json(RESULTS / f"on-gpu-{card}.json", results)
    write_text(RESULTS / f"on-gpu-{card}.md", text)
    print(text)
    print(f"wrote {RESULTS}/on-gpu-{card}.json and .md")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with train and validation images (--tiny makes its own)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/on-gpu"))
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints and caches (default: OUTPUT_DIR/scratch)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU to try the command")
    parser.add_argument("--tiny", action="store_true", help="use small networks and few images, for a quick try")
    parser.add_argument("--report", type=Path, metavar="JSON", help="print the tables of a run and keep its results")
    arguments = parser.parse_args(argv)
    if arguments.report:
        report(arguments.report)
        return
    ends = time.perf_counter() + 60 * arguments.minutes
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error("no GPU was found: pass --cpu --tiny to try the command")
    scratch = arguments.scratch or arguments.output_dir / "scratch"
    data = arguments.data or (tiny_data(scratch / "data") if arguments.tiny else None)
    if data is None and {"train", "curve"} & set(arguments.stages):
        parser.error("the stages train and curve need --data")
    diffusers.utils.logging.set_verbosity_error()  # diffusers warns about every cast
    device = torch.device("cpu" if arguments.cpu else "cuda")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    setting = Setting(device, arguments.tiny, data or Path(), arguments.output_dir, scratch)
    os.environ |= {"ACCELERATE_USE_CPU": "true"} if arguments.cpu else {}
    run_stages(setting, arguments.stages, ends)
    print(markdown(setting.results))


if __name__ == "__main__":
    main()
