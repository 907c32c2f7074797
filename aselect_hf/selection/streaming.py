"""Criteria that need only moments, on more images than memory should hold: one pass, whose memory does not grow.

Images are read batch by batch; each batch runs at every timestep and goes into the moments of its jackknife group.
Processes take their own batches, and moments are added at the end. Scores and standard errors are those of the rows
themselves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from aselect_hf.cost import sweep_flops
from aselect_hf.data.feature_cache import KeptRows
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.processes import processes
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.moments import Moments, merged
from aselect_hf.selection.probe import fit_in_parallel
from aselect_hf.selection.result import SelectionCost, TimestepSelection
from aselect_hf.selection.rule import AUTO, Rule
from aselect_hf.selection.ties import ROUNDING, best_of
from aselect_hf.selection.uncertainty import Jackknife

LEAST_BYTES = 2**30
"""Features of all rows that take less are held in memory, so that the same rows can be scored again and again."""
PERTURBATIONS = 3


def select_by_moments(
    rule: Rule,
    inputs: SelectionInputs,
    data: ImageData,
    rows: KeptRows,
    jackknife: Jackknife,
    options: dict[str, Any],
    labels: np.ndarray | None = None,
) -> TimestepSelection | None:
    """Select by `rule.criterion.of_moments`; `None` if the features themselves fit into memory, or are needed.

    Args:
        data: the images of `rows`.
        labels: of each row, for a criterion with labels.
    """
    classes, targets = (np.empty(0), None) if labels is None else np.unique(labels, return_inverse=True)
    width = row_width(inputs, rows)
    if are_few(inputs, rows, Moments.bytes(width, len(classes)) * (jackknife.num_groups + PERTURBATIONS)):
        return None
    assert rule.criterion is not None
    score = rule.criterion.of_moments
    assert score is not None
    started = time.perf_counter()
    groups, changed = sweep_moments(rule.name, inputs, data, rows, jackknife, targets, len(classes))
    leave_one_out = [
        [merged(part for other, part in enumerate(each) if other != group) for group in range(len(each))]
        for each in groups
    ]
    whole = [merged(each) for each in groups]
    scores = [*fit_in_parallel(partial(score, each) for each in whole)]
    errors = [
        jackknife.error(np.array([*fit_in_parallel(partial(score, part) for part in parts)])) for parts in leave_one_out
    ]
    picks = [inputs.timesteps[best_of([score(each) for each in some])] for some in changed]
    cost = streamed_cost(inputs, len(data), 1, started)
    return streamed_selection(rule, inputs, scores, errors, cost, options, picks)


def streamed_cost(inputs: SelectionInputs, num_images: int, num_reads: int, started: float) -> SelectionCost:
    """Cost of running images at every timestep, `num_reads` times; they are encoded once.

    Args:
        started: `time.perf_counter()` at the beginning.
    """
    model = inputs.model
    passes = num_reads * len(inputs.timesteps) * model.config.num_noise_draws * num_images
    flops = sweep_flops(model, num_images, passes, inputs.feature)
    return SelectionCost(passes, time.perf_counter() - started, flops, processes().count)


def streamed_selection(
    rule: Rule,
    inputs: SelectionInputs,
    scores: list[float],
    errors: list[float],
    cost: SelectionCost,
    options: dict[str, Any],
    perturbed_timesteps: list[int],
) -> TimestepSelection:
    """The selection by a rule's criterion."""
    assert rule.criterion is not None
    return TimestepSelection(
        method=rule.name,
        feature=inputs.feature,
        timestep=inputs.timesteps[best_of(scores)],
        timesteps=inputs.timesteps,
        scores=scores,
        standard_errors=errors,
        cost=cost,
        schedule=inputs.model.noise_schedule.to_dict(),
        score_name=rule.criterion.score_name,
        options=options,
        num_images=len(inputs.images),
        seed=inputs.seed,
        perturbed_timesteps=perturbed_timesteps,
    )


