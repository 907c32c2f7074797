"""`select_timestep`: check the request, run a strategy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from aselect_hf.data.classes import has_classes, share_classes, share_mask_classes
from aselect_hf.data.image_data import NOT_GIVEN, ImageData
from aselect_hf.modeling.noise_schedule import NoiseSchedule
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection import fixed, gate, grid, hfr
from aselect_hf.selection.criterion import (
    AUTO,
    CRITERIA,
    LABELLED,
    LEAST_PER_CLASS,
    NUM_LABELLED,
    NUM_UNLABELLED,
    select_shortlist,
)
from aselect_hf.selection.grid import resolve_task
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.versions import installed_versions

logger = logging.get_logger(__name__)

STRATEGIES: dict[str, Callable[..., TimestepSelection]] = {
    "hfr": hfr.select,
    "gate": gate.select,
    "grid": grid.select,
    "fixed": fixed.select,
    **CRITERIA,
    "shortlist": select_shortlist,
}
METHODS = (AUTO, *STRATEGIES)
FEW_LABELS, NO_LABELS = "logme", "consensus"
"""What `method="auto"` means with labels and without: as the pairs of `docs/evidence.md` say."""
TRAIN_ON_ALL = ("gate", "grid")
"""Strategies that learn from labels and use every image they are given."""
CHOOSE_FEATURES = (*CRITERIA, "shortlist")
"""Strategies whose scores can be compared between features, so that they can choose one."""
NUM_IMAGES = {name: NUM_LABELLED if name in (*LABELLED, "shortlist") else NUM_UNLABELLED for name in CHOOSE_FEATURES}
DEFAULT_NUM_IMAGES = 64
"""Images that a strategy looks at by default; of those not in `NUM_IMAGES`."""
NUM_TIMESTEPS = 20
NUM_GATE_TIMESTEPS = 16
NOISIEST = 0.95  # of the schedule
CLEANEST_LOG_SNR = 10.0


def default_timesteps(schedule: NoiseSchedule, num: int = NUM_TIMESTEPS) -> list[int]:
    """Candidates dense at low noise: quadratic from 0 to 0.95 of the schedule (ours)."""
    if num < 1:
        raise ValueError(f"the number of timesteps must be at least 1, got {num}")
    last = NOISIEST * (schedule.num_train_timesteps - 1)
    return sorted({round(last * (index / max(num - 1, 1)) ** 2) for index in range(num)})


def gate_timesteps(schedule: NoiseSchedule, num: int = NUM_GATE_TIMESTEPS) -> list[int]:
    """Candidates of the gate: `num` different ones, evenly in log-SNR from t = 0 to 0.95 of the schedule (ours).

    Where t = 0 is cleaner than a log-SNR of 10 (flow matching: exactly clean), the others are spread from there.
    """
    last = round(NOISIEST * (schedule.num_train_timesteps - 1))
    if not 1 <= num <= last + 1:
        raise ValueError(f"the number of timesteps must lie in 1..{last + 1}, got {num}")
    spread = np.linspace(min(schedule.log_snr(0), CLEANEST_LOG_SNR), schedule.log_snr(last), num)
    steps = [0]
    for index, log_snr in enumerate(spread[1:].tolist(), start=1):
        highest = last - (num - 1 - index)  # so that the rest still finds places
        steps.append(min(max(round(schedule.timestep_from_log_snr(log_snr)), steps[-1] + 1), highest))
    return steps


def automatic_method(data: ImageData) -> str:
    """The method that `"auto"` stands for: `"logme"` with masks or labels of 2 classes, else `"consensus"`."""
    return FEW_LABELS if data.masks is not None or has_classes(data.labels) else NO_LABELS


def check_request(method: str, options: Iterable[str] = (), feature: str | None = None) -> None:
    """Refuse an unknown method, options that it does not have, and `feature="auto"` where it cannot choose one.

    `"auto"` has the options of the two methods that it may stand for.

    Raises:
        ValueError: the message names the methods that have the option, or that choose a feature.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; accepted are {', '.join(METHODS)}")
    accepted = _options(FEW_LABELS if method == AUTO else method)  # those of NO_LABELS are among them
    for option in sorted(set(options) - set(accepted)):
        owners = methods_with(option)
        hint = f"; {option} is an option of {', '.join(owners)}" if owners else ""
        raise ValueError(f"method {method!r} has no option {option}; accepted are {', '.join(accepted)}{hint}")
    if feature == AUTO and method not in (AUTO, *CHOOSE_FEATURES):
        raise ValueError(
            f"feature='auto' needs scores that can be compared between features, which those of {method!r} cannot; "
            f"methods that choose a feature are {', '.join(CHOOSE_FEATURES)}"
        )


