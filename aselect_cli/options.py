"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aselect_cli.rules import complete_rule

DTYPES = ("float32", "bfloat16", "float16")
ON_ERROR = ("stop", "skip")

Model = Annotated[str, typer.Argument(help="Checkpoint: a folder, a Hub id, or sample (ships with the package).")]
Data = Annotated[str, typer.Argument(help="Images: a folder, a Hub data set, or sample (ships with the package).")]
Feature = Annotated[str | None, typer.Option(help="Feature, as blocks.4.query (default: the model's own).")]
FeatureOrAuto = Annotated[
    str | None,
    typer.Option(help="Feature, as blocks.4.query; auto also chooses the feature (default: the model's own)."),
]
Method = Annotated[
    str, typer.Option(help="Rule that chooses the timestep; the rules are listed below.", autocompletion=complete_rule)
]
Timesteps = Annotated[
    str | None, typer.Option(help="Candidates as 0,50,100, or how many of the default ones (default: 20; gate: 16).")
]
NumImages = Annotated[int | None, typer.Option(help="Number of random images for a rule (default: the rule's own).")]
PoolSize = Annotated[
    int, typer.Option(help="Average tokens over an N x N grid of cells (1: one mean over all tokens).")
]
MaxSamples = Annotated[int | None, typer.Option(help="Use a random sample of at most this many images (default: all).")]
Streaming = Annotated[
    bool, typer.Option("--streaming", help="Read rows when they are needed, without downloading or indexing first.")
]
Seed = Annotated[int, typer.Option(help="Seed of the image sample and of the noise.")]
AutoBatchSize = Annotated[
    int | None,
    typer.Option(help="Forward passes per batch (default: 64; hfr on an accelerator: 256, halved until they fit)."),
]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu (default: the best available).")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.", autocompletion=lambda: list(DTYPES))]
OnError = Annotated[
    str, typer.Option(help="What to do with an unreadable image: stop or skip.", autocompletion=lambda: list(ON_ERROR))
]
ImageColumn = Annotated[str, typer.Option(help="Column that holds the images.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column that holds the labels (default: label, if it exists).")]
OutputDir = Annotated[Path, typer.Option(help="Folder to write to.")]
Report = Annotated[
    Path | None,
    typer.Option(
        help="Also write this HTML file: curves, pictures, tables, cost, protocol, in one file (default: none)."
    ),
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Folder that keeps features between runs (default: in the cache of the Hub client).")
]
