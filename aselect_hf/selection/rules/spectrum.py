"""The spectrum of the features over images: RankMe and alpha-ReQ. `scoring.select_without_labels` lists the errors."""

from __future__ import annotations

from aselect_hf.selection import criteria, moments
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.selection.rule import Criterion, rule
from aselect_hf.selection.scoring import select_without_labels


@rule(
    "rankme",
    labels="none",
    explanation="Takes the timestep whose features have the highest effective rank over images (RankMe).",
    num_images=256,
    criterion=Criterion(criteria.rankme, "images", "RankMe (effective rank)", of_moments=moments.rankme),
)
def select_rankme(inputs: SelectionInputs, *, pool_size: int = 1) -> TimestepSelection:
    """Score each candidate by `criteria.rankme`, with the stored noise.

    Args:
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
    """
    return select_without_labels(inputs, "rankme", pool_size=pool_size)


@rule(
    "alpha_req",
    labels="none",
    explanation="Takes the timestep whose feature spectrum falls most nearly as one over the rank (alpha-ReQ).",
    num_images=256,
    criterion=Criterion(criteria.alpha_req, "images", "alpha-ReQ (-|alpha - 1|)", of_moments=moments.alpha_req),
)
def select_alpha_req(inputs: SelectionInputs, *, pool_size: int = 1) -> TimestepSelection:
    """Score each candidate by `criteria.alpha_req`, with the stored noise.

    Args:
        pool_size: Average tokens over an N x N grid of cells (default: 1, one mean over all tokens).
    """
    return select_without_labels(inputs, "alpha_req", pool_size=pool_size)
