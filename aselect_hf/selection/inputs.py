"""What every strategy is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aselect_hf.data import ImageData
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel

DEFAULT_BATCH_SIZE = 64


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
        batch_size: forward passes run at once; `None` for what the strategy finds best.
        cache_dir: where features are kept; `None` for the default.
        progress: show a progress bar.
    """

    model: ASelectDiTModel
    images: ImageData
    validation: ImageData | None
    feature: str
    timesteps: list[int]
    seed: int = 0
    batch_size: int | None = None
    cache_dir: str | Path | None = None
    progress: bool = True

    @property
    def fixed_batch_size(self) -> int:
        """`batch_size`, or 64."""
        return self.batch_size or DEFAULT_BATCH_SIZE

    @property
    def latents_dir(self) -> Path | None:
        """Where VAE latents are kept, as by `pooled_features`; `None` for the default."""
        return Path(self.cache_dir) / "latents" if self.cache_dir else None
