"""Strategies that sweep the candidates over a sample of images and judge each one's features by a criterion.

What they share: pooled features of the sample at every candidate, from one sweep; with `feature="auto"`, of many blocks
and kinds from the same sweep, and block and kind are chosen together with the timestep. The criteria and their
sources are in `aselect_hf.selection.criteria`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers.utils import logging

from aselect_hf.data.classes import has_classes
from aselect_hf.data.feature_cache import KeptRows, pooled_rows, token_rows
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.selection import criteria
from aselect_hf.selection.feature_sweep import Views, augmented_views, noise_views, stored_noise_view, sweep_features
from aselect_hf.selection.grid import check_truth, choose_tokens, resolve_task
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.judges import Judge, jackknifed, of_outcomes, one_by_one, predictor
from aselect_hf.selection.probe import fit_in_parallel
from aselect_hf.selection.result import SelectionCost, TimestepSelection
from aselect_hf.selection.ties import ROUNDING, best_of, ranking

logger = logging.get_logger(__name__)

AUTO = "auto"
KINDS = ("query", "key", "value", "attention", "mlp", "hidden")
"""Kinds of features that `feature="auto"` chooses among by default."""
NUM_UNLABELLED, NUM_LABELLED = 256, 500
"""Images by default, without labels and with."""
MAX_TOKENS = 4000
LEAST_IMAGES = 3
PERTURBATIONS = 3
LEAST_FOR_CLUSTERS = 128
"""Images below which `consensus` is often far off (`docs/evidence.md`, the column of 64 images)."""


@dataclass
class Labelled:
    """Labeled rows: images, or tokens with the image that each is of."""

    views: Views
    rows: KeptRows
    labels: np.ndarray
    images: np.ndarray | None
    options: dict[str, Any]

    @property
    def jackknife_strata(self) -> np.ndarray | None:
        return self.labels if self.images is None else None


def select_unlabelled(
    method: str, inputs: SelectionInputs, *, pool_size: int = 1, kinds: Sequence[str] = KINDS
) -> TimestepSelection:
    """`rankme` and `alpha_req`: the spectrum of the features that the model gives, with its stored noise.

    Args:
        pool_size: cells per side into which tokens are averaged, see `pooled_features`; 1 is the token mean.
        kinds: for `feature="auto"`, the kinds to choose among, in all blocks.

    Raises:
        ValueError: fewer than 3 images, NaN pixels, an unknown kind.
    """
    started = _checked(method, inputs)
    criterion, score_name = {
        "rankme": (criteria.rankme, "RankMe (effective rank)"),
        "alpha_req": (criteria.alpha_req, "alpha-ReQ (-|alpha - 1|)"),
    }[method]
    rows = pooled_rows(inputs.model, len(inputs.images), pool_size)
    views = stored_noise_view(inputs, inputs.images)
    judge = jackknifed(method, score_name, lambda x, kept: criterion(x[kept, 0]), len(inputs.images), inputs.seed)
    return _select(inputs, judge, views, rows, kinds, {"pool_size": pool_size}, started)


def select_consensus(inputs: SelectionInputs, *, pool_size: int = 1, kinds: Sequence[str] = KINDS) -> TimestepSelection:
    """How well each candidate tells the clusters of images that the candidates agree on (`criteria.consensus`).

    With the stored noise of the model. Clusters of all features together where `feature="auto"`; the jackknife of the
    standard errors holds them fixed.

    Args:
        pool_size, kinds: see `select_unlabelled`.

    Raises:
        ValueError: as `select_unlabelled`.
    """
    started = _checked("consensus", inputs)
    if len(inputs.images) < LEAST_FOR_CLUSTERS:
        logger.warning(
            "consensus has %d images: below %d its pick is often far off", len(inputs.images), LEAST_FOR_CLUSTERS
        )
    found: list[criteria.Consensus] = []

    def scores(cells: list[np.ndarray]) -> np.ndarray:
        found.append(criteria.consensus([cell[:, 0] for cell in cells], seed=inputs.seed))
        return found[-1].scores

    def score(x: np.ndarray, kept: np.ndarray) -> float:
        return criteria.clusters_logme(x[kept, 0], found[0].clusters[:, kept])

    score_name = "LogME of the clusters that timesteps agree on"
    judge = jackknifed("consensus", score_name, score, len(inputs.images), inputs.seed)
    rows = pooled_rows(inputs.model, len(inputs.images), pool_size)
    views = stored_noise_view(inputs, inputs.images)
    judge = dataclasses.replace(judge, scores=scores, together=True)
    return _select(inputs, judge, views, rows, kinds, {"pool_size": pool_size}, started)


def select_by_views(
    method: str,
    inputs: SelectionInputs,
    *,
    num_views: int | None = None,
    pool_size: int = 1,
    kinds: Sequence[str] = KINDS,
) -> TimestepSelection:
    """`lidar`, `retrieval` (random crops and flips) and `snr` (the same image), each view with noise of its own.

    Args:
        num_views: of every image, the same at every timestep; default 4 for `lidar`, else 2.
        pool_size, kinds: see `select_unlabelled`.

    Raises:
        ValueError: fewer than 3 images or 2 views, NaN pixels, an unknown kind.
    """
    started = _checked(method, inputs)
    num_views = (4 if method == "lidar" else 2) if num_views is None else num_views
    if num_views < 2:
        raise ValueError(f"num_views must be at least 2, got {num_views}")
    count = len(inputs.images)
    rows = pooled_rows(inputs.model, count, pool_size)
    views = (noise_views if method == "snr" else augmented_views)(inputs, num_views)
    if method == "retrieval":
        judge = Judge(
            method,
            "images found among other views",
            one_by_one(criteria.view_retrieval),
            lambda x: of_outcomes(criteria.retrieved(x)),
        )
    else:
        criterion, score_name = {
            "lidar": (criteria.lidar, "LiDAR (effective rank)"),
            "snr": (criteria.signal_to_noise, "share of variance between images"),
        }[method]
        judge = jackknifed(method, score_name, lambda x, kept: criterion(x[kept]), count, inputs.seed)
    return _select(inputs, judge, views, rows, kinds, {"num_views": num_views, "pool_size": pool_size}, started)


def select_ridge(
    inputs: SelectionInputs,
    *,
    task: str | None = None,
    pool_size: int = 1,
    max_tokens: int = MAX_TOKENS,
    kinds: Sequence[str] = KINDS,
) -> TimestepSelection:
    """Leave-one-out ridge regression on the features that the model gives, with its stored noise.

    Classification: a sample is an image; the score is accuracy. Segmentation: a sample is a token, all tokens of an
    image are left out together, and the score is the mean IoU of tokens, as in the grid.

    Args:
        task: `"classification"` or `"segmentation"`; default segmentation where the images have masks.
        max_tokens: segmentation: random tokens to use at most, of all images.
        pool_size, kinds: see `select_unlabelled`.

    Raises:
        ValueError: no labels (or masks), fewer than 2 classes with 2 images each, and as `select_unlabelled`.
    """
    started = _checked("ridge", inputs)
    data = _labelled("ridge", inputs, task, pool_size, max_tokens)
    labels, images = data.labels, data.images
    judge = predictor(
        "ridge", labels, images, inputs.seed, lambda x: criteria.ridge_predictions(x, labels, groups=images).classes
    )
    return _select(inputs, judge, data.views, data.rows, kinds, data.options, started)


def select_knn(
    inputs: SelectionInputs,
    *,
    neighbours: int = 5,
    task: str | None = None,
    pool_size: int = 1,
    max_tokens: int = MAX_TOKENS,
    kinds: Sequence[str] = KINDS,
) -> TimestepSelection:
    """Leave-one-out nearest neighbors; samples, scores and errors as `select_ridge`.

    Args:
        neighbours: that vote; all where there are fewer.
        task, pool_size, max_tokens, kinds: see `select_ridge`.
    """
    started = _checked("knn", inputs)
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    data = _labelled("knn", inputs, task, pool_size, max_tokens)
    largest = 1 if data.images is None else int(np.bincount(data.images).max())
    k = min(neighbours, len(data.labels) - largest)
    labels, images = data.labels, data.images
    judge = predictor(
        "knn", labels, images, inputs.seed, lambda x: criteria.knn_predictions(x, labels, k, groups=images)
    )
    return _select(inputs, judge, data.views, data.rows, kinds, {"neighbours": neighbours} | data.options, started)


def select_logme(
    inputs: SelectionInputs,
    *,
    task: str | None = None,
    pool_size: int = 1,
    max_tokens: int = MAX_TOKENS,
    kinds: Sequence[str] = KINDS,
) -> TimestepSelection:
    """Log evidence of the labels, per sample; samples and arguments as `select_ridge`."""
    started = _checked("logme", inputs)
    data = _labelled("logme", inputs, task, pool_size, max_tokens)
    judge = jackknifed(
        "logme", "LogME (log evidence per sample)", lambda x, kept: criteria.logme(x[kept, 0], data.labels[kept]),
        len(data.labels), inputs.seed, data.images, data.jackknife_strata,
    )  # fmt: skip
    return _select(inputs, judge, data.views, data.rows, kinds, data.options, started)


CRITERIA: dict[str, Callable[..., TimestepSelection]] = {
    "consensus": select_consensus,
    "rankme": partial(select_unlabelled, "rankme"),
    "alpha_req": partial(select_unlabelled, "alpha_req"),
    "lidar": partial(select_by_views, "lidar"),
    "retrieval": partial(select_by_views, "retrieval"),
    "snr": partial(select_by_views, "snr"),
    "ridge": select_ridge,
    "knn": select_knn,
    "logme": select_logme,
}
LABELLED = ("ridge", "knn", "logme")
LEAST_PER_CLASS = 2
"""Images that a leave-one-out probe needs of a class: a random sample takes so many of every class where it can."""


def select_shortlist(
    inputs: SelectionInputs, *, first: str = "retrieval", second: str = "ridge", num_candidates: int = 5
) -> TimestepSelection:
    """One criterion's best candidates, confirmed by another: by default a shortlist without labels, then a few labels.

    The result is the second criterion's, over the shortlist; the first one's scores are in its options. A label-free
    `first` sees 256 of the images. With `feature="auto"`, `first` chooses the feature.

    Args:
        first, second: names in `CRITERIA`, with their default options.
        num_candidates: timesteps on the shortlist, at most.

    Raises:
        ValueError: an unknown name, a shortlist shorter than 2, and as the criteria.
    """
    for argument, name in (("first", first), ("second", second)):
        if name not in CRITERIA:
            raise ValueError(f"{argument} must be one of {', '.join(CRITERIA)}; got {name!r}")
    if num_candidates < 2:
        raise ValueError(f"num_candidates must be at least 2, got {num_candidates}")
    _checked("shortlist", inputs)
    if second in LABELLED and inputs.images.labels is None and inputs.images.masks is None:
        raise ValueError(f"{second} needs labels or masks; {inputs.images.name} has none: {inputs.images.no_labels}")
    some = inputs.images if first in LABELLED else inputs.images.sample(NUM_UNLABELLED, inputs.seed)
    listed = CRITERIA[first](dataclasses.replace(inputs, images=some))
    for doubt in listed.doubts():
        logger.warning("%s", doubt)
    timesteps = sorted(listed.timesteps[index] for index in ranking(listed.scores)[:num_candidates])
    chosen = CRITERIA[second](dataclasses.replace(inputs, feature=listed.feature, timesteps=timesteps))
    options = {"first": first, "second": second, "num_candidates": num_candidates}
    options |= {"first_timesteps": listed.timesteps, "first_scores": listed.scores, "first_images": listed.num_images}
    cost = SelectionCost(*(a + b for a, b in zip(*map(dataclasses.astuple, (listed.cost, chosen.cost)), strict=True)))
    return dataclasses.replace(
        chosen, method="shortlist", cost=cost, options=options | chosen.options, feature_scores=listed.feature_scores
    )


def _select(
    inputs: SelectionInputs,
    judge: Judge,
    views: Views,
    rows: KeptRows,
    kinds: Sequence[str],
    options: dict[str, Any],
    started: float,
) -> TimestepSelection:
    """Sweep, judge every feature at every candidate, take the best."""
    model, auto = inputs.model, inputs.feature == AUTO
    features = _candidates(kinds, model.config) if auto else [inputs.feature]
    swept = sweep_features(
        model, views, inputs.timesteps, features, rows,
        batch_size=inputs.fixed_batch_size, progress=inputs.progress, name=judge.name,
    )  # fmt: skip
    cells = [swept.values[name][column] for name in features for column in range(len(inputs.timesteps))]
    for name in features:
        inputs.check_finite(swept.values[name], name)
    bar = tqdm(
        judge.scores(cells), total=len(cells), desc=f"{judge.name} scores", unit="score", disable=not inputs.progress
    )
    scores = np.array([*bar]).reshape(len(features), -1)
    chosen, best = np.unravel_index(best_of(scores.ravel()), scores.shape)
    evidence = [*fit_in_parallel(partial(judge.evidence, cell) for cell in swept.values[features[chosen]])]
    per_image = [each.per_image for each in evidence if each.per_image is not None]
    return TimestepSelection(
        method=judge.name,
        feature=features[chosen],
        timestep=inputs.timesteps[best],
        timesteps=inputs.timesteps,
        scores=scores[chosen].tolist(),
        standard_errors=[each.standard_error for each in evidence],
        cost=SelectionCost(swept.forward_passes, time.perf_counter() - started + views.saved, swept.flops),
        schedule=model.noise_schedule.to_dict(),
        score_name=judge.score_name,
        options=options | ({"feature": AUTO, "kinds": list(kinds)} if auto else {}),
        num_images=len(inputs.images),
        seed=inputs.seed,
        per_image_scores=np.stack(per_image, axis=1).tolist() if per_image else None,
        feature_scores=dict(zip(features, scores.tolist(), strict=True)) if auto else None,
        perturbed_timesteps=None
        if auto and judge.together
        else _perturbed(inputs, judge, swept.values[features[chosen]]),
    )


def _perturbed(inputs: SelectionInputs, judge: Judge, cells: np.ndarray) -> list[int]:
    """See `TimestepSelection.perturbed_timesteps`: the picks among changed `cells` `(timesteps, rows, ...)`."""
    rng, picks = np.random.default_rng(inputs.seed), []
    for _ in range(PERTURBATIONS):
        changed = [cell * (1 + ROUNDING * rng.standard_normal(cell.shape)) for cell in cells]
        picks.append(inputs.timesteps[best_of([*judge.scores(changed)])])
    return picks


def _candidates(kinds: Sequence[str], config: NoisyBackboneConfig) -> list[str]:
    """Names of the features of these kinds, in order of computation."""
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(config.feature_kinds):
        raise ValueError(f"kinds must be a list of names out of {', '.join(config.feature_kinds)}; got {kinds!r}")
    return [name for name in config.list_features() if config.resolve_feature(name).kind in kinds]


def _checked(method: str, inputs: SelectionInputs) -> float:
    """The time of the start, unless there are too few images."""
    if len(inputs.images) < LEAST_IMAGES:
        raise ValueError(
            f"{method} needs at least {LEAST_IMAGES} images for its standard errors, got {len(inputs.images)}"
        )
    return time.perf_counter()


def _labelled(method: str, inputs: SelectionInputs, task: str | None, pool_size: int, max_tokens: int) -> Labelled:
    """The labeled samples of a task; for segmentation images are read whole."""
    task, model, data = resolve_task(inputs.images, task), inputs.model, inputs.images
    check_truth(data, task, f"{method} learns from a few")
    options: dict[str, Any] = {"task": task}
    if task == "classification":
        labels, images = np.asarray(data.labels), None
        if not has_classes(labels):
            raise ValueError(
                f"{method} needs at least 2 classes with 2 images each; {data.name} has fewer "
                f"({data.describe_classes()}): label more images, or choose a rule without labels"
            )
        rows = pooled_rows(model, len(data), pool_size)
        options["pool_size"] = pool_size
    else:
        chosen = choose_tokens(inputs, data, max_tokens)
        data, labels, images = chosen.data, chosen.labels, chosen.images
        if len(np.unique(labels)) < 2 or len(data) < LEAST_IMAGES:
            raise ValueError(f"{method} needs tokens of 2 classes and {LEAST_IMAGES} images; {data.name} has fewer")
        rows = token_rows(model, data, chosen.tokens)
        options["tokens"] = len(labels)
    views = stored_noise_view(inputs, data, segmentation=rows.segmentation)
    return Labelled(views, rows, labels, images, options)
