"""HTML of the page: plots with a line at the timestep, legends, and lines of facts."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from aselect_hf.modeling.noise_schedule import NoiseSchedule
from aselect_hf.reporting.web import data_url, inline_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LEGEND = 20


def plot_with_line(figure: Figure, description: str) -> str:
    """A plot as HTML in which `{left}` stands for the place of a vertical line, see `at_timestep`."""
    svg = inline_svg(figure.savefig, description).replace("{", "{{").replace("}", "}}")
    box = figure.axes[0].get_position()
    return (
        f'<div class="plot" data-from="{box.x0:.4f}" data-width="{box.width:.4f}">{svg}'
        f'<i style="left:{{left:.2f}}%;top:{100 * (1 - box.y1):.1f}%;height:{100 * box.height:.1f}%"></i></div>'
    )


def at_timestep(plot: str, schedule: NoiseSchedule, timestep: int) -> str:
    """A plot of `plot_with_line` whose line is at a timestep."""
    start, width = (float(plot.split(f'data-{name}="', 1)[1].split('"', 1)[0]) for name in ("from", "width"))
    return plot.format(left=100 * (start + width * timestep / (schedule.num_train_timesteps - 1)))


def noise_line(schedule: NoiseSchedule, timestep: int, feature: str, ratio: float) -> str:
    """Where on the noise axis, and the picture's HFR there, as one line of HTML."""
    facts = {
        "t": f"{timestep} of {schedule.num_train_timesteps}",
        "sigma": f"{schedule.sigma(timestep):.3f}",
        "log-SNR": f"{schedule.log_snr(timestep):.2f}",
        "feature": feature,
        "HFR": f"{ratio:.3f}",
    }
    spans = "".join(f"<span>{name} <b>{html.escape(value)}</b></span>" for name, value in facts.items())
    return f'<p class="facts" aria-live="polite">{spans}</p>'


def segment_colors(count: int) -> np.ndarray:
    """One color per class, `(count, 3)` uint8."""
    from matplotlib import colormaps

    return (np.array([colormaps["tab20"](index % 20)[:3] for index in range(count)]) * 255).round().astype(np.uint8)


def overlay(picture: Image.Image, classes: np.ndarray, colors: np.ndarray, opacity: float) -> Image.Image:
    """Classes `(height, width)` as colors over the picture."""
    return Image.blend(picture.convert("RGB"), Image.fromarray(colors[classes]), opacity)


def legend(classes: np.ndarray, names: list[str], colors: np.ndarray) -> str:
    """The classes of a picture with their color and share, the largest first, as HTML."""
    shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    items = [
        f'<li><i style="background:rgb({",".join(map(str, colors[index]))})"></i>'
        f"{html.escape(names[index])} {100 * shares[index]:.1f} %</li>"
        for index in np.argsort(-shares)[:MAX_LEGEND]
        if shares[index]
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def wall(pictures: Iterable[tuple[Image.Image, str, float]]) -> str:
    """Pictures with their class and similarity, as HTML."""
    items = [
        f'<li><img src="{data_url(picture)}" alt="{html.escape(label)}">'
        f"<span>{html.escape(label)}<br>{similarity:.2f}</span></li>"
        for picture, label, similarity in pictures
    ]
    return f'<ol class="wall">{"".join(items)}</ol>'
