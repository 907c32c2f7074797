"""Exhaustive grid search: a probe at every timestep, of images or of tokens, compared on validation images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
from sklearn.metrics import accuracy_score
from tqdm.auto import tqdm

from aselect_hf.data.feature_cache import CachedFeatures, pooled_features, token_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.masks import resize_mask, token_labels
from aselect_hf.data.splits import split_train_validation
from aselect_hf.modeling.image_processing_aselect_dit import IGNORED
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.probe import fit_in_parallel, fit_probe
from aselect_hf.selection.result import SelectionCost, TimestepSelection
from aselect_hf.selection.ties import best_of
from aselect_hf.tasks import CLASSIFICATION, SEGMENTATION, Task, find_task

HELD_OUT = 0.2
RESAMPLES = 500


@dataclass
class Samples:
    """What a probe sees of a data set: an image's pooled feature with its label, or a token with its class.

    Args:
        features: one row a sample, at every timestep.
        labels, images: `(samples,)`, the class, and the image it is of.
    """

    features: CachedFeatures
    labels: np.ndarray
    images: np.ndarray


def select(
    inputs: SelectionInputs,
    *,
    task: str | None = None,
    probe: str = "linear",
    pool_size: int = 1,
    max_tokens: int = 20_000,
) -> TimestepSelection:
    """Train and validate a probe on the feature at every candidate timestep and take the best.

    Classification: a sample is an image, its feature pooled; the score is accuracy, with its binomial standard error.
    Segmentation: a sample is a token, its class the commonest of its patch's pixels (tokens of ignored pixels are left
    out); the score is the mean IoU over validation tokens, averaged over the classes that are there or predicted; its
    standard error is by bootstrap over validation images, the same resamples at every timestep.

    Args:
        task: `"classification"` or `"segmentation"`; default segmentation where the images have masks.
        probe: `"linear"` or `"knn"`, see `fit_probe`.
        pool_size: classification: cells per side into which tokens are averaged, see `pooled_features`.
        max_tokens: segmentation: random training tokens, and validation tokens, to use at most, of all images.

    Raises:
        ValueError: the images have no labels (or masks).
    """
    learned = resolve_task(inputs.images, task)
    options: dict[str, Any] = {"task": learned.name, "probe": probe}
    train_data, validation_data = split(inputs, learned)
    if learned.dense:
        train, validation = (token_samples(inputs, data, max_tokens) for data in (train_data, validation_data))
        options |= {"train_tokens": len(train.labels), "validation_tokens": len(validation.labels)}
    else:
        options["pool_size"] = pool_size
        train, validation = (image_samples(inputs, data, pool_size) for data in (train_data, validation_data))
    for values in (*train.features.values, *validation.features.values):
        inputs.check_finite(values)
    started = time.perf_counter()
    columns = range(len(inputs.timesteps))
    fits = fit_in_parallel(
        partial(_score, train, validation, column, probe, learned, inputs.seed) for column in columns
    )
    bar = tqdm(fits, total=len(columns), desc="probes", unit="timestep", disable=not inputs.progress)
    scores, errors = zip(*bar, strict=True)
    seconds = time.perf_counter() - started + train.features.seconds + validation.features.seconds
    return TimestepSelection(
        method="grid",
        feature=inputs.feature,
        timestep=inputs.timesteps[best_of(scores)],
        timesteps=inputs.timesteps,
        scores=list(scores),
        standard_errors=list(errors),
        cost=SelectionCost(
            forward_passes=train.features.forward_passes + validation.features.forward_passes,
            seconds=seconds,
            flops=train.features.flops + validation.features.flops,
        ),
        schedule=inputs.model.noise_schedule.to_dict(),
        score_name=learned.score_name,
        options=options | {"validation_images": len(validation_data)},
        num_images=len(train_data),
        seed=inputs.seed,
    )


def resolve_task(images: ImageData, task: str | None) -> Task:
    """The task of this name; by default segmentation where the images have masks."""
    if task is not None:
        return find_task(task)
    return CLASSIFICATION if images.masks is None else SEGMENTATION


def check_truth(data: ImageData, task: Task, purpose: str) -> None:
    """Refuse images without the labels or masks of a task.

    Args:
        purpose: the beginning of the message: what needs them.
    """
    if task.needs == "labels" and data.labels is None:
        raise ValueError(f"{purpose} labels; {data.name} has none: {data.no_labels}")
    if task.needs == "masks" and data.masks is None:
        raise ValueError(f"{purpose} masks; {data.name} has none")


def split(inputs: SelectionInputs, task: Task) -> tuple[ImageData, ImageData]:
    """Training and validation images with labels or masks; without the latter images, a fifth of the former."""
    images, validation = inputs.images, inputs.validation
    for data in filter(None, (images, validation)):
        check_truth(data, task, "grid trains probes and needs")
    if validation is not None:
        return images, validation
    return split_train_validation(images, HELD_OUT, inputs.seed)


def image_samples(inputs: SelectionInputs, data: ImageData, pool_size: int) -> Samples:
    """Every image, with its label."""
    features = pooled_features(
        inputs.model, data, inputs.timesteps, inputs.feature,
        pool_size=pool_size, batch_size=inputs.fixed_batch_size, cache_dir=inputs.cache_dir, progress=inputs.progress,
    )  # fmt: skip
    return Samples(features, np.asarray(data.labels), np.arange(len(data)))


def token_samples(inputs: SelectionInputs, data: ImageData, max_tokens: int) -> Samples:
    """At most `max_tokens` random tokens that are not ignored; images without any are not run."""
    chosen = choose_tokens(inputs, data, max_tokens)
    features = token_features(
        inputs.model, chosen.data, inputs.timesteps, inputs.feature,
        tokens=chosen.tokens, batch_size=inputs.fixed_batch_size, cache_dir=inputs.cache_dir, progress=inputs.progress,
    )  # fmt: skip
    return Samples(features, chosen.labels, chosen.images)


class ChosenTokens(NamedTuple):
    """Tokens to use: the images they are of, their numbers over those (see `token_features`), classes and images."""

    data: ImageData
    tokens: np.ndarray
    labels: np.ndarray
    images: np.ndarray


def choose_tokens(inputs: SelectionInputs, data: ImageData, max_tokens: int) -> ChosenTokens:
    """At most `max_tokens` random tokens that are not ignored; images without any are left out.

    Raises:
        ValueError: no token is left, or `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    config = inputs.model.config
    rows = tqdm(range(len(data)), desc=f"masks of {data.name}", unit="image", disable=not inputs.progress)
    masks = (resize_mask(data.mask(row), cast(int, config.image_size)).numpy() for row in rows)
    labels = np.concatenate([token_labels(mask, config.grid_size) for mask in masks])
    chosen = np.flatnonzero(labels != IGNORED)
    if len(chosen) > max_tokens:
        chosen = np.sort(np.random.default_rng(inputs.seed).permutation(chosen)[:max_tokens])
    if not len(chosen):
        raise ValueError(f"all pixels of {data.name} are ignored")
    used, images = np.unique(chosen // config.num_patches, return_inverse=True)
    tokens = images * config.num_patches + chosen % config.num_patches
    return ChosenTokens(data if len(used) == len(data) else data.subset(used), tokens, labels[chosen], images)


def _score(train: Samples, validation: Samples, column: int, probe: str, task: Task, seed: int) -> tuple[float, float]:
    """Validation score of a probe at one timestep, and its standard error."""
    features, truth = validation.features.values[column], validation.labels
    fitted = fit_probe(
        train.features.values[column], train.labels, features, truth,
        kind=probe, metric=mean_iou_of if task.dense else accuracy_score,
    )  # fmt: skip
    score = fitted.validation_score
    if not task.dense:
        return score, (score * (1 - score) / len(truth)) ** 0.5
    return score, iou_error(iou_counts(truth, fitted.classifier.predict(features), validation.images), seed)


def iou_counts(truth: np.ndarray, predicted: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Samples in the intersection and in the union of truth and prediction: `(images, classes, 2)`."""
    shape = (1 + images.max(), 1 + max(truth.max(), predicted.max()))
    hit, true, guessed = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    np.add.at(hit, (images[truth == predicted], truth[truth == predicted]), 1)
    np.add.at(true, (images, truth), 1)
    np.add.at(guessed, (images, predicted), 1)
    return np.stack([hit, true + guessed - hit], axis=-1)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union, averaged over classes with a union: `(..., classes, 2)` to `(...)`."""
    intersection, union = counts[..., 0], counts[..., 1]
    present = union > 0
    return (intersection / np.maximum(union, 1)).sum(axis=-1) / present.sum(axis=-1)


def iou_influence(counts: np.ndarray) -> np.ndarray:
    """Every image's part in the mean IoU of all, `(images, classes, 2)` to `(images,)`; their mean is the mean IoU.

    The jackknife's pseudo-values (Tukey 1958), so that images can be resampled as if they had scores of their own.
    """
    count, whole = len(counts), counts.sum(axis=0)
    parts = count * mean_iou(whole) - (count - 1) * mean_iou(whole - counts)
    return parts - parts.mean() + mean_iou(whole)


def iou_error(counts: np.ndarray, seed: int) -> float:
    """Standard error of the mean IoU of all images, by bootstrap over them: `(images, classes, 2)`."""
    num_images = len(counts)
    draws = np.random.default_rng(seed).multinomial(num_images, [1 / num_images] * num_images, size=RESAMPLES)
    return float(mean_iou(np.tensordot(draws, counts, axes=1)).std(ddof=1))


def mean_iou_of(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(mean_iou(iou_counts(truth, predicted, np.zeros_like(truth)).sum(axis=0)))
