"""`select_timestep`: check the request, run a strategy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from aselect_hf.data import ImageData
from aselect_hf.modeling.features import parse_feature
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.modeling.noise_schedule import NoiseSchedule
from aselect_hf.selection import fixed, grid, hfr
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.versions import installed_versions

STRATEGIES: dict[str, Callable[..., TimestepSelection]] = {
    "hfr": hfr.select,
    "grid": grid.select,
    "fixed": fixed.select,
}
NUM_TIMESTEPS = 20


def default_timesteps(schedule: NoiseSchedule, num: int = NUM_TIMESTEPS) -> list[int]:
    """Candidates dense at low noise: quadratic from 0 to 0.95 of the schedule (ours)."""
    if num < 1:
        raise ValueError(f"the number of timesteps must be at least 1, got {num}")
    last = 0.95 * (schedule.num_train_timesteps - 1)
    return sorted({round(last * (index / max(num - 1, 1)) ** 2) for index in range(num)})


def select_timestep(
    model: ASelectDiTModel,
    images: Any,
    *,
    method: str = "hfr",
    feature: str | None = None,
    timesteps: Sequence[int] | int | None = None,
    num_images: int | None = 64,
    seed: int = 0,
    validation: Any = None,
    batch_size: int = 64,
    on_error: str = "stop",
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> TimestepSelection:
    """Choose the timestep at which a DiT's features say most.

    Args:
        model: the backbone.
        images: a pixel tensor `(batch, channels, height, width)` in [-1, 1], a list of PIL images or paths, a
            `datasets.Dataset`, a folder of images, a Hub id, a DataLoader, or an `ImageData`. With labels for `"grid"`.
        method: a name in `STRATEGIES`: `"hfr"` (no labels), `"grid"` (a probe at every timestep), `"fixed"`.
        feature: `blocks.<i>.<kind>`; default `model.config.feature`.
        timesteps: candidates, or how many of the default ones (dense at low noise).
        num_images: random images to use; `None` for all. `"grid"` always uses all.
        seed: of the sample of images and of the noise.
        validation: labelled images on which `"grid"` compares; default a fifth of `images`.
        batch_size: forward passes run at once.
        on_error: `"stop"` at an unreadable image, or `"skip"` it.
        cache_dir: folder for the pooled features of `"grid"`.
        progress: show a progress bar.
        options: of the strategy; see `aselect_hf.selection.hfr.select` (`noise_correction`, `cutoff`, ...),
            `grid.select`, `fixed.select`.

    Returns:
        A `TimestepSelection`; `.apply(model)` writes it into the model's config.

    Raises:
        ValueError: an argument is wrong; the message names it, what was given and what is accepted.
    """
    if method not in STRATEGIES:
        raise ValueError(f"method {method!r} is unknown; accepted are {', '.join(STRATEGIES)}")
    strategy = STRATEGIES[method]
    accepted = [name for name, p in inspect.signature(strategy).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if unknown := sorted(set(options) - set(accepted)):
        raise ValueError(f"method {method!r} has no option {', '.join(unknown)}; accepted are {', '.join(accepted)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if model.config.fixed_timestep:
        raise model.config.fixed_error("selecting a timestep")
    schedule = model.noise_schedule
    if timesteps is None or isinstance(timesteps, int):
        candidates = default_timesteps(schedule, timesteps or NUM_TIMESTEPS)
    else:
        candidates = sorted({schedule.check_timestep(t, "timesteps") for t in timesteps})
        if not candidates:
            raise ValueError("timesteps must not be empty")
    if method == "grid":
        num_images = None
    data = ImageData.of(images, num_images).sample(num_images, seed).readable(on_error)
    held_out = ImageData.of(validation).readable(on_error) if validation is not None else None
    name = str(parse_feature(feature or str(model.config.feature), model.config.num_hidden_layers))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            selection = strategy(
                SelectionInputs(model, data, held_out, name, candidates, seed, batch_size, cache_dir, progress),
                **options,
            )
    finally:
        model.train(training)
    selection.model = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    selection.versions = installed_versions()
    return selection
