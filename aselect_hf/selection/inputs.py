"""What every strategy is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aselect_hf.data import ImageData
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel


@dataclass
class SelectionInputs:
    """A checked request for a timestep.

    Args:
        model: the backbone, in eval mode.
        images: the images to choose on, already sampled; with labels or masks where the strategy needs them.
        validation: images with labels or masks for strategies that train on `images`; `None` to hold some of them out.
        feature: resolved name, `blocks.<i>.<kind>`; or `auto`, for strategies that choose it.
        timesteps: candidates, ascending.
        seed: of every random draw.
        batch_size: forward passes run at once.
        cache_dir: where features are kept; `None` for the default.
        progress: show a progress bar.
    """

    model: ASelectDiTModel
    images: ImageData
    validation: ImageData | None
    feature: str
    timesteps: list[int]
    seed: int = 0
    batch_size: int = 64
    cache_dir: str | Path | None = None
    progress: bool = True
