"""Parts that all pictures share: colors, curves with error bands, and a sigma axis above the timesteps."""

from __future__ import annotations

import html
import io
import threading
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from aselect_hf.modeling.noise_schedule import NoiseSchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "score": "#1f6feb",
    "raw": "#8b949e",
    "control": "#d29922",
    "chosen": "#cf222e",
    "accuracy": "#1a7f37",
    "gate": "#8250df",
}
SVG = {"svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["system-ui", "DejaVu Sans"]}
"""Text stays text, in the font of the page."""
_ONE_AT_A_TIME = threading.Lock()  # matplotlib's settings are those of the process
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


def inline_svg(figure: Figure, description: str) -> str:
    """A figure for an HTML page: as wide as its place, in the page's text color, on its background.

    Args:
        description: what a screen reader says.
    """
    import matplotlib

    buffer = io.StringIO()
    with _ONE_AT_A_TIME, matplotlib.rc_context(SVG | {"svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    _, _, text = buffer.getvalue().partition("<svg ")
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    start = f'<svg role="img" aria-label="{html.escape(description)}" fill="currentColor" style="max-width:{width}px" '
    sized = text.replace(f'width="{width}pt" height="{height}pt"', 'width="100%"', 1)
    return start + sized.replace("#000000", "currentColor")
