"""The page: a picture on the left, and tabs that predict, walk the noise and compare."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from aselect_hf.app.checkpoint import Checkpoint
from aselect_hf.app.handlers import SIDE, Handlers
from aselect_hf.app.workbench import Workbench
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images

TITLE = "aselect: what noise does to features"
NUM_EXAMPLES = 6
CSS = """
.facts span { display: inline-block; margin-right: 1.2em; white-space: nowrap; }
.plot { position: relative; margin-top: 1.8em; max-width: 680px; }
.plot svg { display: block; width: 100%; height: auto; max-width: none !important; }
.plot i { position: absolute; width: 0; border-left: 2px solid #cf222e; }
.plots > * { min-width: min(320px, 100%) !important; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.3em 1em; }
.legend i { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.4em; border-radius: 2px; }
.wall { list-style: none; padding: 0; margin: 1.8em 0 0; display: grid; gap: 0.6em;
  grid-template-columns: repeat(auto-fill, minmax(5.2em, 1fr)); }
.wall img { width: 100%; image-rendering: pixelated; border-radius: 4px; }
.wall span { display: block; font-size: 0.85em; line-height: 1.25; }
.patches { padding-top: 30px !important; }
.patches img { image-rendering: pixelated; }
.dark button[role=tab][aria-selected=true] { color: var(--primary-300); }
.about td, .about th { word-break: normal !important; overflow-wrap: normal !important; }
.about th { display: none; }
"""


def upload(value: str | None = None, **options: Any) -> gr.Image:
    """A place for a picture that is handed over as a file, unread, so that the page can say what is wrong with it."""
    image: Any = gr.Image(value, sources=["upload", "clipboard"], **options)
    image.preprocess = lambda payload: payload and payload.path
    return image


def unchecked(component: Any) -> Any:
    """A slider or choice whose values Gradio hands on as they are.

    It would check them against the first model's, even if a program asks for another model. The functions check better.
    """
    component.preprocess = lambda payload: payload
    return component


def theme() -> gr.themes.Base:
    """The looks, with fonts of the reader's system, so that none is fetched, and colors of enough contrast."""
    fonts = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]
    code = [gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")]
    looks = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=code)
    return looks.set(
        color_accent="*primary_700",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )


def example_pictures() -> list[str]:
    """Files of pictures of the sample's validation split, in a folder of their own."""
    data, folder = ImageData.of(load_images("sample", "validation"), name="sample"), Path(tempfile.mkdtemp())
    paths = []
    for row in range(NUM_EXAMPLES):
        picture = data.decode(row).resize((224, 224), Image.Resampling.NEAREST)
        name = data.label_names[data.labels[row]] if data.labels is not None and data.label_names else "picture"
        paths.append(str(folder / f"{row}-{name.replace('/', ' or ').replace(' ', '-').lower()}.png"))
        picture.save(paths[-1])
    return paths


NAME_EXAMPLES = """() => setTimeout(() => document.querySelectorAll("button.gallery-item").forEach(
  (button, index) => button.setAttribute("aria-label", "Sample picture " + {names}[index])), 500)"""
"""Gradio gives the buttons of pictures no name, so that a screen reader could not tell them apart."""


def places(count: int, value: int) -> dict[str, Any]:
    """A slider over `count` places from 0. Gradio needs two, so a slider over one place has a second and is fixed."""
    return {"minimum": 0, "maximum": max(1, count - 1), "step": 1, "value": value, "interactive": count > 1}


