"""Pictures of a run: its history, and predictions for a few validation images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F

from aselect_hf.data.image_data import ImageData
from aselect_hf.files import write_json
from aselect_hf.hub.examples import EXAMPLES_FILE, Example, Examples
from aselect_hf.modeling.image_processing_aselect_dit import make_image_processor
from aselect_hf.tasks import task_of_model
from aselect_hf.training.objective import HeadModel, TaskObjective
from aselect_hf.training.task_dataset import TaskDataset

NUM_EXAMPLES = 12
NUM_WIDGET_EXAMPLES = 3
WIDGET_SIDE = 256
TOP_LABELS = 5
PALETTE = np.array([colormaps["tab20"](index % 20)[:3] for index in range(255)] + [(1.0, 1.0, 1.0)])  # 255: ignored


def plot_history(history: list[dict[str, Any]], main_metric: str, path: Path) -> None:
    """Plot losses over steps, and the validation metric on its own axis."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    left = figure.subplots()
    for name in ("loss", "task_loss", "denoising_loss"):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points and not (name == "task_loss" and not any("denoising_loss" in entry for entry in history)):
            left.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    left.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    left.grid(alpha=0.25)
    points = [(entry["step"], entry[main_metric]) for entry in history if main_metric in entry]
    if points:
        right = left.twinx()
        label = f"validation {main_metric.replace('_', ' ')}"
        right.plot(*zip(*points, strict=True), "o-", ms=3, color="#1a7f37", label=label)
        right.set_ylabel(label)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)


@torch.no_grad()
def predictions_figure(objective: TaskObjective, dataset: TaskDataset, label_names: list[str], head: int) -> Figure:
    """A few validation images with their labels and predictions, as titles or as masks."""
    indices = np.linspace(0, len(dataset) - 1, min(NUM_EXAMPLES, len(dataset))).astype(int).tolist()
    batch = dataset.collate(indices)
    device = objective.dit.device
    logits = objective({name: value.to(device) for name, value in batch.items() if name != "masks"})[head].cpu()
    images = [dataset.data.decode(index) for index in indices]
    if dataset.task.dense:
        return _masks_figure(images, batch["masks"], logits, label_names)
    figure = Figure(figsize=(1.6 * 6, 2.0 * -(-len(indices) // 6)), layout="constrained")
    axes = figure.subplots(-(-len(indices) // 6), 6, squeeze=False).ravel()
    for axis, image, label, scores in zip(axes, images, batch["labels"], logits, strict=False):
        axis.imshow(_array(image), cmap="gray")
        guess = int(scores.argmax())
        right = guess == int(label)
        title = label_names[guess] + ("" if right else f"\nnot {label_names[int(label)]}")
        axis.set_title(title, fontsize=8, color="#1a7f37" if right else "#cf222e")
    for axis in axes:
        axis.axis("off")
    return figure


def log_figure(accelerator: Accelerator, name: str, figure: Figure, step: int) -> None:
    """Send a figure to every tracker that shows images."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[None, ..., :3]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            values = {name: list(pixels)} if tracker.name == "wandb" else {name: pixels}
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(values, step=step, **options)


@torch.inference_mode()
def save_widget_examples(model: HeadModel, data: ImageData, dataset: str, folder: Path) -> None:
    """Save three images of a split, and the model's answers to them, for its page on the Hub.

    Args:
        dataset: name of the data set, see `DataArguments.public_name`.
        folder: for `widget.json` and the pictures.
    """
    config = model.config
    if not config.takes_pictures:
        return
    task = task_of_model(model)
    processor = make_image_processor(config, task.whole_image)
    examples: list[Example] = []
    count = min(NUM_WIDGET_EXAMPLES, len(data))
    for number, index in enumerate(np.linspace(0, len(data) - 1, count).astype(int).tolist(), start=1):
        picture, name = _small_picture(data.decode(index)), f"widget-{number}.png"
        picture.save(folder / name)
        logits = model(**processor(images=picture, return_tensors="pt")).logits[0].float()
        output: list[dict[str, Any]] | dict[str, str]
        if task.dense:
            output = {"url": f"widget-{number}-output.png"}
            _overlay(picture, logits).save(folder / output["url"])
        else:
            scores, classes = logits.softmax(dim=0).topk(min(TOP_LABELS, len(logits)))
            names = [str((config.id2label or {})[label]) for label in classes.tolist()]
            pairs = zip(names, scores.tolist(), strict=True)
            output = [{"label": label, "score": round(score, 4)} for label, score in pairs]
        examples.append({"src": name, "example_title": f"Example {number}", "output": output})
    content: Examples = {"dataset": dataset, "examples": examples}
    write_json(folder / EXAMPLES_FILE, content)


def _small_picture(image: Any) -> Image.Image:
    """An RGB or gray picture of at most 256 pixels a side."""
    if isinstance(image, torch.Tensor):
        image = Image.fromarray((255 * _array(image)).round().astype(np.uint8))
    picture = image.copy()  # it may be the caller's own
    picture.thumbnail((WIDGET_SIDE, WIDGET_SIDE))
    return picture


def _overlay(picture: Image.Image, logits: torch.Tensor) -> Image.Image:
    size = (picture.height, picture.width)
    classes = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    colors = Image.fromarray((255 * PALETTE[classes.numpy()]).astype(np.uint8))
    return Image.blend(picture.convert("RGB"), colors, 0.5)


def _masks_figure(images: list[Any], masks: list[torch.Tensor], logits: torch.Tensor, label_names: list[str]) -> Figure:
    figure = Figure(figsize=(1.2 * len(images), 4), layout="constrained")
    axes = figure.subplots(3, len(images), squeeze=False)
    for column, (image, mask, scores) in enumerate(zip(images, masks, logits, strict=True)):
        resized = F.interpolate(scores[None], size=mask.shape, mode="bilinear", align_corners=False)
        for row, picture in enumerate((_array(image), PALETTE[mask], PALETTE[resized[0].argmax(dim=0)])):
            axes[row, column].imshow(picture, cmap="gray")
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
    for row, name in enumerate(("image", "truth", "prediction")):
        axes[row, 0].set_ylabel(name)
    for index, name in enumerate(label_names[:20]):
        figure.text(0.01 + 0.98 * index / max(len(label_names[:20]), 1), 0.0, name, color=PALETTE[index], fontsize=7)
    return figure


def _array(image: Any) -> np.ndarray:
    """Pixels for `imshow`; tensors are in [-1, 1]."""
    if isinstance(image, torch.Tensor):
        return (image.float().movedim(0, -1).squeeze(-1).numpy() + 1).clip(0, 2) / 2
    return np.asarray(image)
