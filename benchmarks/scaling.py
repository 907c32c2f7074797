"""One process against two: features, HFR and a grid; memory of a larger set; cost of a resume; a plan for large sets.

    python -m benchmarks.scaling

Protocol. Every measurement is a launch of its own (`torch.distributed.run`) with one thread per process. Images are
random tensors in memory, the model is the sample's, the clock starts after imports and loading, when all processes have
met, and stops when they meet again. `speedup` is the ratio of wall-clock times. `speedup_by_cpu` is the processor time
of one process over the larger of two: what a machine without other work would reach. `peak_memory_mb` is the growth of
the largest resident size over that before the work. Resume: the same command on a complete folder, and on one with a
shard removed. Writes `benchmarks/results/scaling-cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from aselect_hf import select_timestep
from aselect_hf.conversion import load_model
from aselect_hf.data.feature_set import write_feature_set
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.processes import join_processes, shared_work
from aselect_hf.files import write_json
from aselect_hf.versions import hardware, installed_versions
from benchmarks.selection_cost import XL_FEATURE, XL_TIMESTEPS, count_xl

RESULT = Path(__file__).parent / "results" / "scaling-cpu.json"
IMAGES = {"features": 1024, "hfr": 128, "grid": 2048}
TIMESTEPS = 4
LARGE, WIDTH_XL = {"ImageNet-1k": 1_281_167, "a billion": 10**9}, 1152
H100_BFLOAT16, UTILIZATION = 989e12, 0.3


def images(count: int) -> ImageData:
    pixels = torch.rand(count, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return ImageData(pixels, labels=[index % 4 for index in range(count)], name="noise")


def do(work: str, count: int, folder: Path) -> None:
    """The measured work."""
    model, data = load_model("sample").eval(), images(count)
    quiet: dict[str, Any] = {"batch_size": 32, "progress": False}
    if work == "features":
        write_feature_set(model, data, folder / "features", num_shards=16, **quiet)
        return
    options = {"num_images": count} if work == "hfr" else {"cache_dir": folder}
    select_timestep(model, data, method=work, timesteps=TIMESTEPS, **quiet, **options)


def worker(work: str, count: int, folder: Path) -> None:
    """One process of a launch; writes seconds of wall clock and processor, and memory in MB."""
    torch.set_num_threads(1)
    join_processes()
    with shared_work() as here:
        do("hfr", 4, folder)  # loads everything that is loaded on first use
        here.gather(None)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wall, cpu = time.perf_counter(), time.process_time()
        do(work, count, folder)
        cpu = time.process_time() - cpu
        here.gather(None)
        found = {"seconds": time.perf_counter() - wall, "cpu_seconds": cpu}
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        every = here.gather(found | {"peak_memory_mb": grown / 1024})
    if here.is_main:
        print(json.dumps(every))


def launch(work: str, count: int, folder: Path, num_processes: int) -> list[dict[str, float]]:
    """The figures of each process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command += ["-m", "benchmarks.scaling", "--worker", work, "--count", str(count), "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOKY_MAX_CPU_COUNT": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def scaling(work: str) -> dict[str, Any]:
    """Images per second with one and two processes."""
    count, runs = IMAGES[work], {}
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            runs[number] = launch(work, count, Path(folder), number)
    wall = {number: found[0]["seconds"] for number, found in runs.items()}
    cpu = {number: max(each["cpu_seconds"] for each in found) for number, found in runs.items()}
    return {
        "work": work,
        "images": count,
        "images_per_second": {number: count / seconds for number, seconds in wall.items()},
        "speedup": wall[1] / wall[2],
        "speedup_by_cpu": cpu[1] / cpu[2],
    }


def memory() -> dict[str, Any]:
    """Peak memory of a set of features, and of one ten times as large."""
    found = {}
    for count in (512, 5120):
        with tempfile.TemporaryDirectory() as folder:
            found[count] = launch("features", count, Path(folder), 1)[0]["peak_memory_mb"]
    pixels = 3 * 28 * 28 * 4 / 2**20
    return {"peak_memory_mb": found, "of_which_images_mb": {count: count * pixels for count in found}}


def resume() -> dict[str, float]:
    """Seconds of a set of features: new, complete, and with one of 16 shards removed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"new": launch("features", 1024, folder, 1)[0]["seconds"]}
        found["complete"] = launch("features", 1024, folder, 1)[0]["seconds"]
        next((folder / "features").glob("*.parquet")).unlink()
        return found | {"one of 16 shards removed": launch("features", 1024, folder, 1)[0]["seconds"]}


def plan() -> list[dict[str, Any]]:
    """Bytes and FLOPs of pooled features of DiT-XL/2 at 256 pixels, counted without a run."""
    counts = count_xl()
    encode, run = counts["encode"], counts["run_cut_after_feature"]
    hours = 1 / (H100_BFLOAT16 * UTILIZATION * 3600)
    return [
        {
            "set": name,
            "images": count,
            "float16_gb": count * WIDTH_XL * 2 / 1e9,
            "latents_float16_gb": count * 4 * 32 * 32 * 2 / 1e9,
            "flops": count * (encode + run),
            "gpu_hours": count * (encode + run) * hours,
            "grid_flops": count * (encode + XL_TIMESTEPS * run),
            "grid_gpu_hours": count * (encode + XL_TIMESTEPS * run) * hours,
        }
        for name, count in LARGE.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help="internal: the work of one process of a launch")
    parser.add_argument("--count", type=int)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.count, args.folder)
        return
    found: dict[str, Any] = {
        "hardware": hardware(torch.device("cpu")),
        "versions": installed_versions(),
        "plan": plan(),
        "plan_assumes": f"DiT-XL/2, 256 pixels, {XL_FEATURE}, {UTILIZATION:.0%} of an H100's 989 TFLOP/s in bfloat16",
        "scaling": [],
    }
    for work in IMAGES:
        found["scaling"].append(scaling(work))
        write_json(RESULT, found)
    found |= {"memory": memory(), "resume_seconds": resume(), "load": os.getloadavg()}
    write_json(RESULT, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