def methods_with(option: str) -> list[str]:
    """Names of the methods that have an option of this name."""
    return [method for method in STRATEGIES if option in _options(method)]


def report_unused_labels(data: ImageData, method: str) -> None:
    """Say why the automatic method is one without labels, where the images may have been meant to have some."""
    if data.masks is None and not has_classes(data.labels) and (data.labels is not None or data.no_labels != NOT_GIVEN):
        why = data.no_labels if data.labels is None else f"no 2 classes have 2 images each ({data.describe_classes()})"
        logger.warning_once(f"no labels are used, so the rule is {method}: {why}")


def task_of(method: str, data: ImageData, options: Mapping[str, Any]) -> str | None:
    """What a method learns from: `"classification"` (labels), `"segmentation"` (masks), or `None` (images alone)."""
    if method == "gate":
        return "classification"
    if method == "shortlist":
        defaults = inspect.signature(select_shortlist).parameters
        rules = {options.get(name, defaults[name].default) for name in ("first", "second")}
        return resolve_task(data, None) if rules & {*LABELLED} else None
    return resolve_task(data, options.get("task")) if method in (*LABELLED, "grid") else None


def sample_for(
    task: str | None, data: ImageData, held_out: ImageData | None, num_images: int | None, seed: int, on_error: str
) -> tuple[ImageData, ImageData | None]:
    """Random images for a task, and those held out: with labels or masks of the same classes where it needs them."""
    splits = {"training": data} | ({"validation": held_out} if held_out is not None else {})
    if task == "classification" and all(each.labels is not None for each in splits.values()):
        splits = share_classes(splits)
    per_class = LEAST_PER_CLASS if task == "classification" else 0
    splits["training"] = splits["training"].sample(num_images, seed, per_class=per_class)
    splits = {name: each.readable(on_error) for name, each in splits.items()}
    if task == "segmentation" and all(each.masks is not None for each in splits.values()):
        splits = share_mask_classes(splits)
    return splits["training"], splits.get("validation")


def _options(method: str) -> list[str]:
    parameters = inspect.signature(STRATEGIES[method]).parameters
    return [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]


def refuse_copies(data: ImageData) -> None:
    """Refuse several images of which all are the same: they cannot tell one timestep from another.

    Raises:
        ValueError: they are; decoding stops at the first that differs.
    """
    if len(data) < 2:
        return
    first = data.decode(0)
    equal = torch.equal if isinstance(first, torch.Tensor) else np.array_equal
    if all(equal(first, data.decode(index)) for index in range(1, len(data))):
        raise ValueError(
            f"nothing to choose: all {len(data)} images of {data.name} are the same; "
            "give different images, or a timestep by method 'fixed'"
        )


