"""`aselect select`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from aselect_cli import options as opt
from aselect_cli.command import Answer, command_line


def select(
    model: opt.Model,
    data: opt.Data,
    *,
    options: dict[str, Any],
    method: opt.Method = "auto",
    feature: opt.FeatureOrAuto = None,
    timesteps: opt.Timesteps = None,
    num_images: opt.NumImages = None,
    num_timesteps_to_fuse: Annotated[
        int,
        typer.Option(help="Timesteps to choose together at most, which heads read side by side (logme, ridge, knn)."),
    ] = 1,
    split: Annotated[str, typer.Option(help="Split to choose on.")] = "train",
    image_column: opt.ImageColumn = "image",
    label_column: opt.LabelColumn = None,
    max_samples: opt.MaxSamples = None,
    streaming: opt.Streaming = False,
    seed: opt.Seed = 0,
    batch_size: opt.AutoBatchSize = None,
    device: opt.Device = None,
    dtype: opt.DType = "float32",
    on_error: opt.OnError = "stop",
    output_dir: opt.OutputDir = Path("runs/select"),
    save_model: Annotated[
        Path | None, typer.Option(help="Folder for a copy of the model with the chosen timestep (default: none).")
    ] = None,
    report: opt.Report = None,
    cache_dir: opt.CacheDir = None,
) -> Answer:
    """Choose a timestep; write `selection.json` and `selection.png`.

    With --streaming the rule sees the first images of the shuffled stream (default: 1000; --max-samples).
    """
    from aselect_cli.inputs import load_backbone, read_beginning, read_images
    from aselect_hf.conversion import save_model as write_model
    from aselect_hf.data.processes import shared_work
    from aselect_hf.files import atomic_directory, atomic_files, check_absent, check_writable, read_json
    from aselect_hf.report import write_report
    from aselect_hf.selection import select_timestep
    from aselect_hf.selection.candidates import read_candidates
    from aselect_hf.selection.fusing import check_fusing
    from aselect_hf.selection.request import check_request
    from aselect_hf.selection.rule import AUTO, WITH_LABELS

    check_request(method, options, feature)
    check_fusing(WITH_LABELS if method == AUTO else method, num_timesteps_to_fuse)
    check_writable(output_dir / "selection.json")
    if report:
        check_writable(report)
    if save_model:
        check_absent(save_model)
    candidates = read_candidates(timesteps)
    backbone = load_backbone(model, device, dtype)
    if streaming:
        images = read_beginning(data, split, image_column, label_column, max_samples, seed, on_error)
    else:
        images = read_images(data, split, image_column, label_column)
        images = images.sample(max_samples, seed, per_class=2).readable(on_error)
    with _room_for_model(save_model, backbone), shared_work() as here:
        selection = select_timestep(
            backbone,
            images,
            method=method,
            feature=feature,
            timesteps=candidates,
            num_images=num_images,
            num_timesteps_to_fuse=num_timesteps_to_fuse,
            seed=seed,
            batch_size=batch_size,
            cache_dir=cache_dir,
            progress=here.is_main,
            **options,
        )
    if not here.is_main:
        return Answer.silent()
    with atomic_files(output_dir) as folder:
        selection.save(folder / "selection.json")
        selection.plot(folder / "selection.png")
    if save_model:
        with atomic_directory(save_model) as folder:
            write_model(selection.apply(backbone), folder)
    if report:
        write_report(report, selection, backbone, images, command=command_line())
    cost = selection.cost
    written = [output_dir / "selection.json", output_dir / "selection.png", *filter(None, [save_model, report])]
    lines = [
        selection.describe(),
        *filter(None, [selection.fusion]),
        f"{cost.forward_passes:,} forward passes, {cost.seconds:.1f} s, {cost.flops / 1e9:,.1f} GFLOP",
        f"wrote {', '.join(map(str, written))}",
    ]
    return Answer("\n".join(lines), read_json(written[0]) | {"written": [str(path) for path in written]})


def _room_for_model(save_model: Path | None, model: Any) -> AbstractContextManager[Any]:
    """Reserve disk space for the model that is written at the end."""
    from aselect_hf.cost import weight_bytes
    from aselect_hf.files import as_path, reserved_space

    if save_model is None:
        return nullcontext()
    return reserved_space(as_path(save_model).parent, weight_bytes(model), "the model's weights")
