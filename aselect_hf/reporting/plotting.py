"""Parts that all pictures share: colors, curves with error bands, and a sigma axis above the timesteps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from aselect_hf.modeling.noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "score": "#1f6feb",
    "raw": "#8b949e",
    "control": "#d29922",
    "chosen": "#cf222e",
    "accuracy": "#1a7f37",
    "gate": "#8250df",
}
TIMESTEP_LABEL = "timestep t (0 clean, larger is noisier)"


class Curve(Protocol):
    """The parts of a selection that a picture shows: scores over timesteps and the chosen timestep."""

    method: str
    feature: str
    timestep: int
    timesteps: list[int]
    scores: list[float]
    standard_errors: list[float]
    score_name: str
    num_images: int
    options: dict[str, Any]
    raw_scores: list[float] | None
    control_scores: list[float] | None

    @property
    def sigma(self) -> float: ...

    @property
    def noise_schedule(self) -> NoiseSchedule: ...


def band(axis: Axes, x: ArrayLike, y: ArrayLike, standard_errors: ArrayLike, label: str, color: str) -> None:
    """Draw a curve with a band of 1.96 standard errors on both sides; `color` is a name in `COLORS`."""
    y, margin = np.asarray(y), 1.96 * np.asarray(standard_errors)
    axis.plot(x, y, "o-", ms=3, color=COLORS[color], label=label)
    axis.fill_between(x, y - margin, y + margin, color=COLORS[color], alpha=0.15, lw=0)


def sigma_axis(axis: Axes, schedule: NoiseSchedule) -> None:
    """Draw an axis of sigma along the top that matches the axis of timesteps."""
    top = axis.twiny()
    top.set_xlim(axis.get_xlim())
    ticks = [t for t in axis.get_xticks() if 0 <= t <= schedule.num_train_timesteps - 1]
    top.set_xticks(ticks, [f"{schedule.sigma(t):.2f}" for t in ticks])
    top.set_xlabel("sigma")