def select_timestep(
    model: NoisyBackbone,
    images: Any,
    *,
    method: str = AUTO,
    feature: str | None = None,
    timesteps: Sequence[int] | int | None = None,
    num_images: int | None = None,
    seed: int = 0,
    validation: Any = None,
    batch_size: int | None = None,
    on_error: str = "stop",
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> TimestepSelection:
    """Choose the timestep at which a DiT's features say most.

    Args:
        model: the backbone.
        images: a pixel tensor `(batch, channels, height, width)` in [-1, 1], a list of PIL images or paths, a
            `datasets.Dataset`, a folder of images, a Hub id, a DataLoader, or an `ImageData`. `"gate"` needs labels,
            `"grid"` labels or segmentation masks (a column `mask`, `annotation`, `segmentation` or `label` of images;
            others: see `ImageData.of`).
        method: `"auto"`, see `automatic_method`; or a name in `STRATEGIES`: `"hfr"` (no labels), `"gate"` (learned
            weights over timesteps), `"grid"` (a probe at every timestep), `"fixed"`; criteria without labels
            `"consensus"`, `"rankme"`, `"alpha_req"`, `"lidar"`, `"retrieval"`, `"snr"`, with a few `"ridge"`, `"knn"`,
            `"logme"`, see `aselect_hf.selection.criteria`; `"shortlist"`: one of the former, then one of the latter.
        feature: `blocks.<i>.<kind>`; default `model.config.feature`; `"auto"`: chosen together with the timestep, by
            the criteria and `"shortlist"` only.
        timesteps: candidates, or how many of the default ones (dense at low noise; `"gate"`: even in log-SNR).
        num_images: random images to use, all where there are no more; default 64, 256 for criteria without labels and
            500 for those with, of every class its share. `"gate"` and `"grid"` always use all. Images without a label
            are left out where labels are needed.
        seed: of the sample of images and of every other random draw.
        validation: images with labels or masks on which `"grid"` compares; default a fifth of `images`.
        batch_size: forward passes run at once; default 64, or for `"hfr"` on an accelerator as many as fit its memory.
        on_error: `"stop"` at an unreadable image, or `"skip"` it.
        cache_dir: folder for VAE latents and for the features of `"grid"`.
        progress: show a progress bar.
        options: of the strategy; see `aselect_hf.selection.hfr.select` (`noise_correction`, `search`, ...),
            `gate.select`, `grid.select` (`task`, `probe`, ...), `fixed.select`,
            `criterion.select_unlabelled`, `select_by_views`, `select_ridge`, `select_knn`, `select_shortlist`.

    Returns:
        A `TimestepSelection`; `.apply(model)` writes it into the model's config. Scores that differ by rounding only
        are equal, and of equal ones the cleanest timestep is taken; see `TimestepSelection.tied` and `doubts`.

    Raises:
        ValueError: an argument is wrong, or all images are the same; the message names the argument, what was given
            and what is accepted.
    """
    check_request(method, options, feature)
    if method == AUTO:
        images = ImageData.of(images, num_images or NUM_LABELLED)
        method = automatic_method(images)
        report_unused_labels(images, method)
        check_request(method, options)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if model.config.fixed_timestep:
        raise model.config.fixed_error("selecting a timestep")
    schedule = model.noise_schedule
    if timesteps is None or isinstance(timesteps, int):
        propose = gate_timesteps if method == "gate" else default_timesteps
        candidates = propose(schedule) if timesteps is None else propose(schedule, timesteps)
    else:
        candidates = sorted({schedule.check_timestep(t, "timesteps") for t in timesteps})
        if not candidates:
            raise ValueError("timesteps must not be empty")
    if method in TRAIN_ON_ALL:
        num_images = None
    elif num_images is None:
        num_images = NUM_IMAGES.get(method, DEFAULT_NUM_IMAGES)
    data = ImageData.of(images, num_images)
    held_out = ImageData.of(validation) if validation is not None else None
    data, held_out = sample_for(task_of(method, data, options), data, held_out, num_images, seed, on_error)
    if method != "fixed":
        refuse_copies(data)
    name = feature or str(model.config.feature)
    if name != AUTO:
        name = str(model.config.resolve_feature(name))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            selection = STRATEGIES[method](
                SelectionInputs(model, data, held_out, name, candidates, seed, batch_size, cache_dir, progress),
                **options,
            )
    finally:
        model.train(training)
    selection.model = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    selection.versions = installed_versions()
    for doubt in selection.doubts():
        logger.warning("%s", doubt)
    return selection
