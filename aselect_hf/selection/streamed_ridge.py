"""Ridge regression on more images than memory should hold: two passes, whose memory does not grow.

The first pass gives the moments, from which come the regression and all that images share. The second one predicts each
image: of validation, or left out, by its own leverage. Scores and standard errors are those of `fit_probe` and
`criteria.ridge_predictions`.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from aselect_hf.data.feature_cache import KeptRows, pooled_rows
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.processes import processes
from aselect_hf.selection.criteria import PENALTIES
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.moments import Moments, merged
from aselect_hf.selection.probe import PENALTIES_PER_ROW
from aselect_hf.selection.result import SelectionCost, TimestepSelection
from aselect_hf.selection.rule import Rule
from aselect_hf.selection.streaming import (
    PERTURBATIONS,
    are_few,
    perturbed,
    read_batches,
    row_width,
    rows_at,
    streamed_cost,
    streamed_selection,
    sweep_moments,
)
from aselect_hf.selection.ties import best_of, near_best
from aselect_hf.selection.uncertainty import Jackknife, binomial_error


class RidgeFits:
    """Ridge regression of the classes at several penalties, and how well it predicts the rows that are shown to it.

    Args:
        moments: of the rows to learn from.
        penalties: added to the diagonal of `X^T X` of the standardized rows (default: those of
            `criteria.ridge_predictions`).

    Attributes:
        errors, hits: `(penalties,)`, sums of squared residuals and numbers of right predictions.
    """

    def __init__(self, moments: Moments, penalties: np.ndarray | None = None) -> None:
        vectors, scales, self.factors = moments.principal()
        self.mean, self.basis = moments.mean, vectors / scales
        self.coefficients = moments.projected(self.basis, self.factors)
        self.shares = moments.class_counts / moments.count
        if penalties is None:
            penalties = PENALTIES * max(np.square(scales).sum(), 1.0)
        self.shrink = scales**2 / (scales**2 + penalties[:, None])  # (penalties, rank)
        self.intercept = 1 / moments.count
        self.errors, self.hits = np.zeros(len(penalties)), np.zeros(len(penalties), dtype=np.int64)

    def show(self, rows: torch.Tensor, targets: np.ndarray, *, left_out: bool) -> None:
        """Predict some rows.

        Args:
            targets: `(rows,)`, the number of each row's class; the number of classes stands for any other class.
            left_out: whether the rows are among those that the fit has learned from, to be predicted from all others.
        """
        left = (rows.cpu().double().numpy() - self.mean) * self.factors @ self.basis
        one_hot = np.eye(len(self.shares) + 1)[targets][:, :-1]
        for number, shrink in enumerate(self.shrink):
            residuals = one_hot - self.shares - (left * shrink) @ self.coefficients
            if left_out:
                residuals /= 1 - self.intercept - (left**2 @ shrink)[:, None]
            self.errors[number] += np.square(residuals).sum()
            self.hits[number] += (near_best(one_hot - residuals).argmax(axis=1) == targets).sum()


def score_streamed_ridge(
    inputs: SelectionInputs, train: ImageData, validation: ImageData, pool_size: int
) -> tuple[list[float], SelectionCost] | None:
    """Validation accuracy of the ridge probe of `fit_probe` at every timestep, and the cost; `None` if rows are few."""
    started, model = time.perf_counter(), inputs.model
    train_labels, labels = (np.asarray(data.labels) for data in (train, validation))
    classes, targets = np.unique(train_labels, return_inverse=True)
    rows = pooled_rows(model, len(train), pool_size)
    if are_few(inputs, rows, Moments.bytes(row_width(inputs, rows), len(classes))):
        return None
    together = Jackknife(np.zeros(len(train), dtype=np.int64), 1)
    groups, _ = sweep_moments("grid", inputs, train, rows, together, targets, len(classes), perturbations=0)
    penalties = len(train) * np.array(PENALTIES_PER_ROW)
    fits = [RidgeFits(merged(each), penalties) for each in groups]
    unknown = len(classes)  # no prediction is right for a class that the probe has not learned
    aims = np.array([{label: number for number, label in enumerate(classes)}.get(each, unknown) for each in labels])
    _show(
        "grid, validation",
        inputs,
        validation,
        pooled_rows(model, len(validation), pool_size),
        aims,
        [fits],
        left_out=False,
    )
    cost = streamed_cost(inputs, len(train) + len(validation), 1, started)
    return [float(fit.hits.max() / len(validation)) for fit in fits], cost


def select_by_streamed_ridge(
    rule: Rule, inputs: SelectionInputs, data: ImageData, rows: KeptRows, labels: np.ndarray, options: dict[str, Any]
) -> TimestepSelection | None:
    """Select by leave-one-out accuracy of images; `None` if the features themselves fit into memory, or are needed."""
    classes, targets = np.unique(labels, return_inverse=True)
    if are_few(inputs, rows, Moments.bytes(row_width(inputs, rows), len(classes)) * (1 + PERTURBATIONS)):
        return None
    started = time.perf_counter()
    together = Jackknife(np.zeros(len(targets), dtype=np.int64), 1)
    groups, changed = sweep_moments(rule.name, inputs, data, rows, together, targets, len(classes))
    versions = [[merged(each) for each in groups], *changed]
    fits = [[RidgeFits(each) for each in version] for version in versions]
    _show(f"{rule.name}, left out", inputs, data, rows, targets, fits, left_out=True)
    accuracies = [[_accuracy(fit, len(targets)) for fit in version] for version in fits]
    errors = [binomial_error(score, len(targets) - 1) for score in accuracies[0]]
    picks = [inputs.timesteps[best_of(each)] for each in accuracies[1:]]
    cost = streamed_cost(inputs, len(data), 2, started)
    return streamed_selection(rule, inputs, accuracies[0], errors, cost, options, picks)


def _show(
    name: str,
    inputs: SelectionInputs,
    data: ImageData,
    rows: KeptRows,
    targets: np.ndarray,
    fits: list[list[RidgeFits]],
    *,
    left_out: bool,
) -> None:
    """Show every row to the fits `(versions, timesteps)`; the sums are those of all processes."""
    here, steps = processes(), inputs.timesteps
    own = here.block(len(data), inputs.fixed_batch_size)
    quiet = not (inputs.progress and here.is_main)
    with tqdm(total=len(own) * len(steps), desc=name, unit="pass", disable=quiet) as bar:
        for first, latents in read_batches(inputs, data, own, rows.whole_image):
            aims = targets[first : first + len(latents)]
            for column, t in enumerate(steps):
                values = rows_at(inputs, latents, rows, first, t)
                for number, version in enumerate(fits):
                    seen = perturbed(values, [inputs.seed, number - 1, column, first]) if number else values
                    version[column].show(seen, aims, left_out=left_out)
                bar.update(len(latents))
    found = here.gather([[(fit.errors, fit.hits) for fit in version] for version in fits])
    for number, version in enumerate(fits):
        for column, fit in enumerate(version):
            parts = [each[number][column] for each in found]
            fit.errors, fit.hits = (np.sum([part[which] for part in parts], axis=0) for which in (0, 1))


def _accuracy(fit: RidgeFits, count: int) -> float:
    """Of the penalty with the smallest squared error."""
    return float(fit.hits[best_of(-fit.errors)] / count)
