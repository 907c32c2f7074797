"""What the page's buttons and sliders call. Their names, types and texts are also the interface for programs."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from typing import Any

import gradio as gr
from PIL import Image

from aselect_hf.app import drawing
from aselect_hf.app.checkpoint import Checkpoint
from aselect_hf.app.uploads import Upload, read_upload
from aselect_hf.app.workbench import Workbench
from aselect_hf.pictures import attention_picture, curve, pca_map, similarity_map

SIDE = 336
WAITING = gr.Progress()


def friendly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Show errors of input as one line on the page instead of a stack trace in the terminal."""

    @functools.wraps(handler)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), title="That does not work", print_exception=False) from None

    return run


class Handlers:
    """The functions of one page.

    Args:
        bench: computes what they show.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench

    @friendly
    def predict(self, picture: str, opacity: float = 0.5, model: str | None = None) -> tuple[Any, Any, str]:
        """Classify or segment a picture.

        Args:
            picture: an image file.
            opacity: of the colors over a segmented picture, 0 to 1.
            model: name of a model on show (default: the first).

        Returns:
            Probabilities by class (without a head: shares of the nearest labeled sample pictures), the segmented
            picture, and a legend as HTML. What the model does not give is empty.
        """
        shown, upload = self.bench.checkpoint(model), read_upload(picture)
        note = f'<p class="note">{upload.note}</p>' if upload.note else ""
        if not shown.task.dense:
            return self.bench.classes(shown, upload), None, note
        classes = self.bench.segments(shown, upload)
        names = [str(name) for _, name in sorted((shown.model.config.id2label or {}).items())]
        colors = drawing.segment_colors(len(names))
        seen = drawing.overlay(upload.picture, classes, colors, opacity)
        return None, seen, note + drawing.legend(classes, names, colors)

    @friendly
    def walk(
        self,
        picture: str,
        timestep: int,
        block: int,
        kind: str,
        row: int = 0,
        column: int = 0,
        second: str | None = None,
        model: str | None = None,
        progress: gr.Progress = WAITING,
    ) -> tuple[Image.Image, Image.Image, Image.Image, str, str, str]:
        """Show what a model sees and computes of a picture at one noise level.

        Args:
            picture: an image file.
            timestep: one of the timesteps of the slider, 0 for the clean picture.
            block: of the network, from 0.
            kind: of feature, such as query, key, value, mlp or hidden.
            row: of the patch whose similarity to all others is shown, from 0 at the top.
            column: of this patch, from 0 at the left.
            second: another image file; the similarity is then shown in it.
            model: name of a model on show (default: the first).

        Returns:
            The noisy input, the feature as colors, the similarity to the patch, a line of facts, the plot of HFR over
            the noise axis, and that of the head's confidence, the last three as HTML.
        """
        shown, upload = self.bench.checkpoint(model), read_upload(picture)
        feature = shown.feature(block, kind)
        sweep = self.bench.sweep(shown, upload, feature, lambda share: progress(share, desc="all timesteps"))
        step = shown.timesteps.index(_checked(shown, timestep))
        here = shown.timesteps[step]
        tokens, grid = sweep.features[feature][step], sweep.grid_size
        patch = (min(int(row), grid[0] - 1), min(int(column), grid[1] - 1))
        colors = self.bench.colors(shown, upload, feature)
        if second:
            other = self.bench.sweep(shown, read_upload(second), feature, lambda share: progress(share, desc="second"))
            click = similarity_map(other.features[feature][step], grid, patch, reference=tokens, side=SIDE)
        else:
            click = similarity_map(tokens, grid, patch, side=SIDE)
        schedule = shown.backbone.noise_schedule
        return (
            sweep.noisy_picture(here).resize((SIDE, SIDE), Image.Resampling.NEAREST),
            pca_map(tokens, grid, colors=colors, side=SIDE),
            click,
            drawing.noise_line(schedule, here, feature, self.bench.ratios(shown, upload, feature)[step]),
            drawing.at_timestep(self._ratio_plot(shown, upload, feature), schedule, here),
            self._confidence_plot(shown, upload, here),
        )

    @friendly
    def attend(
        self, picture: str, timestep: int, block: int, row: int = 0, column: int = 0, model: str | None = None
    ) -> Image.Image | None:
        """Show where a patch attends to, as the mean over the heads of one block.

        Args:
            picture: an image file.
            timestep: one of the timesteps of the slider, 0 for the clean picture.
            block: of the network, from 0.
            row: of the patch, from 0 at the top.
            column: of the patch, from 0 at the left.
            model: name of a model on show (default: the first).

        Returns:
            The attention to every patch; nothing for networks without softmax attention.
        """
        shown, upload = self.bench.checkpoint(model), read_upload(picture)
        try:
            maps = self.bench.attention(shown, upload, _checked(shown, timestep), block)
        except ValueError as error:
            if "no softmax attention" in str(error):
                return None
            raise
        grid = shown.backbone.config.grid_size
        return attention_picture(maps, grid, (min(int(row), grid[0] - 1), min(int(column), grid[1] - 1)), side=SIDE)

    @friendly
    def neighbors(
        self,
        picture: str,
        timestep: int,
        block: int,
        kind: str,
        model: str | None = None,
        progress: gr.Progress = WAITING,
    ) -> tuple[Image.Image, str]:
        """Find the sample pictures whose features are nearest to those of a picture.

        Args:
            picture: an image file.
            timestep: one of the timesteps of the slider, 0 for the clean picture.
            block: of the network, from 0.
            kind: of feature, such as query, key, value, mlp or hidden.
            model: name of a model on show (default: the first).

        Returns:
            The feature as colors, and as HTML the nearest pictures with their class and cosine similarity.
        """
        shown, upload = self.bench.checkpoint(model), read_upload(picture)
        feature = shown.feature(block, kind)
        sweep = self.bench.sweep(shown, upload, feature, lambda share: progress(share, desc="all timesteps"))
        here = _checked(shown, timestep)
        rows, similarities = self.bench.neighbors(
            shown, upload, feature, here, lambda share: progress(share, desc="sample pictures")
        )
        wall = [
            (self.bench.gallery_picture(each), self.bench.gallery_label(each), similarity)
            for each, similarity in zip(rows, similarities, strict=True)
        ]
        colors = self.bench.colors(shown, upload, feature)
        return pca_map(sweep.at(feature, here), sweep.grid_size, colors=colors, side=SIDE), drawing.wall(wall)

    def _ratio_plot(self, shown: Checkpoint, upload: Upload, feature: str) -> str:
        def draw() -> str:
            behind = shown.curve if shown.curve and shown.curve.feature == feature else None
            figure = curve(
                shown.backbone.noise_schedule,
                picture=(shown.timesteps, {"this picture": self.bench.ratios(shown, upload, feature)}),
                selection=behind,
            )
            return drawing.plot_with_line(figure, f"High-Frequency Ratio of {feature} over the timesteps")

        return self.bench.cache.get(("plot", shown.name, upload.key, feature), draw, len)

    def _confidence_plot(self, shown: Checkpoint, upload: Upload, timestep: int) -> str:
        found = self.bench.confidences(shown, upload)
        if found is None:
            return ""
        schedule = shown.backbone.noise_schedule

        def draw() -> str:
            figure = curve(schedule, picture=(shown.timesteps, found), label="probability")
            return drawing.plot_with_line(figure, "Confidence of the head over the timesteps")

        plot = self.bench.cache.get(("confidence plot", shown.name, upload.key), draw, len)
        return drawing.at_timestep(plot, schedule, timestep)


def _checked(shown: Checkpoint, timestep: int) -> int:
    """The timestep of the slider; any other is refused.

    Raises:
        ValueError: it is none of the slider's.
    """
    if timestep not in shown.timesteps:
        step = shown.timesteps[1] if len(shown.timesteps) > 1 else 1
        raise ValueError(f"timestep must be a multiple of {step} in 0..{shown.timesteps[-1]}, got {timestep}")
    return int(timestep)
