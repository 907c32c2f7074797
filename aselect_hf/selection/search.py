"""Finding the best candidate without scoring every candidate on every image.

`race` drops candidates as soon as they are significantly worse than the leader. `coarse_to_fine` scores every fourth
candidate and closes in on the leaders. Both compare candidates image by image, so an image that adds the same to all
of its scores changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
from scipy.stats import t as student_t

from aselect_hf.selection.ties import best_of, ranking

Scores = Callable[[list[int], int], np.ndarray]
"""`scores(candidates, num_images)`: the scores of the first images, `(num_images, len(candidates))`."""

FIRST_LOOK = 16
STRIDE = 4
SEARCHES = ("full", "coarse_to_fine")
LEADERS_ALPHA = 0.05
"""Error probability at which a coarse search without early stopping rules out a leader."""


def choose(scores: Scores, num: int, num_images: int, search: str = "full", early_stopping: float | None = None) -> int:
    """The best of `num` ordered candidates by mean score over at most `num_images`.

    Args:
        search, early_stopping: see `rules.hfr.select_hfr`.
    """
    looks = [num_images] if early_stopping is None else looks_at(num_images)
    level = (early_stopping or LEADERS_ALPHA) / (max(1, num - 1) * len(looks))
    leaders_of = partial(race, scores, looks=looks, level=level)
    return leaders_of(list(range(num)))[0] if search == "full" else coarse_to_fine(leaders_of, num)


def looks_at(num_images: int) -> list[int]:
    """Numbers of images after which candidates are compared: 16, doubled until all are used."""
    looks: list[int] = []
    while FIRST_LOOK * 2 ** len(looks) < num_images:
        looks.append(FIRST_LOOK * 2 ** len(looks))
    return [*looks, num_images]


def race(scores: Scores, candidates: list[int], looks: list[int], level: float) -> list[int]:
    """The candidates that are not beaten, best mean first; equal means keep their order.

    A candidate is dropped for good when a one-sided paired t test says at `level` that the leader's mean score is
    higher. The race ends when one candidate is left or the images are used up.

    This is a blocking race (Moore & Lee 1994), stopped early as in successive elimination (Even-Dar et al. 2006). With
    `level = alpha / (other candidates * looks)` (Bonferroni), the probability of dropping the truly best candidate is
    at most `alpha` for any number of images, because another candidate must beat it at one of the looks. The t test is
    exact if differences between candidates are normally distributed over images, and conservative if they have heavy
    symmetric tails. It errs more often if they are strongly skewed.

    Args:
        scores: see `Scores`.
        candidates: ascending.
        looks: see `looks_at`.
    """
    alive, values = list(candidates), np.empty((0, 0))
    for num_images in looks:
        values = scores(alive, num_images)
        kept = ~beaten(values, level)
        alive, values = [c for c, keep in zip(alive, kept, strict=True) if keep], values[:, kept]
        if len(alive) == 1:
            break
    return [alive[index] for index in ranking(values.mean(axis=0))]


def beaten(values: np.ndarray, level: float) -> np.ndarray:
    """Which columns of `(images, candidates)` have a mean significantly below the highest (one-sided, at `level`)."""
    num_images = len(values)
    leader = best_of(values.mean(axis=0))
    differences = values[:, [leader]] - values
    errors = differences.std(axis=0, ddof=1) / num_images**0.5
    return differences.mean(axis=0) > student_t.isf(level, num_images - 1) * errors


def coarse_to_fine(leaders_of: Callable[[list[int]], list[int]], num: int, stride: int = STRIDE) -> int:
    """The best of `num` ordered candidates, starting from every `stride`-th one.

    Gaps beside a leader are halved until none is left. If scores rise to a single peak and then fall, with or without
    flat stretches, the result is the same as from scoring all candidates. On other curves, a peak that is narrower than
    `stride` candidates and away from the coarse leaders is missed.

    Args:
        leaders_of: returns the best of some candidates, followed by those not significantly worse.
    """
    scored = sorted({*range(0, num, stride), num - 1})
    while True:
        leaders = leaders_of(scored)
        gaps = [(a, b) for a, b in pairwise(scored) if b - a > 1 and not {a, b}.isdisjoint(leaders)]
        if not gaps:
            return leaders[0]
        scored = sorted({*scored, *((a + b) // 2 for a, b in gaps)})
