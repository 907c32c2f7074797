"""Exhaustive grid search: a probe of images or tokens at every timestep, compared on validation images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
from sklearn.metrics import accuracy_score
from tqdm.auto import tqdm

from aselect_hf.data.feature_cache import CachedFeatures, pooled_features, token_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.processes import processes
from aselect_hf.data.splits import split_train_validation
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.probe import fit_in_parallel, fit_probe
from aselect_hf.selection.result import SelectionCost, TimestepSelection
from aselect_hf.selection.rule import rule
from aselect_hf.selection.samples import check_truth, resolve_task
from aselect_hf.selection.streamed_ridge import score_streamed_ridge
from aselect_hf.selection.ties import best_of
from aselect_hf.selection.tokens import choose_tokens
from aselect_hf.selection.uncertainty import binomial_error, iou_counts, iou_error, mean_iou_of
from aselect_hf.tasks import Task

HELD_OUT = 0.2


@dataclass
class Samples:
    """The samples of a probe: images with their pooled features and labels, or tokens with their classes.

    Args:
        features: one row per sample, at every timestep.
        labels, images: `(samples,)`, class and image of each sample.
    """

    features: CachedFeatures
    labels: np.ndarray
    images: np.ndarray


@rule(
    "grid",
    labels="all",
    explanation="Trains a probe on all labeled images at every timestep and takes the best on validation images.",
    num_images=None,
    audited=False,
)
def select_grid(
    inputs: SelectionInputs,
    *,
    task: str | None = None,
    probe: Literal["linear", "knn", "ridge"] = "linear",
    pool_size: int = 1,
    max_tokens: int = 20_000,
) -> TimestepSelection:
    """Train and validate a probe on the feature at every candidate timestep and take the best.

    In classification a sample is an image with its pooled feature. The score is accuracy with its binomial standard
    error. In segmentation a sample is a token, labeled with the most common class of its patch's pixels; tokens of
    ignored pixels are left out. The score is the mean IoU of validation tokens over the classes that occur in truth or
    predictions. Its standard error comes from a bootstrap over validation images, with the same resamples at every
    timestep.

    Args:
        task: "classification" or "segmentation" (default: segmentation if the images have masks).
        probe: "linear" for logistic regression, "knn" for nearest neighbors, or "ridge" for ridge regression, which
            keeps no features of a large set (default: linear).
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
        max_tokens: Maximum number of random tokens to train on, and to validate on, in segmentation (default: 20000).

    Raises:
        ValueError: the images have no labels or masks.
    """
    resolved = resolve_task(inputs.images, task)
    options: dict[str, Any] = {"task": resolved.name, "probe": probe}
    train_data, validation_data = split(inputs, resolved)
    streamed = None
    if not resolved.dense:
        options["pool_size"] = pool_size
        if probe == "ridge":
            streamed = score_streamed_ridge(inputs, train_data, validation_data, pool_size)
    if streamed is not None:
        scores, cost = streamed
        errors = [binomial_error(score, len(validation_data)) for score in scores]
    else:
        if resolved.dense:
            train, validation = (token_samples(inputs, data, max_tokens) for data in (train_data, validation_data))
            options |= {"train_tokens": len(train.labels), "validation_tokens": len(validation.labels)}
        else:
            train, validation = (image_samples(inputs, data, pool_size) for data in (train_data, validation_data))
        scores, errors, cost = _fit_probes(inputs, train, validation, probe, resolved)
    return TimestepSelection(
        method="grid",
        feature=inputs.feature,
        timestep=inputs.timesteps[best_of(scores)],
        timesteps=inputs.timesteps,
        scores=scores,
        standard_errors=errors,
        cost=cost,
        schedule=inputs.model.noise_schedule.to_dict(),
        score_name=resolved.score_name,
        options=options | {"validation_images": len(validation_data)},
        num_images=len(train_data),
        seed=inputs.seed,
    )


def _fit_probes(
    inputs: SelectionInputs, train: Samples, validation: Samples, probe: str, task: Task
) -> tuple[list[float], list[float], SelectionCost]:
    """Scores, standard errors and cost of a probe at every timestep."""
    for values in chain(train.features.values, validation.features.values):
        inputs.check_finite(values)
    started = time.perf_counter()
    score = partial(_score, train, validation, probe=probe, task=task, seed=inputs.seed)
    fits = [partial(score, column) for column in range(len(inputs.timesteps))]
    bar = partial(tqdm, desc="probes", unit="timestep", disable=not (inputs.progress and processes().is_main))
    run = partial(fit_in_parallel, num_rows=len(train.labels))
    scores, errors = zip(*processes().spread(fits, lambda own: bar(run(own))), strict=True)
    cost = SelectionCost(
        forward_passes=train.features.forward_passes + validation.features.forward_passes,
        seconds=time.perf_counter() - started + train.features.seconds + validation.features.seconds,
        flops=train.features.flops + validation.features.flops,
        processes=processes().count,
    )
    return list(scores), list(errors), cost


def split(inputs: SelectionInputs, task: Task) -> tuple[ImageData, ImageData]:
    """Training and validation images with labels or masks; if none are given for validation, a fifth is held out."""
    images, validation = inputs.images, inputs.validation
    for data in filter(None, (images, validation)):
        check_truth(data, task, "grid trains probes and needs")
    if validation is not None:
        return images, validation
    return split_train_validation(images, HELD_OUT, inputs.seed)


def image_samples(inputs: SelectionInputs, data: ImageData, pool_size: int) -> Samples:
    """One sample per image."""
    features = _features(pooled_features, inputs, data, pool_size=pool_size)
    return Samples(features, np.asarray(data.labels), np.arange(len(data)))


def token_samples(inputs: SelectionInputs, data: ImageData, max_tokens: int) -> Samples:
    """At most `max_tokens` random tokens that are not ignored."""
    chosen = choose_tokens(inputs, data, max_tokens)
    features = _features(token_features, inputs, chosen.data, tokens=chosen.tokens)
    return Samples(features, chosen.labels, chosen.images)


def _features(
    compute: Callable[..., CachedFeatures], inputs: SelectionInputs, data: ImageData, **options: Any
) -> CachedFeatures:
    options |= {"batch_size": inputs.fixed_batch_size, "cache_dir": inputs.cache_dir, "progress": inputs.progress}
    return compute(inputs.model, data, inputs.timesteps, inputs.feature, **options)


def _score(train: Samples, validation: Samples, column: int, probe: str, task: Task, seed: int) -> tuple[float, float]:
    """Validation score of a probe at one timestep, and its standard error."""
    features, truth = validation.features.values[column], validation.labels
    metric = mean_iou_of if task.dense else accuracy_score
    fitted = fit_probe(train.features.values[column], train.labels, features, truth, kind=probe, metric=metric)
    score = fitted.validation_score
    if not task.dense:
        return score, binomial_error(score, len(truth))
    return score, iou_error(iou_counts(truth, fitted.classifier.predict(features), validation.images), seed)
