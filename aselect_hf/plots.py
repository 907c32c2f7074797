"""Pictures of curves over the noise axis."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from aselect_hf.audit import Audit
    from aselect_hf.compare import Comparison
    from aselect_hf.selection.result import TimestepSelection

COLORS = {
    "score": "#1f6feb",
    "raw": "#8b949e",
    "control": "#d29922",
    "chosen": "#cf222e",
    "accuracy": "#1a7f37",
    "gate": "#8250df",
}


def plot_selection(selection: TimestepSelection, path: Path, beside: TimestepSelection | None = None) -> None:
    """The score with a band of 1.96 standard errors, the choice as a line; above it raw score and control, if any.

    Args:
        beside: another selection of the same model, whose scores are shown above in the same way.
    """
    raw = selection.raw_scores is not None and selection.options.get("noise_correction", False)
    above = raw or beside is not None
    figure = Figure(figsize=(7.5, 6.0 if above else 3.8), layout="constrained")
    axes = figure.subplots(1 + above, 1, sharex=True, squeeze=False)[:, 0]
    if beside is not None:
        _band(axes[0], beside.timesteps, beside.scores, beside.standard_errors, beside.score_name, "score")
        axes[0].axvline(
            beside.timestep, color=COLORS["score"], ls="--", lw=1, label=f"{beside.method}: t = {beside.timestep}"
        )
        axes[0].set_ylabel(beside.score_name)
        axes[0].legend(frameon=False)
    elif raw:
        axes[0].plot(
            selection.timesteps, selection.raw_scores or [], "o-", ms=3, color=COLORS["raw"], label="HFR of images"
        )
        axes[0].plot(
            selection.timesteps, selection.control_scores or [], "s--", ms=3, color=COLORS["control"],
            label="HFR of pure noise, same sigma",
        )  # fmt: skip
        axes[0].set_ylabel("HFR")
        axes[0].legend(frameon=False)
    axis = axes[-1]
    if selection.scores:
        _band(axis, selection.timesteps, selection.scores, selection.standard_errors, selection.score_name, "score")
    axis.set_ylabel(selection.score_name)
    axis.set_xlabel("timestep t (0 clean, larger is noisier)")
    for each in axes:
        each.axvline(selection.timestep, color=COLORS["chosen"], lw=1)
        each.grid(alpha=0.25)
    _sigma_axis(axes[0], selection)
    figure.suptitle(
        f"{selection.method}, {selection.feature}, {selection.num_images} images: "
        f"t = {selection.timestep}, sigma = {selection.sigma:.2f}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Probe accuracy, HFR and gate weights over the noise axis in one picture, each strategy's choice as a line."""
    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    left = figure.subplots()
    selections = {row.strategy: row.selection for row in comparison.rows}
    if grid := selections.get("grid"):
        _band(
            left, grid.timesteps, 100 * np.array(grid.scores), 100 * np.array(grid.standard_errors),
            "probe accuracy (validation)", "accuracy",
        )  # fmt: skip
        left.set_ylabel("accuracy of a linear probe (%)")
    if hfr := selections.get("hfr"):
        right = left.twinx()
        _band(right, hfr.timesteps, hfr.scores, hfr.standard_errors, hfr.score_name, "score")
        right.plot(hfr.timesteps, hfr.raw_scores or [], ":", color=COLORS["raw"], label="HFR, uncorrected")
        right.set_ylabel("HFR")
    if gate := selections.get("gate"):
        outer = left.twinx()
        outer.spines.right.set_position(("outward", 55 if hfr else 0))
        _band(outer, gate.timesteps, gate.scores, gate.standard_errors, gate.score_name, "gate")
        outer.set_ylabel(gate.score_name)
    for row, style in zip(comparison.rows, ("-", "--", "-.", ":"), strict=False):
        timestep, accuracy = row.selection.timestep, 100 * row.test_accuracy_mean
        label = f"{row.strategy}: t = {timestep}, test {accuracy:.1f} %"
        left.axvline(timestep, color=COLORS["chosen"], ls=style, lw=1.2, label=label)
    left.set_xlabel("timestep t (0 clean, larger is noisier)")
    left.grid(alpha=0.25)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    _sigma_axis(left, comparison.rows[0].selection)
    figure.savefig(path, dpi=130)


