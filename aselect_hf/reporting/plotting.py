"""What all pictures share: colors, curves with a band, and sigma along the top of the axis of timesteps."""

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
    """What a picture shows of a selection: scores over timesteps, and the timestep that was chosen."""

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
    """A curve with a band of 1.96 standard errors on both sides; `color` is a name in `COLORS`."""
    y, margin = np.asarray(y), 1.96 * np.asarray(standard_errors)
    axis.plot(x, y, "o-", ms=3, color=COLORS[color], label=label)
    axis.fill_between(x, y - margin, y + margin, color=COLORS[color], alpha=0.15, lw=0)


def sigma_axis(axis: Axes, schedule: NoiseSchedule) -> None:
    """The axis of timesteps again, along the top, in units of sigma."""
    top = axis.twiny()
    top.set_xlim(axis.get_xlim())
    ticks = [t for t in axis.get_xticks() if 0 <= t <= schedule.num_train_timesteps - 1]
    top.set_xticks(ticks, [f"{schedule.sigma(t):.2f}" for t in ticks])
    top.set_xlabel("sigma")
