"""Exhaustive grid search: a linear probe at every timestep, compared on validation images."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm

from aselect_hf.data import ImageData
from aselect_hf.feature_cache import pooled_features
from aselect_hf.probe import fit_in_parallel, fit_probe
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import SelectionCost, TimestepSelection

HELD_OUT = 0.2


def select(inputs: SelectionInputs, *, probe: str = "linear", pool_size: int = 1) -> TimestepSelection:
    """Train and validate a probe on the pooled feature at every candidate timestep and take the best.

    Args:
        probe: `"linear"` or `"knn"`, see `fit_probe`.
        pool_size: cells per side into which tokens are averaged, see `pooled_features`.

    Raises:
        ValueError: the images have no labels.
    """
    train, validation = split(inputs)
    options: dict[str, Any] = {
        "pool_size": pool_size,
        "batch_size": inputs.batch_size,
        "cache_dir": inputs.cache_dir,
        "progress": inputs.progress,
    }
    train_features = pooled_features(inputs.model, train, inputs.timesteps, inputs.feature, **options)
    validation_features = pooled_features(inputs.model, validation, inputs.timesteps, inputs.feature, **options)
    labels, validation_labels = np.asarray(train.labels), np.asarray(validation.labels)
    started = time.perf_counter()
    fits = fit_in_parallel(
        partial(fit_probe, x, labels, x_validation, validation_labels, kind=probe)
        for x, x_validation in zip(train_features.values, validation_features.values, strict=True)
    )
    bar = tqdm(fits, total=len(inputs.timesteps), desc="probes", unit="timestep", disable=not inputs.progress)
    scores = [fitted.validation_accuracy for fitted in bar]
    seconds = time.perf_counter() - started + train_features.seconds + validation_features.seconds
    best = int(np.argmax(scores))
    return TimestepSelection(
        method="grid",
        feature=inputs.feature,
        timestep=inputs.timesteps[best],
        timesteps=inputs.timesteps,
        scores=scores,
        standard_errors=[(p * (1 - p) / len(validation)) ** 0.5 for p in scores],
        cost=SelectionCost(
            forward_passes=train_features.forward_passes + validation_features.forward_passes,
            seconds=seconds,
            flops=train_features.flops + validation_features.flops,
        ),
        schedule=inputs.model.noise_schedule.to_dict(),
        score_name="validation accuracy",
        options={"probe": probe, "pool_size": pool_size, "validation_images": len(validation)},
        num_images=len(train),
        seed=inputs.seed,
    )


def split(inputs: SelectionInputs) -> tuple[ImageData, ImageData]:
    """Labelled training and validation images; without the latter, a stratified fifth of the former."""
    images, validation = inputs.images, inputs.validation
    for data in (images, validation):
        if data is not None and data.labels is None:
            raise ValueError(f"grid trains probes and needs labels; {data.name} has none")
    if validation is not None:
        return images, validation
    train, held_out = train_test_split(
        np.arange(len(images)), test_size=HELD_OUT, stratify=images.labels, random_state=inputs.seed
    )
    return images.subset(sorted(train)), images.subset(sorted(held_out))
