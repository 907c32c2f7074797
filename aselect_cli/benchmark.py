"""`aselect benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aselect_cli import options as opt
from aselect_cli.command import Answer


def benchmark(
    model: opt.Model,
    *,
    feature: Annotated[
        str | None, typer.Option(help="Feature, as blocks.4.query (default: the output of the middle block).")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    pixels: Annotated[bool, typer.Option(help="Also measure from pixels, if the model has a VAE.")] = True,
    rounds: Annotated[int, typer.Option(help="Maximum number of runs of each contender per batch size.")] = 10,
    max_seconds: Annotated[
        float, typer.Option(help="Time per batch size, in seconds; a batch size that needs more is skipped.")
    ] = 20.0,
    device: opt.Device = None,
    dtype: opt.DType = "float32",
    output: Annotated[Path, typer.Option(help="JSON file to write; the table goes beside it, as .md.")] = Path(
        "benchmark.json"
    ),
) -> Answer:
    """Measure speed and memory of your model, as it is and with a fixed timestep, against diffusers and a plain ViT."""
    from aselect_cli.inputs import load_backbone
    from aselect_hf.files import check_writable, read_json
    from aselect_hf.selection.candidates import read_integers
    from aselect_hf.speed import benchmark_model

    check_writable(output)
    sizes = read_integers(batch_sizes, "batch_sizes")
    backbone = load_backbone(model, device, dtype)
    result = benchmark_model(
        backbone,
        name=Path(model).name,
        feature=feature,
        batch_sizes=sizes,
        pixels=pixels,
        rounds=rounds,
        max_seconds=max_seconds,
    )
    result.save(output)
    written = [str(output), str(output.with_suffix(".md"))]
    return Answer(f"{result.markdown()}\nwrote {', '.join(written)}", read_json(output) | {"written": written})
