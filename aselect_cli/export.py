"""`aselect export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from aselect_cli import options as opt
from aselect_cli.command import Answer


def export(
    model: opt.Model,
    output_dir: Annotated[Path, typer.Argument(help="Folder to write; it must not exist or be empty.")],
    *,
    format: Annotated[
        Literal["onnx", "torch-export"], typer.Option(help="ONNX, or a program of torch.export.")
    ] = "onnx",
    uint8: Annotated[
        bool, typer.Option("--uint8", help="The file takes pixels of 0..255 and normalizes them itself.")
    ] = False,
    quantize: Annotated[
        bool, typer.Option("--quantize", help="Also write an ONNX file with 8-bit weights (dynamic quantization).")
    ] = False,
    timestep: Annotated[int | None, typer.Option(help="Timestep to write (default: the model's own).")] = None,
    feature: opt.Feature = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> Answer:
    """Write a model, with its head, as one file for other runtimes; its outputs are checked first."""
    from dataclasses import asdict

    from aselect_hf.conversion.export import export_model

    asked = {"timestep": timestep, "feature": feature, "revision": revision}
    report = export_model(
        model,
        output_dir,
        format=format,
        uint8=uint8,
        quantize=quantize,
        **{name: value for name, value in asked.items() if value is not None},
    )
    text = f"wrote {output_dir / report.file}: outputs {', '.join(report.outputs)}, relative difference to the model "
    text += f"{report.difference:.1g}"
    if report.quantized_difference is not None:
        text += f" ({report.quantized_difference:.1g} with 8-bit weights)"
    return Answer(text, asdict(report))