def plot_audit(audit: Audit, path: Path) -> None:
    """The sentence, over HFR's curves, that of the rule that picked and of the check, and the bootstrap's picks.

    The pick is a line through all.
    """
    hfr, picked, checked = audit.selections["hfr"], audit.picked, audit.checked
    colors = {"trust": COLORS["accuracy"], "uncertain": COLORS["control"], "do not trust": COLORS["chosen"]}
    heights = {"parts": 1.0, "corrected": 1.2, "check": 1.2}
    if audit.checked_by == "hfr":
        del heights["check"]
    if picked.scores and picked is not hfr and picked is not checked:
        heights["rule"] = 1.2
    if audit.pick_shares is not None:
        heights["picks"] = 0.8
    figure = Figure(figsize=(8.0, 1.4 + 2.05 * sum(heights.values())), layout="constrained")
    axes = dict(
        zip(heights, figure.subplots(len(heights), 1, sharex=True, height_ratios=[*heights.values()]), strict=True)
    )
    parts, corrected = axes["parts"], axes["corrected"]
    parts.plot(hfr.timesteps, hfr.raw_scores or [], "o-", ms=3, color=COLORS["raw"], label="images")
    parts.plot(
        hfr.timesteps, hfr.control_scores or [], "s--", ms=3, color=COLORS["control"], label="pure noise, same sigma"
    )
    parts.set_ylabel("HFR")
    _band(corrected, hfr.timesteps, hfr.scores, hfr.standard_errors, f"{hfr.num_images} images", "score")
    corrected.set_ylabel("HFR, corrected")
    if audit.method != "hfr":
        _best(corrected, hfr, "score")
    if check := axes.get("check"):
        label = f"{checked.score_name}, {checked.num_images} images"
        if audit.chance is not None:  # as a line it would flatten the curve
            label += f"; commonest class {100 * audit.chance:.0f} %"
        _band(check, checked.timesteps, 100 * np.array(checked.scores), 100 * np.array(checked.standard_errors), label,
              "accuracy")  # fmt: skip
        _best(check, checked, "accuracy")
        if audit.untrained is not None:
            check.plot(checked.timestep, 100 * audit.untrained, "x", color=COLORS["control"], label="untrained network")
        check.set_ylabel(f"{checked.method} (%)")
    if rule := axes.get("rule"):
        label = f"{picked.score_name}, {picked.num_images} images"
        _band(rule, picked.timesteps, picked.scores, picked.standard_errors, label, "gate")
        rule.set_ylabel(audit.method)
    if picks := axes.get("picks"):
        picks.vlines(hfr.timesteps, 0, 100 * np.array(audit.pick_shares), color=COLORS["gate"], lw=5)
        picks.set_ylim(0, 105)
        picks.set_ylabel(f"picks of {audit.method} (%)\nfrom resamples")
    for name, axis in axes.items():
        pick = axis.axvline(audit.timestep, color=COLORS["chosen"], lw=1, zorder=0)
        axis.grid(alpha=0.25)
        if name == "corrected":
            pick.set_label(f"pick of {audit.method}: t = {audit.timestep}, sigma = {picked.sigma:.2f}")
        if name != "picks":
            axis.legend(frameon=False, fontsize=9)
    [*axes.values()][-1].set_xlabel("timestep t (0 clean, larger is noisier)")
    _sigma_axis(parts, hfr)
    figure.align_ylabels()
    figure.suptitle(textwrap.fill(f"{audit.verdict}: {audit.sentence}", 88), fontsize=11, color=colors[audit.verdict])
    figure.savefig(path, dpi=130)


def _best(axis: Axes, selection: TimestepSelection, color: str) -> None:
    label = f"its best: t = {selection.timestep}"
    axis.axvline(selection.timestep, color=COLORS[color], ls="--", lw=1, label=label)


def _band(axis: Axes, x, y, standard_errors, label: str, color: str) -> None:
    y, margin = np.asarray(y), 1.96 * np.asarray(standard_errors)
    axis.plot(x, y, "o-", ms=3, color=COLORS[color], label=label)
    axis.fill_between(x, y - margin, y + margin, color=COLORS[color], alpha=0.15, lw=0)


def _sigma_axis(axis: Axes, selection: TimestepSelection) -> None:
    """The same axis in units of sigma, along the top."""
    schedule = selection.noise_schedule
    top = axis.twiny()
    top.set_xlim(axis.get_xlim())
    ticks = [t for t in axis.get_xticks() if 0 <= t <= schedule.num_train_timesteps - 1]
    top.set_xticks(ticks, [f"{schedule.sigma(t):.2f}" for t in ticks])
    top.set_xlabel("sigma")