class Controls:
    """Sliders over timesteps and blocks, and a choice of kinds, for one model.

    Args:
        own_timestep: start at the model's own timestep, or else at a quarter of the slider.
    """

    def __init__(self, shown: Checkpoint, suffix: str = "", own_timestep: bool = True) -> None:
        steps = self.timesteps(shown)
        steps |= {} if own_timestep else {"value": shown.timesteps[len(shown.timesteps) // 4]}
        self.timestep = unchecked(gr.Slider(**steps, label=f"Timestep t{suffix} (0 clean, larger is noisier)"))
        with gr.Row():
            self.block = unchecked(gr.Slider(**self.blocks(shown), label=f"Block{suffix}"))
            self.kind = unchecked(gr.Dropdown(**self.kinds(shown), label=f"Kind of feature{suffix}"))

    @property
    def all(self) -> list[Any]:
        return [self.timestep, self.block, self.kind]

    @staticmethod
    def timesteps(shown: Checkpoint) -> dict[str, Any]:
        steps = shown.timesteps
        spacing = steps[1] - steps[0] if len(steps) > 1 else 1
        return {"minimum": 0, "maximum": steps[-1], "step": spacing, "value": shown.own_timestep}

    @staticmethod
    def blocks(shown: Checkpoint) -> dict[str, Any]:
        return places(shown.backbone.config.num_hidden_layers, shown.own_feature[0])

    @staticmethod
    def kinds(shown: Checkpoint) -> dict[str, Any]:
        return {"choices": list(shown.backbone.config.feature_kinds), "value": shown.own_feature[1]}

    @classmethod
    def updates(cls, shown: Checkpoint) -> list[Any]:
        """Updates of all three for another model."""
        return [gr.update(**each(shown)) for each in (cls.timesteps, cls.blocks, cls.kinds)]


def answer_label(shown: Checkpoint) -> str:
    """What the probabilities of classes are."""
    return "Classes" if shown.has_head else "Nearest labeled sample pictures (this model has no head)"


class Page:
    """Builds the page.

    Args:
        bench: computes what it shows.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench, self.calls = bench, Handlers(bench)
        self.first = bench.checkpoint(None)
        self.names = list(bench.checkpoints)
        self.can_walk = all(each.can_walk for each in bench.checkpoints.values())

    def build(self) -> gr.Blocks:
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.Markdown(
                "# What noise does to features\n"
                "A diffusion network sees a picture mixed with noise. Move `t`, and watch what it still tells apart."
            )
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self.model = self._model_choice("Model")
                    examples = example_pictures()
                    self.picture = upload(examples[0], label="Picture", height=260, elem_id="picture")
                    gr.Examples([[each] for each in examples], [self.picture], label="Sample pictures")
                    page.load(None, js=NAME_EXAMPLES.format(names=json.dumps([Path(each).stem for each in examples])))
                with gr.Column(scale=3, min_width=340):
                    self._tabs()
            self._connect(page)
        return page.queue(max_size=32, default_concurrency_limit=4)

    def _model_choice(self, label: str) -> gr.Dropdown:
        return gr.Dropdown(self.names, value=self.names[0], label=label, visible=len(self.names) > 1)

    def _tabs(self) -> None:
        with gr.Tabs(selected="walk" if self.can_walk else "predict"):
            with gr.Tab("Predict", id="predict"):
                self._predict_tab()
            with gr.Tab("Walk the noise", id="walk", visible=self.can_walk):
                self._walk_tab()
            with gr.Tab("Compare", id="compare", visible=self.can_walk) as self.compare_tab:
                self._compare_tab()

    def _predict_tab(self) -> None:
        dense = self.first.task.dense
        with gr.Row():
            with gr.Column(min_width=320):
                self._answers(dense)
            with gr.Column(min_width=320):
                gr.Markdown("### About this model")
                self.about = gr.Markdown(self.first.facts(), elem_classes="about")

    def _answers(self, dense: bool) -> None:
        self.classes = gr.Label(label=answer_label(self.first), num_top_classes=8, visible=not dense)
        self.segments = gr.Image(
            label="Segments", alt_text="Segmented picture", interactive=False, visible=dense, buttons=["download"]
        )
        self.opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", visible=dense)
        self.legend = gr.HTML(label="Legend")

    def _walk_tab(self) -> None:
        self.walk = Controls(self.first)
        self.facts = gr.HTML(label="Facts")
        side: dict[str, Any] = {"interactive": False, "buttons": [], "elem_classes": "patches", "min_width": 150}
        plot: dict[str, Any] = {"show_label": True, "container": True}
        with gr.Row():
            labels = ("Noisy input", "Feature as colors", "Similarity (click)", "Its attention")
            images = [gr.Image(label=label, alt_text=label, **side) for label in labels]
            self.noisy, self.colors, self.click, self.attention = images
        with gr.Row(elem_classes="plots"):
            self.ratios = gr.HTML(label="HFR over the noise axis", **plot)
            self.confidences = gr.HTML(label="The head's confidence", visible=self.first.has_head, **plot)
        with gr.Accordion("Patch by keyboard, and a second picture", open=False):
            with gr.Row():
                height, width = self.first.backbone.config.grid_size
                self.row = unchecked(gr.Slider(**places(height, height // 2), label="Row of the patch"))
                self.column = unchecked(gr.Slider(**places(width, width // 2), label="Column of the patch"))
            self.second = upload(label="Second picture, in which the similarity is shown", height=220, elem_id="second")

    def _compare_tab(self) -> None:
        self.sides: list[tuple[Any, Controls, Any, Any]] = []
        with gr.Row():
            for suffix in (" A", " B"):
                with gr.Column(min_width=320):
                    model = self._model_choice(f"Model{suffix}")
                    controls = Controls(self.first, suffix, own_timestep=not self.sides)
                    look: dict[str, Any] = {"interactive": False, "buttons": [], "elem_classes": "patches"}
                    title = f"Feature as colors{suffix}"
                    colors = gr.Image(label=title, alt_text=title, height=280, **look)
                    wall = gr.HTML(label=f"Nearest sample pictures{suffix}", show_label=True, container=True)
                    self.sides.append((model, controls, colors, wall))

    def _connect(self, page: gr.Blocks) -> None:
        predicted = ([self.picture, self.opacity, self.model], [self.classes, self.segments, self.legend])
        if not self.can_walk:
            events = [page.load, self.picture.change, self.opacity.input]
            gr.on(events, self.calls.predict, *predicted, api_name="predict", trigger_mode="always_last")
            return
        controls = [*self.walk.all, self.row, self.column]
        walk_in = [self.picture, *controls, self.second, self.model]
        walk_out = [self.noisy, self.colors, self.click, self.facts, self.ratios, self.confidences]
        attend_in = [self.picture, self.walk.timestep, self.walk.block, self.row, self.column, self.model]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "always_last"}

        # A picture that cannot be read ends the chain, so that it is reported once.
        arrived = gr.on(
            [page.load, self.picture.change, self.second.change], self.calls.walk, walk_in, walk_out, api_name="walk"
        )
        arrived = arrived.success(self.calls.attend, attend_in, self.attention, api_name="attend")
        arrived.success(self.calls.predict, *predicted, api_name="predict")
        self.opacity.input(self.calls.predict, *predicted, **quiet)

        # Only what people move: updates of several sliders, one after the other, must not be read halfway.
        moved = gr.on([each.input for each in controls], self.calls.walk, walk_in, walk_out, **quiet)
        moved.success(self.calls.attend, attend_in, self.attention, **quiet)
        clicked = gr.on(
            [image.select for image in (self.noisy, self.colors, self.click, self.attention)],
            *(self._clicked, self.model, [self.row, self.column]),
            **quiet,
        ).success(self.calls.walk, walk_in, walk_out, **quiet)
        clicked.success(self.calls.attend, attend_in, self.attention, **quiet)

        answers = [self.classes, self.segments, self.opacity, self.confidences]
        updates = [*self.walk.all, self.row, self.column, self.about, *answers]
        switched = self.model.input(self._switched, self.model, updates, **quiet)
        switched = switched.success(self.calls.walk, walk_in, walk_out, api_visibility="private")
        switched = switched.success(self.calls.attend, attend_in, self.attention, **quiet)
        switched.success(self.calls.predict, *predicted, **quiet)
        self._connect_sides(quiet)

    def _connect_sides(self, quiet: dict[str, Any]) -> None:
        for index, (model, controls, colors, wall) in enumerate(self.sides):
            inputs = [self.picture, *controls.all, model]
            name: dict[str, Any] = {"api_name": "neighbors"} if index == 0 else {"api_visibility": "private"}
            events = [self.compare_tab.select, *(each.input for each in controls.all)]
            gr.on(events, self.calls.neighbors, inputs, [colors, wall], trigger_mode="always_last", **name)
            chosen = model.input(self._switched_side, model, controls.all, **quiet)
            chosen.then(self.calls.neighbors, inputs, [colors, wall], api_visibility="private")

    def _clicked(self, model: str, event: gr.SelectData) -> tuple[int, int]:
        """Row and column of the patch at a pixel."""
        height, width = self.bench.checkpoint(model).backbone.config.grid_size
        x, y = event.index
        return min(height - 1, int(y * height / SIDE)), min(width - 1, int(x * width / SIDE))

    def _switched(self, model: str) -> list[Any]:
        shown = self.bench.checkpoint(model)
        height, width = shown.backbone.config.grid_size
        patch = [gr.update(**places(side, side // 2)) for side in (height, width)]
        dense = shown.task.dense
        answers = [
            gr.update(visible=not dense, label=answer_label(shown)),
            *(gr.update(visible=dense) for _ in (self.segments, self.opacity)),
            gr.update(visible=shown.has_head),
        ]
        return [*Controls.updates(shown), *patch, shown.facts(), *answers]

    def _switched_side(self, model: str) -> list[Any]:
        return Controls.updates(self.bench.checkpoint(model))
