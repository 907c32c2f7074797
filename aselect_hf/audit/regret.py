"""How far a timestep may be from the best of a grid, from the outcomes of the same images at all timesteps.

With `d_t` the mean over images of (score at `t` - score at the pick), the regret is `max_t E[d_t]`, never below 0. Its
plug-in `max_t d_t` is too large, because the best of many noisy timesteps is also the luckiest (the winner's curse).

- Upper bound, one-sided: `max_t (d_t - q)`, where `q` is the 5 % quantile of the bootstrap's `d*_t - d_t`. Each bound
  needs to hold only for its own timestep: the truly best timestep is fixed, and the maximum is at least its bound. So
  there is neither a correction for the number of timesteps nor a winner's curse, but the bound is conservative.
- Lower bound, one-sided: `max_t (d_t - c s_t)`, where `s_t` is the bootstrap's standard error and `c` the 95 % quantile
  of `max_t (d*_t - d_t) / s_t`. Here luck may choose the timestep, so all bounds must hold at once.
- Estimate: `max_t d_t` less the bootstrap's estimate of its excess, `mean(max_t d*_t) - max_t d_t`. This removes only
  part of the curse: with ten equally good timesteps, 3.9 points become 2.5 (200 images, simulated). Verdicts therefore
  also rest on the bounds.

An image is drawn with all its timesteps (paired). As Bonett and Price (2012) do for paired proportions, two imaginary
images are added to each bootstrap: one that is right only at the pick, and one that is right everywhere else. Without
them, two timesteps that agree on few images would be certain to agree on all. The bounds hold for images of the same
kind and a probe trained on as many; they ignore that leave-one-out answers share training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclass
class Regret:
    """Points (hundredths of the score) that the pick may lose against the best timestep of the grid.

    Args:
        best_timestep: timestep of the highest score.
        estimate: at least 0, with part of the winner's curse removed.
        lower, upper: one-sided bounds, each with 95 % confidence.
        differs: whether any timestep differs from the pick, in either direction, with 95 % confidence for all at once.
    """

    best_timestep: int
    estimate: float
    lower: float
    upper: float
    differs: bool


def resampled_means(values: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Means over bootstrap samples of the rows: `(images, timesteps)` to `(resamples, timesteps)`."""
    count = len(values)
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=resamples)
    return draws @ values / count


def paired_deviations(outcomes: np.ndarray, pick: int, seed: int, span: float = 1.0) -> np.ndarray:
    """The bootstrap's `d*_t - d_t` from outcomes: `(images, timesteps)` to `(resamples, timesteps)`.

    Args:
        span: largest difference of two outcomes; 1 if they are right or wrong.
    """
    imaginary = np.full((1, outcomes.shape[1]), span)
    imaginary[0, pick] = 0
    differences = np.concatenate([outcomes - outcomes[:, [pick]], imaginary, -imaginary])
    return resampled_means(differences, seed) - differences.mean(axis=0)


def unpaired_deviations(standard_errors: Sequence[float], pick: int, seed: int) -> np.ndarray:
    """The same if only standard errors are known: normal, and independent between timesteps.

    True errors correlate, because the same images are hard at all timesteps; independent errors widen the bounds.
    """
    errors = np.asarray(standard_errors)
    noise = np.random.default_rng(seed).standard_normal((RESAMPLES, len(errors))) * errors
    return noise - noise[:, [pick]]


def estimate_regret(timesteps: Sequence[int], scores: Sequence[float], deviations: np.ndarray, pick: int) -> Regret:
    """Estimate and bounds from scores in [0, 1] and the bootstrap's deviations.

    Args:
        deviations: `(resamples, timesteps)`, of each timestep's difference from the pick.
        pick: index of the pick.
    """
    gains = np.asarray(scores) - scores[pick]
    best = int(gains.argmax())
    errors = deviations.std(axis=0)
    scaled = deviations / np.where(errors > 0, errors, 1.0)
    several, either = (np.quantile(x.max(axis=1), CONFIDENCE) for x in (scaled, np.abs(scaled)))
    lower = max(0.0, float((gains - several * errors).max()))
    upper = max(lower, float((gains - np.quantile(deviations, 1 - CONFIDENCE, axis=0)).max()))
    estimate = 2 * gains[best] - (gains + deviations).max(axis=1).mean()
    return Regret(
        best_timestep=int(timesteps[best]),
        estimate=100 * float(np.clip(estimate, lower, upper)),
        lower=100 * lower,
        upper=100 * upper,
        differs=bool((np.abs(gains) > either * errors).any()),
    )


def paired_regret(timesteps: Sequence[int], outcomes: np.ndarray, pick: int, seed: int, span: float = 1.0) -> Regret:
    """`estimate_regret` from the outcomes `(images, timesteps)` themselves; `span`: see `paired_deviations`."""
    deviations = paired_deviations(outcomes, pick, seed, span)
    return estimate_regret(timesteps, outcomes.mean(axis=0).tolist(), deviations, pick)


def best_exceeds(outcomes: np.ndarray, level: float, seed: int) -> bool:
    """Whether the score exceeds `level` at some timestep, with 95 % confidence for all timesteps together."""
    means = outcomes.mean(axis=0)
    deviations = resampled_means(outcomes, seed) - means
    errors = deviations.std(axis=0)
    several = np.quantile((deviations / np.where(errors > 0, errors, 1.0)).max(axis=1), CONFIDENCE)
    return bool((means - several * errors > level).any())


def pick_shares(per_image: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """How often each timestep has the highest mean over a bootstrap sample of images: `(timesteps,)` with sum 1."""
    picks = resampled_means(per_image, seed, resamples).argmax(axis=1)
    return np.bincount(picks, minlength=per_image.shape[1]) / resamples
