"""What rules with a criterion share: one sweep over all candidates, then a judge.

With `feature="auto"`, which needs labels, one sweep gives the features of many blocks and kinds, and the best score
chooses block, kind and timestep together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from aselect_hf.data.feature_cache import KeptRows, pooled_rows
from aselect_hf.data.processes import processes
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.selection.feature_sweep import VIEWS, Views, stored_noise_view, sweep_features
from aselect_hf.selection.fusing import fuse
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.judges import Judge, by_jackknife
from aselect_hf.selection.probe import fit_in_parallel
from aselect_hf.selection.result import SelectionCost, TimestepSelection
from aselect_hf.selection.rule import AUTO, RULES
from aselect_hf.selection.streaming import select_by_moments
from aselect_hf.selection.ties import ROUNDING, best_of
from aselect_hf.selection.uncertainty import Jackknife

KINDS = ("query", "key", "value", "attention", "mlp", "hidden")
"""Kinds of features that `feature="auto"` chooses among by default."""
LEAST_IMAGES = 3
PERTURBATIONS = 3


def select_without_labels(
    inputs: SelectionInputs,
    name: str,
    *,
    num_views: int | None = None,
    pool_size: int = 1,
    judge: Judge | None = None,
) -> TimestepSelection:
    """Select by the criterion of a rule without labels, on the views of the images that it sees.

    Args:
        name: name of the rule.
        num_views: views of each image, the same at every timestep; `None` if the criterion sees the images themselves.
        judge: how to judge (default: by the criterion, with standard errors by the jackknife).

    Raises:
        ValueError: fewer than 3 images or 2 views, NaN pixels.
    """
    rule = RULES[name]
    assert rule.criterion is not None
    check_count(name, inputs)
    if num_views is not None and num_views < 2:
        raise ValueError(f"num_views must be at least 2, got {num_views}")
    count = len(inputs.images)
    options: dict[str, Any] = {} if num_views is None else {"num_views": num_views}
    rows = pooled_rows(inputs.model, count, pool_size)
    options |= {"pool_size": pool_size}
    jackknife = Jackknife.of(count, inputs.seed)
    if rule.criterion.of_moments is not None:
        found = select_by_moments(rule, inputs, inputs.images, rows, jackknife, options)
        if found is not None:
            return found
    if num_views is None:
        views = stored_noise_view(inputs, inputs.images)
    else:
        views = VIEWS[rule.criterion.sees](inputs, num_views)
    return select_by_judge(inputs, judge or by_jackknife(rule, jackknife), views, rows, options)


def check_count(name: str, inputs: SelectionInputs) -> None:
    """Refuse fewer images than a standard error needs."""
    if len(inputs.images) < LEAST_IMAGES:
        raise ValueError(
            f"{name} needs at least {LEAST_IMAGES} images for its standard errors, got {len(inputs.images)}"
        )


def select_by_judge(
    inputs: SelectionInputs,
    judge: Judge,
    views: Views,
    rows: KeptRows,
    options: dict[str, Any],
    kinds: Sequence[str] = (),
) -> TimestepSelection:
    """Judge every feature at every timestep and take the best.

    Args:
        kinds: kinds of features to choose among if `feature` is `"auto"`.
    """
    started, model, auto = time.perf_counter(), inputs.model, inputs.feature == AUTO
    features = _features_of(kinds, model.config) if auto else [inputs.feature]
    run: dict[str, Any] = {"batch_size": inputs.fixed_batch_size, "progress": inputs.progress, "name": judge.rule}
    swept = sweep_features(model, views, inputs.timesteps, features, rows, **run)
    cells = [swept.values[name][column] for name in features for column in range(len(inputs.timesteps))]
    for name in features:
        inputs.check_finite(swept.values[name], name)
    judged = judge.judge(cells)
    bar = tqdm(judged.scores, total=len(cells), desc=f"{judge.rule} scores", unit="score", disable=not inputs.progress)
    scores = np.array([*bar]).reshape(len(features), -1)
    chosen, best = np.unravel_index(best_of(scores.ravel()), scores.shape)
    own = swept.values[features[chosen]]
    evidence = [*fit_in_parallel(partial(judged.evidence, cell) for cell in own)]
    fused: dict[str, Any] = {}
    if inputs.num_timesteps_to_fuse > 1:
        together = fuse(
            lambda some: [*judge.judge(some).scores],
            lambda cell: judged.evidence(cell).per_image,
            own,
            int(best),
            inputs.num_timesteps_to_fuse,
        )
        fused = {"fused_timesteps": [inputs.timesteps[index] for index in together[0]], "fused_scores": together[1]}
    per_image = [each.per_image for each in evidence if each.per_image is not None]
    return TimestepSelection(
        method=judge.rule,
        feature=features[chosen],
        timestep=inputs.timesteps[best],
        timesteps=inputs.timesteps,
        scores=scores[chosen].tolist(),
        standard_errors=[each.standard_error for each in evidence],
        cost=SelectionCost(
            swept.forward_passes, time.perf_counter() - started + views.seconds, swept.flops, processes().count
        ),
        schedule=model.noise_schedule.to_dict(),
        score_name=judge.score_name,
        options=options | ({"feature": AUTO, "kinds": list(kinds)} if auto else {}),
        num_images=len(inputs.images),
        seed=inputs.seed,
        per_image_scores=np.stack(per_image, axis=1).tolist() if per_image else None,
        feature_scores=dict(zip(features, scores.tolist(), strict=True)) if auto else None,
        perturbed_timesteps=_perturbed(inputs, judge, own),
        **fused,
    )


def _perturbed(inputs: SelectionInputs, judge: Judge, cells: np.ndarray) -> list[int]:
    """Picks after small changes of `cells` `(timesteps, rows, ...)`, see `TimestepSelection.perturbed_timesteps`."""
    rng, picks = np.random.default_rng(inputs.seed), []
    for _ in range(PERTURBATIONS):
        changed = [cell * (1 + ROUNDING * rng.standard_normal(cell.shape)) for cell in cells]
        picks.append(inputs.timesteps[best_of([*judge.judge(changed).scores])])
    return picks


def _features_of(kinds: Sequence[str], config: NoisyBackboneConfig) -> list[str]:
    """Names of the features of these kinds, in order of computation."""
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(config.feature_kinds):
        raise ValueError(f"kinds must be a list of names out of {', '.join(config.feature_kinds)}; got {kinds!r}")
    return [name for name in config.list_features() if config.resolve_feature(name).kind in kinds]
