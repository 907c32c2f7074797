"""Consensus: how well a candidate recovers the clusters of images that the candidates agree on."""

from __future__ import annotations

from functools import partial

import numpy as np
from transformers.utils import logging

from aselect_hf.selection.criteria import clusters_logme, consensus
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.judges import Judge, Judged
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.selection.rule import Criterion, rule
from aselect_hf.selection.scoring import select_without_labels
from aselect_hf.selection.uncertainty import Evidence, Jackknife

logger = logging.get_logger(__name__)

LEAST_FOR_CLUSTERS = 128
"""With fewer images `consensus` is often far off (`docs/evidence.md`, the column of 64 images)."""
SCORE_NAME = "LogME of the clusters that timesteps agree on"


def warn_of_few(name: str, count: int) -> None:
    """Log that a rule has too few images to form clusters, if so."""
    if count < LEAST_FOR_CLUSTERS:
        logger.warning("%s has %d images: with fewer than %d it is often far off", name, count, LEAST_FOR_CLUSTERS)


@rule(
    "consensus",
    labels="none",
    explanation="Takes the timestep whose features best recover the clusters of images that all timesteps agree on.",
    num_images=256,
    criterion=Criterion(lambda candidates: consensus(candidates).scores, "images", SCORE_NAME, together=True),
)
def select_consensus(inputs: SelectionInputs, *, pool_size: int = 1) -> TimestepSelection:
    """Score each candidate by `criteria.consensus`, with the stored noise.

    The jackknife of the standard errors keeps the clusters fixed.

    Args:
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
    """
    warn_of_few("consensus", len(inputs.images))
    jackknife = Jackknife.of(len(inputs.images), inputs.seed)
    judge = Judge("consensus", SCORE_NAME, partial(_judge, jackknife=jackknife, seed=inputs.seed), together=True)
    return select_without_labels(inputs, "consensus", pool_size=pool_size, judge=judge)


def _judge(candidates: list[np.ndarray], jackknife: Jackknife, seed: int) -> Judged:
    found = consensus([candidate[:, 0] for candidate in candidates], seed=seed)

    def evidence(candidate: np.ndarray) -> Evidence:
        return jackknife.evidence(lambda rows: clusters_logme(candidate[rows, 0], found.clusters[:, rows]))

    return Judged(found.scores, evidence)
