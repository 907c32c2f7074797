"""Strategies side by side: what timestep each chooses, what a probe there scores, what the choice cost.

Protocol. Every strategy sees training (and, where it needs labels, validation) images only. At its timestep, a probe is
fitted on the pooled features of the training split; its regularization is chosen on the validation split; the test
split is scored once per seed. Each seed draws another stratified 80 % of the training split. One pick, HFR's or else
the first that a rule read from features, is audited on a sample of the training split (`aselect_hf.audit`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rich.table import Table

from aselect_hf.audit import Audit, audit_timestep
from aselect_hf.classes import share_classes, stratified_sample
from aselect_hf.data import ImageData
from aselect_hf.feature_cache import pooled_features
from aselect_hf.files import Record, as_path, atomic_files, write_json, write_text
from aselect_hf.markdown import Markdown, markdown_table
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.plots import plot_comparison
from aselect_hf.probe import fit_in_parallel, fit_probe
from aselect_hf.selection import TimestepSelection, select_timestep
from aselect_hf.selection.inputs import DEFAULT_BATCH_SIZE
from aselect_hf.selection.select import check_request
from aselect_hf.versions import hardware, installed_versions

SPLITS = ("train", "validation", "test")
TRAIN_SHARE = 0.8
RAW_PIXEL_SIDE = 32
NOT_AUDITED = ("fixed", "grid")
"""Strategies that read nothing from features, or more than an audit could."""


@dataclass
class ComparisonRow:
    """One strategy: its selection, and accuracies in [0, 1] of probes at its timestep."""

    strategy: str
    selection: TimestepSelection
    validation_accuracy: float
    test_accuracies: list[float]

    @property
    def test_accuracy_mean(self) -> float:
        return float(np.mean(self.test_accuracies))

    @property
    def test_accuracy_deviation(self) -> float:
        """Sample standard deviation over seeds; 0 for a single seed."""
        return float(np.std(self.test_accuracies, ddof=1)) if len(self.test_accuracies) > 1 else 0.0


@dataclass
class Comparison(Record):
    """The table, its protocol, the same probe on raw pixels as a floor, and the audit of one pick, if any."""

    rows: list[ComparisonRow]
    raw_pixel_accuracies: list[float]
    protocol: dict[str, Any]
    audit: Audit | None = None

    kind = "comparison"

    def row(self, strategy: str) -> ComparisonRow | None:
        return next((row for row in self.rows if row.strategy == strategy), None)

    def regret(self, row: ComparisonRow) -> float | None:
        """Validation accuracy lost against the grid's best, in points; `None` where no grid was run."""
        grid = self.row("grid")
        return None if grid is None else 100 * (max(grid.selection.scores) - row.validation_accuracy)

    def table(self) -> list[dict[str, str]]:
        """The rows as text, column by column."""
        grid = self.row("grid")
        table = []
        for row in self.rows:
            cost, regret = row.selection.cost, self.regret(row)
            table.append(
                {
                    "strategy": row.strategy,
                    "t": str(row.selection.timestep),
                    "sigma": f"{row.selection.sigma:.3f}",
                    "test accuracy": f"{100 * row.test_accuracy_mean:.2f} ± {100 * row.test_accuracy_deviation:.2f} %",
                    "regret (validation)": "-" if regret is None else f"{regret:.2f} points",
                    "forward passes": f"{cost.forward_passes:,}",
                    "seconds": f"{cost.seconds:.1f}",
                    "FLOPs vs grid": _relative(cost.flops, grid.selection.cost.flops if grid else 0.0),
                }
            )
        return table

    def rich_table(self) -> Table:
        """The table for a terminal."""
        rows = self.table()
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*row.values())
        return table

    def summary(self) -> list[str]:
        """What the table does not say: the margin over raw pixels, what uncorrected HFR would pick, the audit."""
        best = max(self.rows, key=lambda row: row.test_accuracy_mean)
        floor = float(np.mean(self.raw_pixel_accuracies))
        lines = [
            f"The same probe on raw pixels: {100 * floor:.2f} %; the best strategy is "
            f"{100 * (best.test_accuracy_mean - floor):+.2f} points from it."
        ]
        hfr, grid = self.row("hfr"), self.row("grid")
        if hfr is not None and hfr.selection.raw_scores is not None and _scored_all(hfr.selection):
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
        if self.audit is not None:
            lines.append(f"Audit of {self.audit.method}: {self.audit.verdict}: {self.audit.sentence}.")
        return lines

    def markdown(self) -> str:
        """Table, summary and protocol, for a README or a card."""
        protocol = "Protocol: " + "; ".join(f"{name} {value}" for name, value in self.protocol.items()) + "."
        lines = [markdown_table(self.table()), "", *self.summary(), "", protocol, ""]
        return str(Markdown("\n").join(lines))

    def save(self, folder: str | Path) -> Path:
        """Write `compare.json` (which `load` reads), `.md` and `.png`, all selections, the audit's files: together."""
        content = {
            "protocol": self.protocol,
            "raw_pixel_accuracies": self.raw_pixel_accuracies,
            "rows": [dataclasses.asdict(row) | {"regret": self.regret(row)} for row in self.rows],
            "audit": dataclasses.asdict(self.audit) if self.audit else None,
        }
        with atomic_files(folder) as temporary:
            write_json(temporary / "compare.json", content)
            write_text(temporary / "compare.md", self.markdown())
            plot_comparison(self, temporary / "compare.png")
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
        return cls(rows, content["raw_pixel_accuracies"], content["protocol"], audit)


