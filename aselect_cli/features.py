"""`aselect features`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aselect_cli import options as opt
from aselect_cli.command import Answer

if TYPE_CHECKING:
    from aselect_hf.data.image_data import ImageData

TRAIN_SPLIT = "train"


def features(
    model: opt.Model,
    data: Annotated[str | None, typer.Argument(help="Images, as for select; not needed with --list.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List names and shapes of all features.")] = False,
    names: Annotated[
        str | None, typer.Option("--features", help="Names, separated by commas (default: the model's own).")
    ] = None,
    timesteps: Annotated[str | None, typer.Option(help="Timesteps as 0,50,100 (default: the model's own).")] = None,
    pool: Annotated[bool, typer.Option(help="Write the mean over tokens, or every token.")] = True,
    split: Annotated[str, typer.Option(help="Split to read.")] = TRAIN_SPLIT,
    image_column: opt.ImageColumn = "image",
    label_column: opt.LabelColumn = None,
    max_samples: opt.MaxSamples = None,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    device: opt.Device = None,
    dtype: opt.DType = "float32",
    on_error: opt.OnError = "stop",
    output: Annotated[Path, typer.Option(help="Safetensors file to write.")] = Path("features.safetensors"),
) -> Answer:
    """Write features to a safetensors file, or list them.

    The file also holds the labels (-1: none). Its metadata hold the names of the classes as JSON, label_names. Each
    class has the same number as in the training split.
    """
    from aselect_cli.inputs import load_backbone, read_images
    from aselect_hf.data.extract import write_features
    from aselect_hf.files import check_writable
    from aselect_hf.selection.candidates import read_integers

    steps = read_integers(timesteps, "timesteps") if timesteps else None
    backbone = load_backbone(model, device, dtype)
    if list_only:
        return _list(backbone.config)
    if data is None:
        raise ValueError("DATA is missing: give images, or use --list")
    check_writable(output)
    images = read_images(data, split, image_column, label_column).sample(max_samples, 0).readable(on_error)
    if images.label_names is not None and split != TRAIN_SPLIT:
        images = images.with_classes(_names_from_training(images, data, image_column, label_column))
    shapes = write_features(
        backbone,
        images,
        output,
        features=names.split(",") if names else None,
        timesteps=steps,
        pool=pool,
        batch_size=batch_size,
    )
    lines = [f"no labels are written: {images.no_labels}"] if images.labels is None else []
    lines += [f"{name:28s} {shape}" for name, shape in shapes.items()]
    return Answer("\n".join([*lines, f"wrote {output}"]), {"shapes": shapes, "written": [str(output)]})


def _list(config: Any) -> Answer:
    """Names and shapes of all features of a model."""
    widths, tokens = {name: config.feature_width(name) for name in config.list_features()}, config.num_patches
    marks = {config.feature: "  <- config.feature"}
    text = "\n".join(f"{name:28s} (batch, {tokens}, {width}){marks.get(name, '')}" for name, width in widths.items())
    width = config.feature_width(config.feature)
    return Answer(text, {"features": list(widths), "default": config.feature, "tokens": tokens, "width": width})


def _names_from_training(images: ImageData, data: str, image_column: str, label_column: str | None) -> list[str]:
    """Classes of the training split, if there is one, then classes that only `images` have."""
    from aselect_cli.inputs import read_images

    try:
        training = read_images(data, TRAIN_SPLIT, image_column, label_column).class_names
    except ValueError:
        return images.class_names
    return [*training, *(name for name in images.class_names if name not in set(training))]
