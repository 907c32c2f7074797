"""Cost of choosing a timestep: exhaustive search compared with HFR, and HFR with its cheaper variants.

    python -m benchmarks.selection_cost --model sample --data sample

Protocol. All runs are in one process, one after another: first a grid search over the default candidates (it encodes,
runs and pools every training and validation image at every candidate and fits a linear probe to each), then
`select_timestep(method="hfr")` and its variants. `seconds` are wall-clock time; `cpu_seconds` sum all threads of this
process and are the ones to compare if the machine does other work. `regret` is the grid's validation accuracy at its
best timestep minus that at the pick, in points. Bootstrap: the images of the full sweep are drawn with replacement
(100 times, seeded). `same_as_full` is how often a variant picks the same as the full sweep on the same draw; `stable`
is how often it picks the same as the full sweep on the original images. FLOPs of DiT-XL/2 are counted without a run,
for 20 candidates, 256 pixels, 50,000 + 10,000 images. Writes `benchmarks/results/selection-cost-<model>-<data>.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aselect_hf import ASelectDiTConfig, ASelectDiTModel, TimestepSelection, select_timestep
from aselect_hf.conversion import load_model
from aselect_hf.cost import encode_flops, feature_flops
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from aselect_hf.files import write_json
from aselect_hf.selection.search import choose
from aselect_hf.versions import hardware, installed_versions
from benchmarks.throughput import SD_VAE

RESULTS = Path(__file__).parent / "results"
VARIANTS: dict[str, dict[str, Any]] = {
    "hfr": {},
    "hfr, coarse to fine": {"search": "coarse_to_fine"},
    "hfr, stopped early": {"early_stopping": 0.05},
    "hfr, both": {"search": "coarse_to_fine", "early_stopping": 0.05},
}
XL_IMAGES, XL_TIMESTEPS, XL_FEATURE = 60_000, 20, "blocks.13.hidden"


def timed(*arguments: Any, **options: Any) -> tuple[TimestepSelection, dict[str, float]]:
    """A selection with its wall-clock and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    selection = select_timestep(*arguments, **options)
    return selection, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def row(name: str, selection: TimestepSelection, seconds: dict[str, float], grid: TimestepSelection) -> dict[str, Any]:
    accuracy = grid.scores[grid.timesteps.index(selection.timestep)]
    return {
        "strategy": name,
        "timestep": selection.timestep,
        "regret": 100 * (max(grid.scores) - accuracy),
        "forward_passes": selection.cost.forward_passes,
        "images": selection.num_images,
        "flops": selection.cost.flops,
        **seconds,
    }


