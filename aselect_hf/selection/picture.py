"""The picture of a selection."""

from __future__ import annotations

from pathlib import Path

from aselect_hf.reporting.plotting import COLORS, TIMESTEP_LABEL, Curve, band, sigma_axis


def plot_selection(selection: Curve, path: Path, beside: Curve | None = None) -> None:
    """Draw the score with a band of 1.96 standard errors, the choice as a line, and any raw score and control above.

    Args:
        beside: another selection for the same model, drawn above in place of raw score and control.
    """
    from matplotlib.figure import Figure

    corrected = selection.raw_scores is not None and selection.options.get("noise_correction", False)
    above = corrected or beside is not None
    figure = Figure(figsize=(7.5, 6.0 if above else 3.8), layout="constrained")
    axes = figure.subplots(2 if above else 1, 1, sharex=True, squeeze=False)[:, 0]
    if beside is not None:
        band(axes[0], beside.timesteps, beside.scores, beside.standard_errors, beside.score_name, "score")
        axes[0].axvline(
            beside.timestep, color=COLORS["score"], ls="--", lw=1, label=f"{beside.method}: t = {beside.timestep}"
        )
        axes[0].set_ylabel(beside.score_name)
        axes[0].legend(frameon=False)
    elif corrected:
        t, raw, control = selection.timesteps, selection.raw_scores or [], selection.control_scores or []
        axes[0].plot(t, raw, "o-", ms=3, color=COLORS["raw"], label="HFR of images")
        axes[0].plot(t, control, "s--", ms=3, color=COLORS["control"], label="HFR of pure noise, same sigma")
        axes[0].set_ylabel("HFR")
        axes[0].legend(frameon=False)
    axis = axes[-1]
    if selection.scores:
        band(axis, selection.timesteps, selection.scores, selection.standard_errors, selection.score_name, "score")
    axis.set_ylabel(selection.score_name)
    axis.set_xlabel(TIMESTEP_LABEL)
    for each in axes:
        each.axvline(selection.timestep, color=COLORS["chosen"], lw=1)
        each.grid(alpha=0.25)
    sigma_axis(axes[0], selection.noise_schedule)
    figure.suptitle(
        f"{selection.method}, {selection.feature}, {selection.num_images} images: "
        f"t = {selection.timestep}, sigma = {selection.sigma:.2f}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
