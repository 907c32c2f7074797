"""Pictures of the report: regrets of rules on pairs, and the true curves."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from aselect_hf.files import atomic_file
from benchmarks.selection.curves import Content, scores_of
from benchmarks.selection.pairs import PAIRS

DOCS = Path(__file__).parents[2] / "docs"


def draw_regrets(found: dict[str, dict[str, dict[str, Any]]], roles: dict[str, str]) -> None:
    """Mean regret, a row a rule and a column a pair."""
    values = np.array(
        [[of[pair]["regrets"].mean() if pair in of else np.nan for pair in roles] for of in found.values()]
    )
    figure, axes = pyplot.subplots(figsize=(2.4 + 0.62 * len(roles), 1.8 + 0.3 * len(found)), layout="constrained")
    shown = axes.imshow(values, cmap="RdYlGn_r", vmin=0, vmax=6, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color, text = "white" if value > 5 else "black", "-" if np.isnan(value) else f"{value:.1f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(roles)), [*roles], rotation=50, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(found)), [*found], fontsize=8)
    _name_roles(axes, [*roles.values()])
    axes.set_title("Points lost against exhaustive search (mean over samples of images)", fontsize=9, pad=20)
    figure.colorbar(shown, label="points", extend="max")
    _save(figure, "regret.png")


def _name_roles(axes: Any, roles: list[str]) -> None:
    """Name the roles above the columns, with a line where they change."""
    first = 0
    for role, columns in itertools.groupby(roles):
        count = len([*columns])
        axes.text(first + (count - 1) / 2, -0.65, f"pairs that {role}", ha="center", va="bottom", fontsize=8)
        if first:
            axes.axvline(first - 0.5, color="black", linewidth=2)
        first += count


def draw_curves(contents: list[Content]) -> None:
    """The true curve of every pair, and where three rules pick."""
    columns = 4
    rows = -(-len(contents) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.1 * columns, 2.3 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(contents) :]:
        axes.axis("off")
    for content, axes in zip(contents, grid.flat, strict=False):
        own, steps = content["truth"][content["default_feature"]], np.array(content["timesteps"])
        mean, deviation = 100 * np.array(own["mean"]), 100 * np.array(own["deviation"])
        axes.plot(steps, mean, color="black", marker=".", markersize=4, label="probe (the truth)")
        axes.fill_between(steps, mean - deviation, mean + deviation, color="black", alpha=0.15, linewidth=0)
        if content["fresh_noise_truth"] is not None:
            fresh = 100 * np.array(content["fresh_noise_truth"]["mean"])
            axes.plot(steps, fresh, color="gray", linestyle=":", label="fresh noise for each image")
        for rule, color in (("hfr", "tab:red"), ("consensus_rank", "tab:orange"), ("logme", "tab:green")):
            picks, counts = np.unique(scores_of(content, rule, "usual").argmax(axis=1), return_counts=True)
            sizes = 20 + 100 * counts / counts.sum()
            axes.scatter(steps[picks], mean[picks], s=sizes, color=color, alpha=0.7, label=rule, zorder=3)
        axes.set_title(f"{content['pair']} ({PAIRS[content['pair']].role})", fontsize=9)
        axes.set_xscale("symlog", linthresh=20)
        axes.tick_params(labelsize=7)
        axes.set_ylabel("accuracy, %" if content["task"] == "classification" else "mean IoU, %", fontsize=7)
    grid.flat[0].legend(fontsize=6)
    figure.supxlabel("t", fontsize=9)
    _save(figure, "curves.png")


def _save(figure: Any, name: str) -> None:
    with atomic_file(DOCS / name) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