def compare_strategies(
    model: ASelectDiTModel,
    splits: dict[str, ImageData],
    *,
    strategies: list[str] | tuple[str, ...] = ("hfr", "grid", "fixed"),
    feature: str | None = None,
    timesteps: list[int] | int | None = None,
    num_images: int | None = None,
    seed: int = 0,
    num_seeds: int = 3,
    probe: str = "linear",
    pool_size: int = 1,
    batch_size: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    strategy_options: dict[str, dict[str, Any]] | None = None,
) -> Comparison:
    """Run every strategy on the same data and score a probe at each choice; the protocol is the module's.

    Args:
        splits: labeled `"train"`, `"validation"` and `"test"` images, whose classes are matched by name
            (`share_classes`). Images without a label are left out.
        strategies: names in `STRATEGIES`.
        num_images: images that strategies may see that do not need all; default each one's own number.
        num_seeds: probes per strategy, each on its own 80 % of the training split.
        pool_size: cells per side into which tokens are averaged for the probes, see `pooled_features`.
        strategy_options: extra options by strategy name.

    Raises:
        ValueError: an argument is wrong, see `check_strategies`; and as `select_timestep`.
    """
    check_strategies(strategies, strategy_options or {}, feature)
    if missing := [name for name in SPLITS if name not in splits]:
        raise ValueError(f"compare needs the splits {', '.join(SPLITS)}; {', '.join(missing)} missing")
    for name in SPLITS:
        if splits[name].labels is None:
            raise ValueError(f"compare needs labels; {name} has none: {splits[name].no_labels}")
    if num_seeds < 1:
        raise ValueError(f"num_seeds must be at least 1, got {num_seeds}")
    splits = share_classes({name: splits[name] for name in SPLITS})
    run: dict[str, Any] = {"cache_dir": cache_dir, "progress": progress}
    chosen = {"grid": {"probe": probe, "pool_size": pool_size, "task": "classification"}} | (strategy_options or {})
    rows: list[ComparisonRow] = []
    scored: dict[int, tuple[float, list[float]]] = {}
    for strategy in strategies:
        selection = select_timestep(
            model, splits["train"], method=strategy, feature=feature, timesteps=timesteps, num_images=num_images,
            seed=seed, validation=splits["validation"], batch_size=batch_size, **run, **chosen.get(strategy, {}),
        )  # fmt: skip
        if selection.timestep not in scored:
            features = {}
            for name, data in splits.items():
                arguments = (model, data, [selection.timestep], selection.feature)
                features[name] = pooled_features(
                    *arguments, pool_size=pool_size, batch_size=batch_size or DEFAULT_BATCH_SIZE, **run
                ).values[0]
            scored[selection.timestep] = score_probes(features, splits, probe, num_seeds)
        rows.append(ComparisonRow(strategy, selection, *scored[selection.timestep]))
    pixels = {name: raw_pixels(data, model.config) for name, data in splits.items()}
    _, raw_pixel_accuracies = score_probes(pixels, splits, probe, num_seeds)
    protocol = {
        "images": " + ".join(f"{len(splits[name]):,} {name}" for name in SPLITS),
        "classes": len(splits["train"].class_names),
        "probe": f"{probe} on {rows[0].selection.feature} averaged over {pool_size} x {pool_size} cells",
        "seeds": num_seeds,
        "spread": "standard deviation over seeds, each on its own stratified 80 % of train",
        "test standard error": f"{100 * _binomial_error(rows[0], len(splits['test'])):.2f} points (binomial)",
        "hardware": hardware(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": ", ".join(f"{name} {number}" for name, number in installed_versions().items()),
    }
    audit = None
    if (row := audited_row(rows)) is not None:
        audit = audit_timestep(
            model, splits["train"], selection=row.selection, pool_size=pool_size, seed=seed, batch_size=batch_size,
            **run,
        )  # fmt: skip
    return Comparison(rows, raw_pixel_accuracies, protocol, audit)


def check_strategies(
    strategies: Sequence[str], options: Mapping[str, Mapping[str, Any]], feature: str | None = None
) -> None:
    """Refuse, before any work, strategies or options that `select_timestep` would refuse, and options of no strategy.

    Raises:
        ValueError: none is named; one is unknown; an option is of another method, or of one that is not compared.
    """
    if not strategies:
        raise ValueError("strategies must name at least one method")
    for strategy in strategies:
        check_request(strategy, options.get(strategy, {}), feature)
    for strategy, given in options.items():
        if given and strategy not in strategies:
            raise ValueError(
                f"{', '.join(given)} of {strategy!r} is given, but strategies are {', '.join(strategies)}: "
                f"add {strategy!r}, or leave it out"
            )


def audited_row(rows: list[ComparisonRow]) -> ComparisonRow | None:
    """The row of HFR, or else the first whose pick is worth an audit; `None` where there is none."""
    worth = [row for row in rows if row.strategy not in NOT_AUDITED]
    return next((row for row in worth if row.strategy == "hfr"), worth[0] if worth else None)


def score_probes(
    features: dict[str, np.ndarray], splits: dict[str, ImageData], probe: str, num_seeds: int
) -> tuple[float, list[float]]:
    """Validation accuracy of a probe on the whole training split, and test accuracies of one probe a seed."""
    labels = {name: np.asarray(data.labels) for name, data in splits.items()}
    validation = (features["validation"], labels["validation"])
    rows = np.arange(len(labels["train"]))
    parts = [rows] + [
        stratified_sample(labels["train"], int(TRAIN_SHARE * len(rows)), seed) for seed in range(num_seeds)
    ]
    whole, *fitted = fit_in_parallel(
        partial(fit_probe, features["train"][part], labels["train"][part], *validation, kind=probe) for part in parts
    )
    return whole.validation_score, [each.accuracy(features["test"], labels["test"]) for each in fitted]


def raw_pixels(data: ImageData, config: ASelectDiTConfig) -> np.ndarray:
    """Flattened pixel values, averaged down to at most 32 x 32: `(images, dimensions)`."""
    side = min(config.image_size or RAW_PIXEL_SIDE, RAW_PIXEL_SIDE)
    batches = [torch.nn.functional.adaptive_avg_pool2d(batch, side) for batch in data.batches(config, 256)]
    return torch.cat(batches).flatten(1).numpy()


def _scored_all(selection: TimestepSelection) -> bool:
    """Whether every candidate was scored on every image, so that another score of them has a choice too."""
    return selection.options.get("search", "full") == "full" and selection.options.get("early_stopping") is None


def _relative(flops: float, grid_flops: float) -> str:
    if not grid_flops:
        return "-"
    if flops == 0:
        return "0"
    return "1" if flops == grid_flops else f"1/{grid_flops / flops:.0f}"


def _binomial_error(row: ComparisonRow, count: int) -> float:
    p = row.test_accuracy_mean
    return (p * (1 - p) / count) ** 0.5
