"""One picture along the noise axis: what the network sees above what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.pictures.colors import FeatureColors
from aselect_hf.pictures.maps import enlarged, pca_map
from aselect_hf.pictures.sweep import PictureSweep, dense_timesteps, sweep_picture

GAP, TEXT = 6, 15
COLUMNS = 8


def noise_strip(
    model: NoisyBackbone,
    image: Any,
    timesteps: Sequence[int] | None = None,
    feature: str | None = None,
    *,
    side: int = 120,
) -> Image.Image:
    """A picture with one column per timestep: the noisy input, and below it the feature as colors (`pca_map`).

    All timesteps share one projection, so that a color means the same in every column.

    Args:
        model: the backbone, in evaluation mode.
        image: PIL image, path, bytes or array; or a clean input `(1, channels, height, width)`.
        timesteps: training indices (default: eight, dense at low noise).
        feature: `blocks.<i>.<kind>` (default: the model's own).
        side: of every picture, in pixels.

    Returns:
        RGB on white, with `t` and sigma above every column.

    Raises:
        ValueError: as `sweep_picture`.
    """
    name = feature or str(model.config.feature)
    steps = dense_timesteps(model.noise_schedule.num_train_timesteps, COLUMNS) if timesteps is None else timesteps
    return draw_strip(sweep_picture(model, image, steps, [name]), name, model, side=side)


def draw_strip(sweep: PictureSweep, feature: str, model: NoisyBackbone, *, side: int = 120) -> Image.Image:
    """The strip of a sweep that has been computed; arguments as in `noise_strip`."""
    colors, font = FeatureColors.fit(sweep.features[feature]), ImageFont.load_default(TEXT - 3)
    head = 2 * TEXT + GAP
    columns = []
    for timestep in sweep.timesteps:
        column = Image.new("RGB", (side, head + 2 * side + GAP), "white")
        draw = ImageDraw.Draw(column)
        draw.text((2, 0), f"t = {timestep}", "black", font)
        draw.text((2, TEXT), f"sigma {model.noise_schedule.sigma(timestep):.2f}", "#57606a", font)
        column.paste(enlarged(sweep.noisy_picture(timestep), side), (0, head))
        column.paste(
            pca_map(sweep.at(feature, timestep), sweep.grid_size, colors=colors, side=side), (0, head + side + GAP)
        )
        columns.append(column)
    strip = Image.new("RGB", (len(columns) * (side + GAP) - GAP, columns[0].height), "white")
    for index, column in enumerate(columns):
        strip.paste(column, (index * (side + GAP), 0))
    return strip
