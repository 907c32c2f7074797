"""`aselect features`."""

from __future__ import annotations

import contextlib
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
    maps: Annotated[bool, typer.Option("--maps", help="Write maps: channels, height and width of the grid.")] = False,
    stored_dtype: Annotated[str, typer.Option(help="float32 or float16, on the disk.")] = "float32",
    split: Annotated[str, typer.Option(help="Split to read.")] = TRAIN_SPLIT,
    image_column: opt.ImageColumn = "image",
    label_column: opt.LabelColumn = None,
    max_samples: opt.MaxSamples = None,
    streaming: opt.Streaming = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    num_workers: Annotated[int, typer.Option(help="Processes that decode images ahead.")] = 0,
    device: opt.Device = None,
    dtype: opt.DType = "float32",
    on_error: opt.OnError = "stop",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for a data set of any size, or one .safetensors file.")
    ] = Path("features.safetensors"),
    num_shards: Annotated[int | None, typer.Option(help="Files in the folder (default: by the data's size).")] = None,
    shard: Annotated[
        str | None, typer.Option(help="Do one job's share, as 0/16 for the first of 16 (default: everything).")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Data set repository on the Hub to push the complete folder to, as user/name.")
    ] = None,
    private: Annotated[bool | None, typer.Option(help="Visibility of a new repository.")] = None,
) -> Answer:
    """Write features to a folder of parquet shards or to a safetensors file, or list them.

    Every image has its id (file name or row), label and name of the label; _features.json, or the file's metadata, say
    how the features were computed. Each class has the same number as in the training split. The same command goes on
    after an interruption. Processes of accelerate launch, and jobs with the same folder, share the work.
    """
    from aselect_cli.inputs import load_backbone, read_images
    from aselect_hf.data.extract import write_features
    from aselect_hf.data.feature_set import Part, write_feature_set
    from aselect_hf.data.feature_stream import write_streamed_features
    from aselect_hf.data.processes import shared_work
    from aselect_hf.data.sources import load_images
    from aselect_hf.files import check_writable
    from aselect_hf.selection.candidates import read_integers

    steps = read_integers(timesteps, "timesteps") if timesteps else None
    part = Part.parse(shard) if shard else None
    one_file = output.suffix == ".safetensors"
    _check_folder_options(one_file, num_shards=num_shards, shard=shard, push_to_hub=push_to_hub)
    if streaming and (one_file or max_samples or num_shards):
        raise ValueError("streaming reads all images into a folder, one shard a file of the stream: give --output DIR, "
                         "and neither max_samples nor num_shards")  # fmt: skip
    if push_to_hub and part:
        raise ValueError("push_to_hub needs all shards: leave out shard, or push after the last job has ended")
    if maps and not pool:
        raise ValueError("maps and no-pool are two formats: give one of them")
    backbone = load_backbone(model, device, dtype)
    if list_only:
        return _list(backbone.config)
    if data is None:
        raise ValueError("DATA is missing: give images, or use --list")
    check_writable(output if one_file else output / "file")
    lines: list[str] = []
    if not streaming:
        images = read_images(data, split, image_column, label_column).sample(max_samples, 0).readable(on_error)
        if images.label_names is not None and split != TRAIN_SPLIT:
            images = images.with_classes(_names_from_training(images, data, image_column, label_column))
        lines += [f"no labels are written: {images.no_labels}"] if images.labels is None else []
    request: dict[str, Any] = {"features": names.split(",") if names else None, "timesteps": steps}
    request |= {"output_format": "map" if maps else "pooled" if pool else "tokens", "dtype": stored_dtype}
    with shared_work() as here:
        if one_file:
            if here.count > 1:
                raise ValueError(f"{output} is written by one process, but {here.count} run: give a folder")
            shapes = write_features(backbone, images, output, **request, batch_size=batch_size)
            lines += [f"{name:28s} {shape}" for name, shape in shapes.items()]
            return Answer("\n".join([*lines, f"wrote {output}"]), {"shapes": shapes, "written": [str(output)]})
        request |= {"split": split, "part": part, "batch_size": batch_size, "num_workers": num_workers}
        request["progress"] = here.is_main
        if streaming:
            stream = load_images(data, split, streaming=True)
            columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
            columns["classes"] = _streamed_classes(stream, data, split, label_column)
            root = data if Path(data).is_dir() else None
            found = write_streamed_features(
                backbone, stream, output, **request, **columns, root=root, name=f"{data} ({split})", on_error=on_error
            )
        else:
            found = write_feature_set(backbone, images, output, **request, num_shards=num_shards)
        urls = _push(output, push_to_hub, private) if push_to_hub and here.is_main else []
    shapes = {name: (found.num_images, *each["shape"]) for name, each in found.record["columns"].items()}
    lines += [f"{name:28s} {shape}" for name, shape in shapes.items()]
    lines += [f"wrote {output}: {found.num_shards} shards" if part is None else f"wrote the shards of job {shard}"]
    document = {"shapes": shapes, "shards": found.num_shards, "written": [str(output)], "pushed": urls}
    return Answer("\n".join([*lines, *(f"pushed {url}" for url in urls)]), document)


def _check_folder_options(one_file: bool, **given: Any) -> None:
    """Refuse options of folders for a single file."""
    for name, value in given.items():
        if one_file and value is not None:
            raise ValueError(f"{name} needs a folder: give --output DIR instead of a .safetensors file")


def _push(folder: Path, repo_id: str, private: bool | None) -> list[str]:
    from aselect_hf.hub.features import push_features

    return [push_features(folder, repo_id, private=private)]


def _list(config: Any) -> Answer:
    """Names and shapes of all features of a model."""
    widths, tokens = {name: config.feature_width(name) for name in config.list_features()}, config.num_patches
    marks = {config.feature: "  <- config.feature"}
    text = "\n".join(f"{name:28s} (batch, {tokens}, {width}){marks.get(name, '')}" for name, width in widths.items())
    width = config.feature_width(config.feature)
    return Answer(text, {"features": list(widths), "default": config.feature, "tokens": tokens, "width": width})


def _streamed_classes(stream: Any, data: str, split: str, label_column: str | None) -> list[str] | None:
    """As `_names_from_training`, of a stream: from the splits' declared classes; `None` if it declares none."""
    from aselect_hf.data.sources import load_images

    def names(features: Any) -> list[str]:
        return list(getattr((features or {}).get(label_column or "label"), "names", []))

    own, training = names(stream.features), []
    if own and split != TRAIN_SPLIT:
        with contextlib.suppress(ValueError):  # there is no such split
            training = names(load_images(data, TRAIN_SPLIT, streaming=True).features)
    return [*training, *(name for name in own if name not in set(training))] or None


def _names_from_training(images: ImageData, data: str, image_column: str, label_column: str | None) -> list[str]:
    """Classes of the training split, if there is one, then classes that only `images` have."""
    from aselect_cli.inputs import read_images

    try:
        training = read_images(data, TRAIN_SPLIT, image_column, label_column).class_names
    except ValueError:
        return images.class_names
    return [*training, *(name for name in images.class_names if name not in set(training))]
