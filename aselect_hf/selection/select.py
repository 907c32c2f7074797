"""`select_timestep`: check the request, run a rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection.candidates import candidate_timesteps
from aselect_hf.selection.fusing import check_fusing
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.request import automatic_method, check_request, report_unused_labels, task_of
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.selection.rule import AUTO, WITH_LABELS, Rule
from aselect_hf.selection.rule_table import rule_list
from aselect_hf.selection.rules import RULES
from aselect_hf.selection.samples import refuse_copies, sample_for
from aselect_hf.versions import installed_versions

logger = logging.get_logger(__name__)


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
    num_timesteps_to_fuse: int = 1,
    batch_size: int | None = None,
    on_error: str = "stop",
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> TimestepSelection:
    """Choose the timestep at which a DiT's features are most informative.

    Args:
        images: a pixel tensor `(batch, channels, height, width)` in [-1, 1], a list of PIL images or paths, a
            `datasets.Dataset`, a folder of images, a Hub id, a DataLoader, or an `ImageData`. Labels are classes or
            segmentation masks (a column of images named `mask`, `annotation`, `segmentation` or `label`; for other
            names see `ImageData.of`). `"gate"` needs classes.
        method: one of the rules below, or `"auto"`, see `automatic_method`.
        feature: `blocks.<i>.<kind>` (default: `model.config.feature`). `"auto"` chooses the feature together with the
            timestep, if the rule can; that takes labels.
        timesteps: candidates, or how many of the default ones (default: 20, dense at low noise; `"gate"`: 16, even in
            log-SNR).
        num_images: size of the random sample (default: the rule's own). For rules that need labels, images without a
            label are left out and each class keeps its share. Rules that need all labels ignore it.
        seed: seed of the sample and of every other random draw.
        validation: images with labels or masks on which `"grid"` compares timesteps (default: a fifth of `images`).
        num_timesteps_to_fuse: timesteps to choose together at most, for heads that read several (`"logme"`, `"ridge"`,
            `"knn"`), see `fusing.fuse`.
        batch_size: forward passes per batch (default: 64; `"hfr"` on an accelerator: 256, halved until they fit).
        on_error: `"stop"` at an unreadable image, or `"skip"` it.
        cache_dir: folder for VAE latents and for the features of `"grid"`.
        options: options of the rule, see `docs/rules.md`.

    Rules:
        {rules}

    Returns:
        A `TimestepSelection`; `.apply(model)` writes it into the model's config. Scores that differ only by rounding
        count as equal, and the cleanest of equal timesteps is taken; see `TimestepSelection.tied` and `doubts`.

    Raises:
        ValueError: an argument is wrong, or all images are the same. The message names the argument, what was given
            and what is accepted.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if model.config.fixed_timestep:
        raise model.config.fixed_error("selecting a timestep")
    check_request(method, options, feature)
    if method == AUTO:
        images = ImageData.of(images, num_images or RULES[WITH_LABELS].num_images)
        method = automatic_method(images)
        report_unused_labels(images, method)
        check_request(method, options, feature)
    rule = RULES[method]
    options = rule.renamed(options)
    candidates = candidate_timesteps(model.noise_schedule, timesteps, rule.even_in_log_snr)
    check_fusing(method, num_timesteps_to_fuse, len(candidates))
    if rule.num_images is None:
        num_images = None
    elif num_images is None:
        num_images = rule.num_images
    data = ImageData.of(images, num_images)
    held_out = ImageData.of(validation) if validation is not None else None
    data, held_out = sample_for(task_of(rule, data, options), data, held_out, num_images, seed, on_error)
    if rule.runs:
        refuse_copies(data)
    name = feature or str(model.config.feature)
    if name != AUTO:
        name = str(model.config.resolve_feature(name))
    inputs = SelectionInputs(model, data, held_out, name, candidates, seed, batch_size, cache_dir, progress)
    inputs.num_timesteps_to_fuse = num_timesteps_to_fuse
    selection = _run(rule, inputs, options)
    selection.model = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    selection.versions = installed_versions()
    if num_timesteps_to_fuse > 1 and len(selection.fused_timesteps or []) < num_timesteps_to_fuse:
        logger.warning("%s", selection.fusion)
    for doubt in selection.doubts():
        logger.warning("%s", doubt)
    return selection


select_timestep.__doc__ = (select_timestep.__doc__ or "").replace("{rules}", rule_list(indent=8))


def _run(rule: Rule, inputs: SelectionInputs, options: dict[str, Any]) -> TimestepSelection:
    """Run a rule with the model in evaluation mode."""
    training = inputs.model.training
    inputs.model.eval()
    try:
        with torch.inference_mode():
            return rule.select(inputs, **options)
    finally:
        inputs.model.train(training)
