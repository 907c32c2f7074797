"""One rule's best candidates, confirmed by another: by default a shortlist without labels, then a few labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from transformers.utils import logging

from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import TimestepSelection
from aselect_hf.selection.rule import RULES, Criterion, rule
from aselect_hf.selection.scoring import check_count
from aselect_hf.selection.ties import ranking

logger = logging.get_logger(__name__)

NUM_CANDIDATES = 5


def shortlisted(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Scores of the second rule, `(timesteps,)`, below all others where the first does not list the timestep."""
    listed = ranking(first)[:NUM_CANDIDATES]
    scores = np.full(len(second), -np.inf)
    scores[listed] = second[listed]
    return scores


@rule(
    "shortlist",
    labels="few",
    explanation="Lets one rule list the best timesteps, by default without labels, and another one choose among them, "
    "by default with a few.",
    num_images=500,
    runs=3,
    chooses_feature=True,
    criterion=Criterion(shortlisted, "scores", "the second rule's"),
    parts=("first", "second"),
)
def select_shortlist(
    inputs: SelectionInputs, *, first: str = "retrieval", second: str = "ridge", num_candidates: int = NUM_CANDIDATES
) -> TimestepSelection:
    """Score the best candidates of one rule by another, each with its default options.

    The result is the second rule's, over the shortlist; the first one's scores are in its options. A rule without
    labels sees no more images than it does by default. With `feature="auto"`, `first` chooses the feature.

    Args:
        first: Rule that makes the shortlist (default: retrieval).
        second: Rule that chooses from the shortlist (default: ridge).
        num_candidates: Timesteps on the shortlist, at least 2 (default: 5).

    Raises:
        ValueError: an unknown name, a shortlist shorter than 2, and as the two rules.
    """
    names = [name for name, each in RULES.items() if each.chooses_feature and not each.parts]
    for argument, name in (("first", first), ("second", second)):
        if name not in names:
            raise ValueError(f"{argument} must be one of {', '.join(names)}; got {name!r}")
    if num_candidates < 2:
        raise ValueError(f"num_candidates must be at least 2, got {num_candidates}")
    check_count("shortlist", inputs)
    data = inputs.images
    if RULES[second].labels == "few" and data.labels is None and data.masks is None:
        raise ValueError(f"{second} needs labels or masks; {data.name} has none: {data.no_labels}")
    some = data if RULES[first].labels == "few" else data.sample(RULES[first].num_images, inputs.seed)
    listed = RULES[first].select(replace(inputs, images=some))
    for doubt in listed.doubts():
        logger.warning("%s", doubt)
    timesteps = sorted(listed.timesteps[index] for index in ranking(listed.scores)[:num_candidates])
    chosen = RULES[second].select(replace(inputs, feature=listed.feature, timesteps=timesteps))
    options: dict[str, Any] = {"first": first, "second": second, "num_candidates": num_candidates}
    options |= {"first_timesteps": listed.timesteps, "first_scores": listed.scores, "first_images": listed.num_images}
    return replace(
        chosen,
        method="shortlist",
        cost=listed.cost + chosen.cost,
        options=options | chosen.options,
        feature_scores=listed.feature_scores,
    )
