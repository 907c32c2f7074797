"""The curve of a selection, with that of one picture before it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from aselect_hf.modeling.noise_schedule import NoiseSchedule
from aselect_hf.reporting.plotting import COLORS, TIMESTEP_LABEL, Curve, sigma_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curve(
    schedule: NoiseSchedule,
    *,
    picture: tuple[Sequence[int], Mapping[str, Sequence[float]]] | None = None,
    selection: Curve | None = None,
    timestep: int | None = None,
    label: str = "HFR",
    figsize: tuple[float, float] = (5.6, 3.2),
) -> Figure:
    """Draw scores of one picture over the noise axis, before the curve of a data set.

    Args:
        schedule: the model's, for the axis of sigma.
        picture: timesteps, and by name the picture's scores at each.
        selection: whose raw scores are drawn behind, with those of pure noise if it has them.
        timestep: drawn as a line.
        label: of the vertical axis.
        figsize: in inches.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    axis = figure.subplots()
    if selection is not None:
        behind = selection.raw_scores or selection.scores
        axis.plot(
            selection.timesteps, behind, color=COLORS["raw"], lw=4, alpha=0.4, label=f"{selection.num_images} images"
        )
        if selection.control_scores:
            axis.plot(selection.timesteps, selection.control_scores, "--", color=COLORS["control"], label="pure noise")
    if picture is not None:
        colors = (COLORS[name] for name in ("score", "accuracy", "gate", "control", "raw"))
        for (name, scores), color in zip(picture[1].items(), itertools.cycle(colors)):
            axis.plot(picture[0], scores, "o-", ms=3, color=color, label=name)
    if timestep is not None:
        axis.axvline(timestep, color=COLORS["chosen"], lw=1.5)
    axis.set_xlim(0, schedule.num_train_timesteps - 1)
    axis.set_xlabel(TIMESTEP_LABEL)
    axis.set_ylabel(label)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=9)
    sigma_axis(axis, schedule)
    return figure
