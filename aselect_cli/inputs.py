"""The model and the images of a command; import it inside commands, because it imports torch."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers.utils import logging

from aselect_cli.options import DTYPES
from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from aselect_hf.versions import slow_precision


def load_backbone(model: str, device: str | None, dtype: str) -> Any:
    """The model on its device, in evaluation mode.

    Raises:
        ValueError: `dtype` is unknown, and the errors of `load_model`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    logging.disable_progress_bar()
    place = torch.device(device or best_device())
    if warning := slow_precision(place, dtype, "--dtype float32"):
        print(f"warning: {warning}", file=sys.stderr)
    return load_model(model, dtype=getattr(torch, dtype)).to(place).eval()


def best_device() -> str:
    """The fastest kind of device that is available."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def read_images(data: str, split: str, image_column: str, label_column: str | None) -> ImageData:
    """A split of the images."""
    dataset = load_images(data, split)
    return ImageData.of(dataset, image_column=image_column, label_column=label_column, name=f"{data} ({split})")
