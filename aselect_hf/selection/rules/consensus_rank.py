"""Consensus and effective rank together: what timesteps agree on, read from features that keep many directions."""

from __future__ import annotations

from functools import partial

import numpy as np

from aselect_hf.selection.criteria import clusters_logme, consensus, rankme
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.judges import Judge, Judged
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.selection.rule import Criterion, rule
from aselect_hf.selection.rules.consensus import warn_of_few
from aselect_hf.selection.scoring import select_without_labels
from aselect_hf.selection.ties import ROUNDING
from aselect_hf.selection.uncertainty import Evidence, Jackknife

SCORE_NAME = "consensus and RankMe, each from 0 to 1"


def span_of(scores: np.ndarray) -> float:
    """By how much scores differ, highest less lowest; infinite if only by rounding, so that they do not count."""
    span = float(np.ptp(scores))
    return span if span > ROUNDING * np.abs(scores).max() else np.inf


def sum_of_scaled(one: np.ndarray, other: np.ndarray, weight: float = 1.0) -> np.ndarray:
    """The sum of two curves `(timesteps,)`, each scaled so that its lowest score is 0 and its highest 1.

    Args:
        weight: how often the other curve counts.
    """
    return (one - one.min()) / span_of(one) + weight * (other - other.min()) / span_of(other)


def scores_of(candidates: list[np.ndarray]) -> np.ndarray:
    """Scores of all candidates, `(images, width)` each."""
    return sum_of_scaled(consensus(candidates).scores, np.array([rankme(each) for each in candidates]))


@rule(
    "consensus_rank",
    labels="none",
    explanation="Takes the timestep whose features recover the clusters of images that all timesteps agree on and also "
    "have a high effective rank; both scores count alike.",
    num_images=256,
    criterion=Criterion(scores_of, "images", SCORE_NAME, together=True),
)
def select_consensus_rank(inputs: SelectionInputs, *, pool_size: int = 1) -> TimestepSelection:
    """Add the scores of `criteria.consensus` and `criteria.rankme`, each scaled to 0..1 over the candidates (ours).

    Both read the same features, so the sum costs no more runs than either. Consensus alone is nearly flat over many
    timesteps of some networks; there the rank decides. `docs/evidence.md` shows what each loses.

    The jackknife of the standard errors keeps the clusters and both scales fixed.

    Args:
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
    """
    warn_of_few("consensus_rank", len(inputs.images))
    jackknife = Jackknife.of(len(inputs.images), inputs.seed)
    judge = Judge("consensus_rank", SCORE_NAME, partial(_judge, jackknife=jackknife, seed=inputs.seed), together=True)
    return select_without_labels(inputs, "consensus_rank", pool_size=pool_size, judge=judge)


def _judge(candidates: list[np.ndarray], jackknife: Jackknife, seed: int) -> Judged:
    features = [candidate[:, 0] for candidate in candidates]
    found, ranks = consensus(features, seed=seed), np.array([rankme(each) for each in features])
    spans = span_of(found.scores), span_of(ranks)

    def evidence(candidate: np.ndarray) -> Evidence:
        def score(rows: np.ndarray) -> float:
            some = candidate[rows, 0]
            return clusters_logme(some, found.clusters[:, rows]) / spans[0] + rankme(some) / spans[1]

        return jackknife.evidence(score)

    return Judged(sum_of_scaled(found.scores, ranks), evidence)
