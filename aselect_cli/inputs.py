"""The model and the images of a command; import it inside commands, because it imports torch."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from transformers.utils import logging

from aselect_cli.options import DTYPES
from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.images import undecoded_stream
from aselect_hf.data.processes import join_processes, launched
from aselect_hf.data.sources import load_images
from aselect_hf.data.stream_reader import StreamReader
from aselect_hf.versions import slow_precision

STREAMED_IMAGES = 1000
"""Images that a rule reads from a stream by default, and size of the buffer that shuffles it."""


def load_backbone(model: str, device: str | None, dtype: str) -> Any:
    """The model on its device, in evaluation mode.

    Raises:
        ValueError: `dtype` is unknown, and the errors of `load_model`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    logging.disable_progress_bar()
    place = _place(device)
    if warning := slow_precision(place, dtype, "--dtype float32"):
        print(f"warning: {warning}", file=sys.stderr)
    return load_model(model, dtype=getattr(torch, dtype)).to(place).eval()


def _place(device: str | None) -> torch.device:
    """The device of this process; each process of a launcher has its own of the kind that is asked for."""
    if any(name.startswith("ACCELERATE_") for name in os.environ):
        _warn_of_missing_processes()
    if not launched():
        return torch.device(device or best_device())
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return join_processes().device


def _warn_of_missing_processes() -> None:
    """Say if `accelerate launch` started fewer processes than it was asked for; the result is the same, only slower."""
    from aselect_hf.training.processes import check_num_processes

    try:
        check_num_processes(join_processes())
    except ValueError as error:
        print(f"warning: {error}", file=sys.stderr)


def best_device() -> str:
    """The fastest kind of device that is available."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def read_images(data: str, split: str, image_column: str, label_column: str | None) -> ImageData:
    """A split of the images."""
    dataset = load_images(data, split)
    return ImageData.of(dataset, image_column=image_column, label_column=label_column, name=f"{data} ({split})")


def read_beginning(
    data: str, split: str, image_column: str, label_column: str | None, count: int | None, seed: int, on_error: str
) -> ImageData:
    """The first images of a stream, in the order of a shuffle buffer, in memory.

    Args:
        count: number of images (default: `STREAMED_IMAGES`).
    """
    stream = undecoded_stream(load_images(data, split, streaming=True), on_error)
    shuffled = stream.shuffle(seed=seed, buffer_size=STREAMED_IMAGES)
    reader = StreamReader(shuffled, f"{data} ({split})", image_column, label_column)
    return reader.beginning(count or STREAMED_IMAGES)
