"""The picture of an audit."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from aselect_hf.reporting.plotting import COLORS, TIMESTEP_LABEL, Curve, band, sigma_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class AuditedCurves(Protocol):
    """What the picture shows of an audit."""

    verdict: str
    sentence: str
    method: str
    checked_by: str
    timestep: int
    pick_shares: list[float] | None
    chance: float | None
    untrained: float | None

    @property
    def hfr(self) -> Curve: ...

    @property
    def picked(self) -> Curve: ...

    @property
    def checked(self) -> Curve: ...


def plot_audit(audit: AuditedCurves, path: Path) -> None:
    """Draw the curves of HFR, of the check and of the rule that picked, and the picks from resamples.

    The sentence is the title, and the pick is a line through all panels.
    """
    from matplotlib.figure import Figure

    hfr, picked, checked = audit.hfr, audit.picked, audit.checked
    colors = {
        "any timestep": COLORS["accuracy"],
        "trust": COLORS["accuracy"],
        "uncertain": COLORS["control"],
        "do not trust": COLORS["chosen"],
    }
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
    band(corrected, hfr.timesteps, hfr.scores, hfr.standard_errors, f"{hfr.num_images} images", "score")
    corrected.set_ylabel("HFR, corrected")
    if audit.method != "hfr":
        mark_best(corrected, hfr, "score")
    if check := axes.get("check"):
        label = f"{checked.score_name}, {checked.num_images} images"
        if audit.chance is not None:  # as a line it would flatten the curve
            label += f"; commonest class {100 * audit.chance:.0f} %"
        scores, errors = 100 * np.array(checked.scores), 100 * np.array(checked.standard_errors)
        band(check, checked.timesteps, scores, errors, label, "accuracy")
        mark_best(check, checked, "accuracy")
        if audit.untrained is not None:
            check.plot(checked.timestep, 100 * audit.untrained, "x", color=COLORS["control"], label="untrained network")
        check.set_ylabel(f"{checked.method} (%)")
    if rule := axes.get("rule"):
        label = f"{picked.score_name}, {picked.num_images} images"
        band(rule, picked.timesteps, picked.scores, picked.standard_errors, label, "gate")
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
    [*axes.values()][-1].set_xlabel(TIMESTEP_LABEL)
    sigma_axis(parts, hfr.noise_schedule)
    figure.align_ylabels()
    figure.suptitle(textwrap.fill(f"{audit.verdict}: {audit.sentence}", 88), fontsize=11, color=colors[audit.verdict])
    figure.savefig(path, dpi=130)


def mark_best(axis: Axes, selection: Curve, color: str) -> None:
    label = f"its best: t = {selection.timestep}"
    axis.axvline(selection.timestep, color=COLORS[color], ls="--", lw=1, label=label)
