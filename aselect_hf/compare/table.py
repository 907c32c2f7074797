"""The table of a comparison, and its files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from aselect_hf.audit import Audit
from aselect_hf.compare.accuracies import ProbeAccuracies
from aselect_hf.compare.baselines import BaselineRow
from aselect_hf.compare.picture import plot_comparison
from aselect_hf.files import Record, as_path, atomic_files, write_json, write_text
from aselect_hf.reporting.markdown import Markdown, markdown_table
from aselect_hf.selection import TimestepSelection


@dataclass
class ComparisonRow(ProbeAccuracies):
    """A rule's selection, and accuracies in [0, 1] of probes at its timestep."""

    strategy: str
    selection: TimestepSelection
    validation_accuracy: float
    test_accuracies: list[float]


@dataclass
class Comparison(Record):
    """The rows, accuracies of the same probe on raw pixels, the protocol, and the audit of one pick, if any.

    Args:
        encoders: the backbone at the best rule's pick, and then the baselines; empty if none was asked for.
        num_test_images: size of the test split.
        latent_accuracies: accuracies of the same probe on the VAE's latents; `None` in pixel space.
    """

    rows: list[ComparisonRow]
    raw_pixel_accuracies: list[float]
    protocol: dict[str, Any]
    audit: Audit | None = None
    encoders: list[BaselineRow] = field(default_factory=list)
    num_test_images: int = 0
    latent_accuracies: list[float] | None = None

    kind = "comparison"

    def row(self, strategy: str) -> ComparisonRow | None:
        return next((row for row in self.rows if row.strategy == strategy), None)

    def regret(self, row: ComparisonRow) -> float | None:
        """Points of validation accuracy below the grid's best; `None` if `grid` was not compared."""
        grid = self.row("grid")
        return None if grid is None else 100 * (max(grid.selection.scores) - row.validation_accuracy)

    def table(self) -> list[dict[str, str]]:
        """One dictionary per row, with the text of each column."""
        grid = self.row("grid")
        table = []
        for row in self.rows:
            cost, regret = row.selection.cost, self.regret(row)
            table.append(
                {
                    "strategy": row.strategy,
                    "t": str(row.selection.timestep),
                    "sigma": f"{row.selection.sigma:.3f}",
                    "test accuracy": row.test_accuracy,
                    "regret (validation)": "-" if regret is None else f"{regret:.2f} points",
                    "forward passes": f"{cost.forward_passes:,}",
                    "seconds": f"{cost.seconds:.1f}",
                    "FLOPs vs grid": _relative(cost.flops, grid.selection.cost.flops if grid else 0.0),
                }
            )
        return table

    def encoder_table(self) -> list[dict[str, str]]:
        """One dictionary per encoder, with the text of each column."""
        return [
            {
                "encoder": each.name if each.revision is None else f"{each.name} ({each.revision[:8]})",
                "what the probe reads": each.reads,
                "test accuracy": each.test_accuracy,
                "parameters": f"{each.parameters / 1e6:.1f} M",
                "GFLOPs an image": f"{each.flops / 1e9:.3g}",
            }
            for each in self.encoders
        ]

    def rich_tables(self) -> list[Table]:
        """The tables for a terminal: rules, and encoders if baselines were asked for."""
        tables = []
        for rows in filter(None, (self.table(), self.encoder_table())):
            table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
            for name in rows[0]:
                words = " ".join([name, *(row[name] for row in rows)]).split()
                table.add_column(name, min_width=max(map(len, words)))  # breaks lines between words only
            for row in rows:
                table.add_row(*row.values())
            tables.append(table)
        return tables

    def better_baselines(self) -> list[str]:
        """A sentence for each baseline that scores more than the backbone with 95 % confidence (binomial, unpaired)."""
        if not self.encoders:
            return []
        backbone, *baselines = self.encoders
        sentences = []
        for each in baselines:
            gain = each.test_accuracy_mean - backbone.test_accuracy_mean
            variance = sum(x.test_accuracy_mean * (1 - x.test_accuracy_mean) for x in (each, backbone))
            if gain > 1.96 * (variance / self.num_test_images) ** 0.5:
                sentences.append(
                    f"{each.name} scores {100 * gain:.1f} points more with {each.flops / backbone.flops:.2g} times the "
                    "operations an image: use it unless you need the diffusion backbone itself"
                )
        return sentences

    def summary(self) -> list[str]:
        """Sentences below the table: margins over plain inputs, the pick of uncorrected HFR, doubts and the audit."""
        best = max(self.rows, key=lambda row: row.test_accuracy_mean)
        floor = float(np.mean(self.raw_pixel_accuracies))
        lines = [
            f"The same probe on raw pixels: {100 * floor:.2f} %; the best strategy is "
            f"{100 * (best.test_accuracy_mean - floor):+.2f} points from it."
        ]
        if self.latent_accuracies:
            latents = float(np.mean(self.latent_accuracies))
            lines.append(
                f"The same probe on the VAE's latents: {100 * latents:.2f} %; the best strategy is "
                f"{100 * (best.test_accuracy_mean - latents):+.2f} points from it."
            )
        hfr, grid = self.row("hfr"), self.row("grid")
        if hfr is not None and hfr.selection.raw_scores is not None and hfr.selection.scored_all:
            raw = hfr.selection.timesteps[int(np.argmax(hfr.selection.raw_scores))]
            line = f"HFR without noise correction would pick t = {raw}"
            if grid is not None and raw in grid.selection.timesteps:
                accuracy = grid.selection.scores[grid.selection.timesteps.index(raw)]
                line += (
                    f", {100 * (max(grid.selection.scores) - accuracy):.2f} points below the grid's best (validation)"
                )
            lines.append(line + ".")
        for row in self.rows:
            lines += [f"{row.strategy}: {doubt}." for doubt in row.selection.doubts()]
        lines += [f"{sentence}." for sentence in self.better_baselines()]
        if self.audit is not None:
            lines.append(f"Audit of {self.audit.method}: {self.audit.verdict}: {self.audit.sentence}.")
        return lines

    def markdown(self) -> str:
        """Table, summary and protocol, for a README or a card."""
        protocol = "Protocol: " + "; ".join(f"{name} {value}" for name, value in self.protocol.items()) + "."
        tables = [markdown_table(rows) for rows in (self.table(), self.encoder_table()) if rows]
        lines = [Markdown("\n\n").join(tables), "", *self.summary(), "", protocol, ""]
        return str(Markdown("\n").join(lines))

    def save(self, folder: str | Path) -> Path:
        """Write `compare.json` (which `load` reads), `.md`, `.png`, all selections and the audit's files, together."""
        content = {
            "protocol": self.protocol,
            "raw_pixel_accuracies": self.raw_pixel_accuracies,
            "latent_accuracies": self.latent_accuracies,
            "rows": [dataclasses.asdict(row) | {"regret": self.regret(row)} for row in self.rows],
            "encoders": [dataclasses.asdict(each) for each in self.encoders],
            "num_test_images": self.num_test_images,
            "audit": dataclasses.asdict(self.audit) if self.audit else None,
        }
        with atomic_files(folder) as temporary:
            write_json(temporary / "compare.json", content)
            write_text(temporary / "compare.md", self.markdown())
            plot_comparison(self.rows, temporary / "compare.png", self.encoders[1:])
            for row in self.rows:
                row.selection.save(temporary / f"selection-{row.strategy}.json")
            if self.audit is not None:
                self.audit.save(temporary / "audit.json")
                self.audit.plot(temporary / "audit.png")
        return as_path(folder)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        names = [entry.name for entry in dataclasses.fields(ComparisonRow)]
        rows = []
        for row in content["rows"]:
            selection = TimestepSelection.from_dict(row["selection"])
            rows.append(ComparisonRow(**{name: row[name] for name in names} | {"selection": selection}))
        audit = Audit.from_dict(content["audit"]) if content.get("audit") else None
        encoders = [BaselineRow(**each) for each in content.get("encoders", [])]
        count = content.get("num_test_images", 0)
        latents = content.get("latent_accuracies")
        return cls(rows, content["raw_pixel_accuracies"], content["protocol"], audit, encoders, count, latents)


def _relative(flops: float, grid_flops: float) -> str:
    if not grid_flops:
        return "-"
    if flops == 0:
        return "0"
    return "1" if flops == grid_flops else f"1/{grid_flops / flops:.0f}"
