"""Tables of the results of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aselect_hf.reporting.markdown import markdown_table


def markdown(results: dict[str, Any]) -> str:
    """Results by stage, skipped measurements with reasons, and errors."""
    lines: list[str] = []
    for name, record in results.items():
        lines += [f"## {name} ({record.get('stage_seconds', '?')} s)", ""]
        lines += TABLES.get(name, nothing)(record)
        lines += [f"- Skipped: {each['what']}: {each['reason']}" for each in record.get("skipped", [])]
        if "error" in record:
            lines += ["", "```", record["error"], "```"]
        lines.append("")
    return "\n".join(lines)


def nothing(record: dict[str, Any]) -> list[str]:
    return [f"- {name}: {value}" for name, value in record.items() if name not in ("stage_seconds", "skipped", "error")]


def tests(record: dict[str, Any]) -> list[str]:
    return [str(record.get("summary"))]


def throughput(record: dict[str, Any]) -> list[str]:
    rows = [
        [row["model"], row["precision"], row["batch"], row["contender"], *speed(row), ratio(row["over_diffusers"]),
         ratio(row["over_limit"]), gigabytes(row["peak_memory_bytes"])]
        for row in record.get("rows", [])
    ]  # fmt: skip
    columns = ("model", "precision", "batch", "contender", "images/s", "ms (range)", "over diffusers", "over the limit")
    return table((*columns, "peak memory"), rows)


def attention(record: dict[str, Any]) -> list[str]:
    rows = [
        [row["model"], row["dtype"], row["batch"], row["contender"], row["attention"], row["compiled"], *speed(row),
         gigabytes(row["run_memory_bytes"]), f"{row['relative_difference']:.1g}",
         f"{row.get('compile_seconds', 0):.0f}"]
        for row in record.get("rows", [])
    ]  # fmt: skip
    columns = ("model", "dtype", "batch", "contender", "attention", "compiled", "images/s", "ms (range)", "memory")
    return table((*columns, "difference", "compile s"), rows)


def batch_size(record: dict[str, Any]) -> list[str]:
    rows = [
        [row["model"], row["memory"], row["asked"] or "automatic", row["batch"], f"{row['seconds']:.2f}",
         f"{row['passes_per_second']:.0f}", f"{row['max_difference'] or 0:.1g}"]
        for row in record.get("rows", [])
    ]  # fmt: skip
    return table(("model", "memory", "asked for", "batch", "seconds", "passes/s", "max difference"), rows)


def train(record: dict[str, Any]) -> list[str]:
    lines = [
        f"- {name}: {record[name]['images_per_second']:.0f} images/s" for name in record if name.startswith("bare loop")
    ]
    if "images_per_second" in record:
        lines.append(f"- the package's loop: {record['images_per_second']:.0f} images/s")
    if run := record.get("run"):
        losses = [f"{each['loss']:.4f} at {each['step']}" for each in run["history"] if "loss" in each]
        lines.append(f"- {run['steps']} steps, {run['images']} images, {run['seconds']:.0f} s")
        lines.append(f"- loss: {', '.join(losses[:: max(1, len(losses) // 8)])}")
    return lines


def curve(record: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for title in ("truth", "fresh_noise_truth"):
        rows = [
            [name, record["timesteps"][best], f"{100 * max(values['mean']):.1f}", *(f"{100 * x:.1f}" for x in some)]
            for name, values in record.get(title, {}).items()
            for best in [values["mean"].index(max(values["mean"]))]
            for some in [values["mean"][:: max(1, len(values["mean"]) // 10)]]
        ]
        steps = record.get("timesteps", [])
        columns = (title.replace("_", " "), "best t", "best", *(f"t={t}" for t in steps[:: max(1, len(steps) // 10)]))
        lines += [*table(columns, rows), ""]
    rows = [
        [row["method"], row["seed"], row["timestep"], f"{row['loss_in_points']:.2f}", row["images"],
         row["forward_passes"], f"{row['seconds']:.1f}"]
        for row in record.get("picks", [])
    ]  # fmt: skip
    return lines + table(("rule", "seed", "t", "points lost", "images", "passes", "seconds"), rows)


TABLES = {
    "tests": tests,
    "throughput": throughput,
    "attention": attention,
    "batch_size": batch_size,
    "train": train,
    "curve": curve,
}


def table(columns: Sequence[str], rows: list[list[Any]]) -> list[str]:
    return str(markdown_table([dict(zip(columns, row, strict=True)) for row in rows])).splitlines() if rows else []


def speed(row: dict[str, Any]) -> list[str]:
    median, least, most = (1000 * x for x in row["seconds"])
    return [f"{row['images_per_second']:.4g}", f"{median:.3g} ({least:.3g}-{most:.3g})"]


def ratio(value: list[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f}x"


def gigabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f} GB"
