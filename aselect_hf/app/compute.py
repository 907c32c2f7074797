"""Everything that runs a model: functions of a model on show and of plain inputs, so that a GPU can be borrowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from aselect_hf.app.checkpoint import Checkpoint
from aselect_hf.data.images import image_pixels
from aselect_hf.pictures import PictureSweep, attention_maps, sweep_picture
from aselect_hf.pictures.sweep import picture_latents

Progress = Callable[[float], None]
BATCH_SIZE = 16


def no_progress(share: float) -> None:
    """Show nothing."""


def sweep(
    shown: Checkpoint, picture: Image.Image, features: Sequence[str], progress: Progress = no_progress
) -> PictureSweep:
    """All timesteps of the model's slider."""
    whole = shown.task.whole_image
    return sweep_picture(shown.backbone, picture, shown.timesteps, features, whole_image=whole, progress=progress)


@torch.inference_mode()
def shares_over_t(shown: Checkpoint, picture: Image.Image, progress: Progress = no_progress) -> torch.Tensor:
    """The head's probabilities at every timestep: `(timesteps, classes)`; of masks, `(timesteps, 1)`, their mean."""
    model = shown.model
    names = [str(shown.backbone.config.resolve_feature(name)) for name in model.features]
    found = sweep(shown, picture, names, progress)
    tokens = torch.stack([found.features[name] for name in names], dim=-2).to(shown.backbone.device)
    tokens = tokens.to(next(model.parameters()).dtype)  # (timesteps, tokens, features, width)
    head = getattr(model, shown.task.head)
    if shown.task.dense:
        return head(tokens, found.grid_size).float().softmax(1).amax(1).flatten(1).mean(1, keepdim=True).cpu()
    return head(tokens).float().softmax(-1).cpu()


@torch.inference_mode()
def logits(shown: Checkpoint, picture: Image.Image, progress: Progress = no_progress) -> torch.Tensor:
    """The head's answer: `(1, classes)`, or `(1, classes, height, width)` of a mask."""
    latents = picture_latents(shown.backbone, picture, whole_image=shown.task.whole_image)
    return shown.model(latents=latents).logits.float().cpu()


def attention(
    shown: Checkpoint, picture: Image.Image, timestep: int, block: int, progress: Progress = no_progress
) -> torch.Tensor:
    """`attention_maps` of one block."""
    return attention_maps(shown.backbone, picture, timestep, block)


def pooled(
    shown: Checkpoint,
    pictures: Sequence[Image.Image],
    feature: str,
    timestep: int | None,
    progress: Progress = no_progress,
) -> torch.Tensor:
    """Token means `(pictures, width)` float32; `timestep` is `None` for the model's own."""
    read, parts = image_pixels(shown.backbone.config), []
    for start in range(0, len(pictures), BATCH_SIZE):
        pixels = read(list(pictures[start : start + BATCH_SIZE])).to(shown.backbone.device)
        found = shown.backbone.extract_features(pixels, feature=feature, timestep=timestep, output_format="pooled")
        parts.append(found[feature][:, 0].float().cpu())
        progress(min(1.0, (start + BATCH_SIZE) / len(pictures)))
    return torch.cat(parts)


COMPUTATIONS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (sweep, shares_over_t, logits, attention, pooled)
}