def sweep_moments(
    name: str,
    inputs: SelectionInputs,
    data: ImageData,
    rows: KeptRows,
    jackknife: Jackknife,
    targets: np.ndarray | None,
    num_classes: int,
    perturbations: int = PERTURBATIONS,
) -> tuple[list[list[Moments]], list[list[Moments]]]:
    """Moments by timestep and jackknife group, and, by perturbation and timestep, those of slightly changed rows."""
    here, steps = processes(), inputs.timesteps
    own = here.block(len(data), inputs.fixed_batch_size)
    empty = Moments.empty(row_width(inputs, rows), num_classes)
    groups = [[empty] * jackknife.num_groups for _ in steps]
    changed = [[empty] * len(steps) for _ in range(perturbations)]
    quiet = not (inputs.progress and here.is_main)
    with tqdm(total=len(own) * len(steps), desc=name, unit="pass", disable=quiet) as bar:
        for first, latents in read_batches(inputs, data, own, rows.whole_image):
            kept = slice(rows.first_rows[first], rows.first_rows[first + len(latents)])
            group_of, labels = jackknife.group_of[kept], None if targets is None else targets[kept]
            for column, t in enumerate(steps):
                values = rows_at(inputs, latents, rows, first, t)
                inputs.check_finite(values)
                for group in np.unique(group_of):
                    some = group_of == group
                    part = Moments.of(
                        values[torch.from_numpy(some).to(values.device)],
                        None if labels is None else labels[some],
                        num_classes,
                    )
                    groups[column][group] = groups[column][group] + part
                for number, each in enumerate(changed):
                    some_changed = perturbed(values, [inputs.seed, number, column, first])
                    each[column] = each[column] + Moments.of(some_changed, labels, num_classes)
                bar.update(len(latents))
    return [_added(each) for each in groups], [_added(each) for each in changed]


def perturbed(values: torch.Tensor, seed: list[int]) -> torch.Tensor:
    """Rows with a relative change of the size of rounding, the same whenever they are read."""
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal(values.shape, dtype=np.float32))
    return values * (1 + ROUNDING * noise.to(values.device))


def are_few(inputs: SelectionInputs, rows: KeptRows, needed: int) -> bool:
    """Whether to hold the features of all rows: they are needed, small, or smaller than what replaces them.

    Args:
        needed: bytes of what replaces the features at one timestep.
    """
    kept = 4 * int(rows.first_rows[-1]) * row_width(inputs, rows)
    if inputs.feature == AUTO or inputs.num_timesteps_to_fuse > 1:
        return True
    return kept * len(inputs.timesteps) < LEAST_BYTES or kept < needed


def _added(own: list[Moments]) -> list[Moments]:
    """The sums over all processes."""
    return [merged(parts) for parts in zip(*processes().gather(own), strict=True)]


def read_batches(
    inputs: SelectionInputs, data: ImageData, own: range, whole_image: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """The network's clean inputs of this process's images, with the number of the first of each batch."""
    model = inputs.model
    cache = None if model.vae is None else inputs.latent_cache(data, whole_image=whole_image)
    for first in range(own.start, own.stop, inputs.fixed_batch_size):
        batch = range(first, min(first + inputs.fixed_batch_size, own.stop))
        latents = cache.gather(batch) if cache is not None else inputs.latents(data, batch, whole_image=whole_image)[0]
        yield first, latents.float().to(model.device)


def rows_at(inputs: SelectionInputs, latents: torch.Tensor, rows: KeptRows, first: int, t: int) -> torch.Tensor:
    """Rows of a batch at a timestep, averaged over the stored draws of noise, float32."""
    model, feature = inputs.model, inputs.feature
    steps = torch.full((len(latents),), t, device=latents.device)
    draws = model.stored_noise(latents).float()
    total: Any = 0
    for noise in draws:
        noisy = model.noise_schedule.add_noise(latents, noise.expand_as(latents), t)
        tokens = model.features_of_noisy(noisy, steps, [feature])[feature].float()
        total = total + rows.rows_of(tokens, model.grid_size(latents), first)
    return total / len(draws)


def row_width(inputs: SelectionInputs, rows: KeptRows) -> int:
    """Columns of a row; 0 if the feature is yet to be chosen."""
    return 0 if inputs.feature == AUTO else rows.cells * inputs.model.config.feature_width(inputs.feature)
