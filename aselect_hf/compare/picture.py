"""The picture of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from aselect_hf.reporting.plotting import COLORS, TIMESTEP_LABEL, Curve, band, sigma_axis


class ComparedCurve(Protocol):
    """What the picture shows of a row of the table."""

    strategy: str

    @property
    def selection(self) -> Curve: ...

    @property
    def test_accuracy_mean(self) -> float: ...


class ComparedEncoder(Protocol):
    """What the picture shows of a baseline."""

    name: str

    @property
    def test_accuracy_mean(self) -> float: ...


def plot_comparison(rows: Sequence[ComparedCurve], path: Path, baselines: Sequence[ComparedEncoder] = ()) -> None:
    """Draw probe accuracy, HFR and gate weights over the noise axis, with each rule's choice as a line.

    Args:
        baselines: drawn as horizontal lines at their test accuracy, if the accuracy has an axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    left = figure.subplots()
    selections = {row.strategy: row.selection for row in rows}
    if grid := selections.get("grid"):
        scores, errors = 100 * np.array(grid.scores), 100 * np.array(grid.standard_errors)
        band(left, grid.timesteps, scores, errors, "probe accuracy (validation)", "accuracy")
        left.set_ylabel("accuracy of a linear probe (%)")
        for each, style in zip(baselines, ("--", "-.", ":"), strict=False):
            accuracy = 100 * each.test_accuracy_mean
            left.axhline(accuracy, color="black", ls=style, lw=1, label=f"{each.name}: test {accuracy:.1f} %")
    if hfr := selections.get("hfr"):
        right = left.twinx()
        band(right, hfr.timesteps, hfr.scores, hfr.standard_errors, hfr.score_name, "score")
        right.plot(hfr.timesteps, hfr.raw_scores or [], ":", color=COLORS["raw"], label="HFR, uncorrected")
        right.set_ylabel("HFR")
    if gate := selections.get("gate"):
        outer = left.twinx()
        outer.spines.right.set_position(("outward", 55 if hfr else 0))
        band(outer, gate.timesteps, gate.scores, gate.standard_errors, gate.score_name, "gate")
        outer.set_ylabel(gate.score_name)
    for row, style in zip(rows, ("-", "--", "-.", ":"), strict=False):
        timestep, accuracy = row.selection.timestep, 100 * row.test_accuracy_mean
        label = f"{row.strategy}: t = {timestep}, test {accuracy:.1f} %"
        left.axvline(timestep, color=COLORS["chosen"], ls=style, lw=1.2, label=label)
    left.set_xlabel(TIMESTEP_LABEL)
    left.grid(alpha=0.25)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    sigma_axis(left, rows[0].selection.noise_schedule)
    figure.savefig(path, dpi=130)
