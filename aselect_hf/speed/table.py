"""Measured rows, and the table that is printed and saved."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aselect_hf.files import as_path, atomic_files, write_json, write_text
from aselect_hf.reporting.markdown import Markdown, markdown_table


@dataclass
class Row:
    """One contender at one batch size; ratios are `[ratio of medians, least, greatest]`, above 1 if it is faster."""

    model: str
    feature: str
    input: str
    dtype: str
    batch_size: int
    contender: str
    seconds: list[float]
    parameters: int
    file_bytes: int
    flops_per_image: float
    peak_memory_bytes: int | None
    max_difference: float | None
    """Greatest absolute difference from the first contender's feature; `None` if it computes something else."""
    over_diffusers: list[float] | None = None
    over_limit: list[float] | None = None

    @property
    def median(self) -> float:
        """Median seconds of a run."""
        return statistics.median(self.seconds)

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.median

    @property
    def flops_per_second(self) -> float:
        return self.flops_per_image * self.images_per_second

    def over(self, other: Row | None) -> list[float] | None:
        """Speed ratio to another contender that was timed in the same rounds."""
        if other is None:
            return None
        ratios = [theirs / ours for theirs, ours in zip(other.seconds, self.seconds, strict=True)]
        return [other.median / self.median, min(ratios), max(ratios)]

    def columns(self) -> dict[str, str]:
        """Cells of the table by column name."""
        memory, difference = self.peak_memory_bytes, self.max_difference
        return {
            "model": self.model,
            "from": self.input,
            "dtype": self.dtype,
            "batch": str(self.batch_size),
            "contender": self.contender,
            "images/s": f"{self.images_per_second:.3g}",
            "ms": f"{1000 * self.median:.4g}",
            "speed over diffusers": _ratio(self.over_diffusers),
            "over the limit": _ratio(self.over_limit),
            "parameters": f"{self.parameters / 1e6:.1f} M",
            "file": f"{self.file_bytes / 1e9:.3f} GB",
            "peak memory": "-" if memory is None else f"{memory / 1e9:.3f} GB",
            "GFLOP/image": f"{self.flops_per_image / 1e9:.4g}",
            "GFLOP/s": f"{self.flops_per_second / 1e9:.4g}",
            "max difference": "-" if difference is None else f"{difference:.1g}",
        }


@dataclass
class Benchmark:
    """Measured rows, skipped measurements with reasons, and the protocol."""

    rows: list[Row]
    skipped: list[dict[str, Any]]
    protocol: dict[str, Any]

    def markdown(self) -> str:
        """The table, the skipped measurements and the protocol."""
        rows = [row.columns() for row in self.rows]
        lines: list[str] = []
        if rows:
            lines = [markdown_table(rows), *([""] if self.skipped else [])]
        for skip in self.skipped:
            place = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in skip.items() if name != "reason")
            lines.append(Markdown("- Skipped: {}: {}.").format(place, skip["reason"]))
        entries = self.protocol | self.protocol["versions"]
        described = (f"{name.replace('_', ' ')} {value}" for name, value in entries.items() if name != "versions")
        return str(Markdown("\n").join([*lines, "", "Protocol: " + "; ".join(described) + ".", ""]))

    def save(self, path: str | Path) -> None:
        """Write everything as JSON to `path`, and the table beside it as `.md`."""
        derived = ("median", "images_per_second", "flops_per_second")
        rows = [dataclasses.asdict(row) | {name: getattr(row, name) for name in derived} for row in self.rows]
        content = {"protocol": self.protocol, "rows": rows, "skipped": self.skipped}
        path = as_path(path)
        with atomic_files(path.parent) as temporary:
            write_json(temporary / path.name, content)
            write_text(temporary / path.with_suffix(".md").name, self.markdown())


def _ratio(ratio: list[float] | None) -> str:
    return "-" if ratio is None else f"{ratio[0]:.2f}x ({ratio[1]:.2f}-{ratio[2]:.2f})"
