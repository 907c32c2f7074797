"""Compare four strategies on classification and segmentation; every row is a run of a training script.

    python -m benchmarks.strategies --name fashion-mnist --task classify --model sample --data sample
    python -m benchmarks.strategies --name fashion-mnist --task segment --model sample --data sample
    python -m benchmarks.strategies --name nuclei --task segment --model runs/nuclei-dit --data data/nuclei/tiles

Protocol. The backbone is frozen. The timestep is chosen on training images (grid search also sees validation images),
and one of ten linear heads is chosen on the validation split. The test split is scored once per run. Results are mean
and standard deviation over seeds, which change the image sample of HFR, the order of images, the heads' initialization
and the gate's visits. Finished runs are kept and not repeated. The command prints the table and writes
`benchmarks/results/strategies-<name>-<task>.json`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from aselect_hf.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"
STRATEGIES = ("hfr", "gate", "grid", "fixed")
METRICS = {"classify": "accuracy", "segment": "mean_iou"}


def run(arguments: argparse.Namespace, strategy: str, seed: int) -> dict[str, Any]:
    """Content of the `results.json` of one run, which is started if it is absent."""
    output_dir = arguments.runs / f"{arguments.name}-{arguments.task}-{strategy}-{seed}"
    if not (output_dir / "results.json").is_file():
        command = [
            sys.executable, "-m", f"aselect_hf.training.{arguments.task}",
            "--model_name_or_path", arguments.model, "--dataset_name", arguments.data,
            "--validation_split", "validation", "--test_split", "test", "--freeze_backbone", "True",
            "--random_flip", "False",
            "--method", strategy, "--seed", str(seed), "--num_train_epochs", str(arguments.epochs),
            "--per_device_train_batch_size", "64", "--learning_rate", "3e-4", "--eval_steps", "1000000",
            "--timesteps", str(arguments.timesteps), "--attn_implementation", "eager", "--mixed_precision", "bf16",
            "--output_dir", str(output_dir),
        ]  # fmt: skip
        if arguments.max_train_samples:
            command += ["--max_train_samples", str(arguments.max_train_samples)]
        subprocess.run(command, check=True)
    return read_json(output_dir / "results.json")


def summarize(strategy: str, runs: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of one strategy."""
    row: dict[str, Any] = {"strategy": strategy, "timesteps": [each["timestep"] for each in runs]}
    for split in ("validation", "test"):
        values = [each[split][metric] for each in runs]
        row[split] = {"mean": statistics.mean(values), "deviation": statistics.stdev(values), "values": values}
    for part in ("selection", "training"):
        costs = [each["cost"][part] for each in runs]
        row[part] = {
            name: statistics.mean(cost[name] for cost in costs) for name in ("forward_passes", "seconds", "flops")
        }
    return row


def table(rows: list[dict[str, Any]], metric: str) -> str:
    """The rows in Markdown, with FLOPs of choosing as shares of the grid's."""
    grid = next((row["selection"]["flops"] for row in rows if row["strategy"] == "grid"), 0.0)
    name = metric.replace("_", " ")
    columns = ("strategy", "t (by seed)", f"validation {name}", f"test {name}", "passes", "seconds", "FLOPs to choose")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cost = row["selection"]
        ratio = grid / cost["flops"] if cost["flops"] else 0.0
        share = f"1/{ratio:.0f}" if ratio > 1 else str(round(ratio))
        scores = [
            f"{100 * row[split]['mean']:.2f} ± {100 * row[split]['deviation']:.2f} %"
            for split in ("validation", "test")
        ]
        lines.append(
            f"| {row['strategy']} | {', '.join(map(str, row['timesteps']))} | {scores[0]} | {scores[1]} | "
            f"{cost['forward_passes']:,.0f} | {cost['seconds']:.1f} | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the data in file names")
    parser.add_argument("--task", choices=METRICS, required=True)
    parser.add_argument("--model", required=True, help="checkpoint: folder, Hub id or 'sample'")
    parser.add_argument("--data", required=True, help="data set with the splits train, validation and test")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--timesteps", type=int, default=10, help="number of candidates")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--runs", type=Path, default=Path("runs/strategies"), help="folder for the runs")
    arguments = parser.parse_args()
    metric = METRICS[arguments.task]
    runs = {name: [run(arguments, name, seed) for seed in range(arguments.seeds)] for name in STRATEGIES}
    rows = [summarize(name, each, metric) for name, each in runs.items()]
    content = {
        "model": Path(arguments.model).name,
        "data": Path(arguments.data).name,
        "metric": metric,
        "rows": rows,
        "protocol": runs["hfr"][0]["protocol"],
    }
    write_json(RESULTS / f"strategies-{arguments.name}-{arguments.task}.json", content)
    print(table(rows, metric))


if __name__ == "__main__":
    main()
