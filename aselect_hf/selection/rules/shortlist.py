"""Two rules in turn: one lists the best candidates, by default without labels; another chooses among them."""

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
    """Scores of the second rule, `(timesteps,)`; minus infinity for timesteps that the first does not list."""
    listed = ranking(first)[:NUM_CANDIDATES]
    scores = np.full(len(second), -np.inf)
    scores[listed] = second[listed]
    return scores


@rule(
    "shortlist",
    labels="few",
    explanation="Lets one rule list the best timesteps, by default without labels, and another rule choose among them, "
    "by default with a few labels.",
    num_images=500,
    runs=3,
    criterion=Criterion(shortlisted, "scores", "the second rule's"),
    parts=("first", "second"),
)
def select_shortlist(
    inputs: SelectionInputs, *, first: str = "retrieval", second: str = "ridge", num_candidates: int = NUM_CANDIDATES
) -> TimestepSelection:
    """Score the best candidates of one rule by another, each with its default options.

    The result is that of the second rule on the shortlist; its options hold the scores of the first. A first rule
    without labels sees at most its default number of images.

    Args:
        first: Rule that makes the shortlist (default: retrieval).
        second: Rule that chooses from the shortlist (default: ridge).
        num_candidates: Timesteps on the shortlist, at least 2 (default: 5).

    Raises:
        ValueError: an unknown name, a shortlist shorter than 2, and the errors of both rules.
    """
    names = [name for name, each in RULES.items() if each.criterion is not None and not each.parts]
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
    chosen = RULES[second].select(replace(inputs, timesteps=timesteps))
    options: dict[str, Any] = {"first": first, "second": second, "num_candidates": num_candidates}
    options |= {"first_timesteps": listed.timesteps, "first_scores": listed.scores, "first_images": listed.num_images}
    return replace(
        chosen,
        method="shortlist",
        cost=listed.cost + chosen.cost,
        options=options | chosen.options,
    )