def bootstrap(full: TimestepSelection, repetitions: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Shares of draws in [0, 1], and the mean share of scores that a variant computes."""
    values = np.array(full.per_image_scores)
    count, num = values.shape
    rng = np.random.default_rng(seed)
    tallies: dict[str, list[tuple[bool, bool, float]]] = {name: [] for name in VARIANTS}
    for _ in range(repetitions):
        drawn = values[rng.integers(count, size=count)]
        best = int(drawn.mean(axis=0).argmax())
        for name, options in VARIANTS.items():
            used = np.zeros(drawn.shape, dtype=bool)

            def scores(candidates: list[int], num_images: int, drawn=drawn, used=used) -> np.ndarray:
                used[:num_images, candidates] = True
                return drawn[:num_images, candidates]

            pick = choose(scores, num, count, **options)
            tallies[name].append((pick == best, full.timesteps[pick] == full.timestep, float(used.mean())))
    keys = ("same_as_full", "stable", "share_of_passes")
    return {name: dict(zip(keys, np.mean(tally, axis=0).tolist(), strict=True)) for name, tally in tallies.items()}


def count_xl() -> dict[str, Any]:
    """FLOPs of choosing for DiT-XL/2: by a grid that runs the whole network or stops after the feature, and by HFR."""
    config = ASelectDiTConfig(
        hidden_size=1152, num_hidden_layers=28, num_attention_heads=16, patch_size=2, sample_size=32, num_channels=4,
        num_condition_classes=1000, vae_config=SD_VAE, feature=XL_FEATURE,
    )  # fmt: skip
    with torch.device("meta"):
        model = ASelectDiTModel(config)
    model = model.to_empty(device="cpu").eval()
    for values in model.state_dict().values():
        values.zero_()  # any finite value will do
    encode, cut, whole = encode_flops(model), feature_flops(model, XL_FEATURE), feature_flops(model, "blocks.-1.hidden")
    grids = {name: XL_IMAGES * (encode + XL_TIMESTEPS * run) for name, run in (("whole", whole), ("cut", cut))}
    counts: dict[str, Any] = {
        "encode": encode, "feature": XL_FEATURE, "run_cut_after_feature": cut, "run_whole": whole,
        "grid_images": XL_IMAGES, "timesteps": XL_TIMESTEPS, "grid_whole": grids["whole"], "grid_cut": grids["cut"],
    }  # fmt: skip
    for images in (16, 64, 256):
        flops = images * (encode + 2 * XL_TIMESTEPS * cut)
        ratios = {f"grid_{name}_over_hfr": grid / flops for name, grid in grids.items()}
        counts[f"hfr_{images}_images"] = {"flops": flops} | ratios
    return counts


def table(rows: list[dict[str, Any]], draws: dict[str, dict[str, float]]) -> str:
    """The rows in Markdown, with costs as shares of the grid's."""
    columns = ("strategy", "t", "regret", "images", "passes", "FLOPs", "seconds", "CPU seconds", "same pick", "stable")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    grid = rows[0]
    for each in rows:
        shares = [f"1/{grid[key] / each[key]:,.0f}" for key in ("flops", "seconds", "cpu_seconds")]
        drawn = draws.get(each["strategy"])
        counted = [f"{100 * drawn[key]:.0f} %" if drawn else "-" for key in ("same_as_full", "stable")]
        lines.append(
            f"| {each['strategy']} | {each['timestep']} | {each['regret']:.2f} | {each['images']:,} | "
            f"{each['forward_passes']:,} | " + " | ".join(shares + counted) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample", help="checkpoint: folder, Hub id or 'sample'")
    parser.add_argument("--data", default="sample", help="data set with the splits train and validation")
    parser.add_argument("--num_images", type=int, default=64, help="number of images for HFR")
    parser.add_argument("--timesteps", type=int, default=20, help="number of candidates")
    parser.add_argument("--max_samples", type=int, help="maximum number of images of each split for the grid")
    parser.add_argument("--features", nargs="*", default=[], help="additional features for the bootstrap")
    parser.add_argument("--repetitions", type=int, default=100, help="repetitions of the bootstrap")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    model = load_model(arguments.model).to(arguments.device)
    train, validation = (
        ImageData.of(load_images(arguments.data, split), name=split).sample(arguments.max_samples, 0)
        for split in ("train", "validation")
    )
    options: dict[str, Any] = {"timesteps": arguments.timesteps, "progress": False}
    select_timestep(model, train, num_images=2, timesteps=[0], progress=False)  # the first run loads libraries
    selections = {}
    with tempfile.TemporaryDirectory() as cache_dir:
        grid, seconds = timed(model, train, method="grid", validation=validation, cache_dir=cache_dir, **options)
    rows = [row("grid", grid, seconds, grid)]
    for name, variant in VARIANTS.items():
        with tempfile.TemporaryDirectory() as cache_dir:
            selections[name], seconds = timed(
                model, train, num_images=arguments.num_images, cache_dir=cache_dir, **options, **variant
            )
        rows.append(row(name, selections[name], seconds, grid))
    draws = {grid.feature: bootstrap(selections["hfr"], arguments.repetitions)}
    for feature in arguments.features:
        full = select_timestep(model, train, num_images=arguments.num_images, feature=feature, **options)
        draws[feature] = bootstrap(full, arguments.repetitions)
    model_name, data_name = Path(arguments.model).name, Path(arguments.data).name
    content = {
        "model": model_name,
        "data": data_name,
        "rows": rows,
        "bootstrap": draws,
        "dit_xl_2_256": count_xl(),
        "protocol": {
            "grid images": f"{len(train):,} train + {len(validation):,} validation",
            "feature": grid.feature,
            "candidates": len(grid.timesteps),
            "bootstrap repetitions": arguments.repetitions,
            "threads": torch.get_num_threads(),
            "hardware": hardware(model.device),
            "versions": installed_versions(),
        },
    }
    write_json(RESULTS / f"selection-cost-{model_name}-{data_name}.json", content)
    print(table(rows, draws[grid.feature]))
    print(f"\nProtocol: {content['protocol']}\n\nBootstrap: {json.dumps(draws, indent=1)}")
    print(f"\nDiT-XL/2, FLOPs: {json.dumps(content['dit_xl_2_256'], indent=1)}")


if __name__ == "__main__":
    main()
