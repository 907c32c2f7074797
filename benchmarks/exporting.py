"""What an exported file keeps of the shipped model, and how fast it is.

    python -m benchmarks.exporting

Protocol: pooled features of the sample's training images (2,000, random) and of all 1,000 validation images, from the
model in torch and from its ONNX files with float32 and 8-bit weights; a linear probe on each, validated on features of
the same file, and of the probe of the torch features on those of the file; batch 32, one thread, images per second
relative to torch, medians of 10 alternating rounds; seed 0.
Writes `benchmarks/results/exporting.json` and prints the table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from aselect_hf.conversion import load_model
from aselect_hf.conversion.export import QUANTIZED, export_model
from aselect_hf.data.image_data import ImageData, image_pixels
from aselect_hf.data.sources import load_images
from aselect_hf.files import write_json
from aselect_hf.selection.probe import fit_probe
from aselect_hf.versions import hardware, installed_versions

RESULT = Path(__file__).parent / "results" / "exporting.json"
BATCH, ROUNDS, TRAIN = 32, 10, 2_000
Run = Callable[[np.ndarray], np.ndarray]


def session(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: found.run(["pooler_output"], {"pixel_values": pixels})[0]


def torch_run(model: torch.nn.Module) -> Run:
    @torch.no_grad()
    def run(pixels: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(pixels)).pooler_output.numpy()

    return run


def features(run: Run, pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([run(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])


def median_seconds(runs: dict[str, Run], pixels: np.ndarray) -> dict[str, float]:
    """Of one batch, in alternating rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run(pixels[:BATCH])
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(each)) for name, each in seconds.items()}


def read(config: object, split: str, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    data = ImageData.of(load_images("sample", split)).labeled().sample(count, 0)
    pixels = image_pixels(config)([data[index][0] for index in range(len(data))])
    return pixels.numpy(), np.asarray(data.labels)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    model = load_model("sample").eval()
    train, labels = read(model.config, "train", TRAIN)
    validation, truth = read(model.config, "validation", None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "onnx"
        report = export_model("sample", folder, quantize=True)
        sizes = {"onnx": folder / report.file, "onnx, int8": folder / QUANTIZED}
        runs = {"torch": torch_run(model)} | {name: session(path) for name, path in sizes.items()}
        megabytes = {name: path.stat().st_size / 1e6 for name, path in sizes.items()}
        found = {name: (features(run, train), features(run, validation)) for name, run in runs.items()}
        seconds = median_seconds(runs, validation)
    rows = [
        {
            "file": name,
            "megabytes": megabytes.get(name),
            "probe": fit_probe(*_with(found[name], labels, truth), kind="linear").validation_score,
            "moved_probe": fit_probe(found["torch"][0], labels, found[name][1], truth, kind="linear").validation_score,
            "speed": seconds["torch"] / seconds[name],
        }
        for name in runs
    ]
    protocol = (__doc__ or "").split("Protocol: ")[1].split("\nWrites")[0].replace("\n", " ")
    versions = installed_versions() | {"onnxruntime": onnxruntime.__version__}
    write_json(
        RESULT, {"rows": rows, "protocol": protocol, "hardware": hardware(torch.device("cpu")), "versions": versions}
    )
    print("| file | MB | probe | probe of torch features | speed over torch |\n" + "|---" * 5 + "|")
    for row in rows:
        size = "-" if row["megabytes"] is None else f"{row['megabytes']:.1f}"
        print(
            f"| {row['file']} | {size} | {100 * row['probe']:.1f} % | {100 * row['moved_probe']:.1f} % "
            f"| {row['speed']:.2f}x |"
        )


def _with(pair: tuple[np.ndarray, np.ndarray], labels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, ...]:
    return pair[0], labels, pair[1], truth


if __name__ == "__main__":
    main()
