"""Several timesteps together: greedy forward selection of those whose features a head reads side by side.

Concatenating features of several timesteps is not from the A-SelecT paper; Oh et al. (arXiv 2512.23210) and DifFormer
fuse several. The greedy search by a rule's own evidence is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from aselect_hf.selection.rule import RULES
from aselect_hf.selection.ties import best_of, near_best

Z_95 = 1.645
"""One-sided 95 % of a normal distribution."""


def check_fusing(method: str, num_timesteps: int, num_candidates: int | None = None) -> None:
    """Refuse to fuse timesteps by a rule that cannot score them side by side.

    Raises:
        ValueError: the number is below 1, above that of the candidates, or above 1 for a rule without a criterion of
            labeled rows.
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps_to_fuse must be at least 1, got {num_timesteps}")
    fusing = [name for name, rule in RULES.items() if rule.criterion and rule.criterion.sees == "labeled rows"]
    if num_timesteps > 1 and method not in fusing:
        raise ValueError(
            f"num_timesteps_to_fuse={num_timesteps} needs a rule that scores features side by side with labels, "
            f"{' or '.join(fusing)}; got {method!r}"
        )
    if num_candidates is not None and num_timesteps > num_candidates:
        raise ValueError(f"num_timesteps_to_fuse={num_timesteps} is more than the {num_candidates} candidate timesteps")


def fuse(
    score: Callable[[list[np.ndarray]], Sequence[float]],
    per_image: Callable[[np.ndarray], np.ndarray | None],
    cells: np.ndarray,
    first: int,
    count: int,
) -> tuple[list[int], list[float]]:
    """Add, to the first timestep, the one whose features raise the score most, until `count` are chosen or none does.

    A score that is a mean over images must rise significantly: by 1.645 paired standard errors, one-sided 95 %. LogME
    must rise at all, since evidence falls with features that explain nothing.

    A timestep that repeats what the chosen ones tell does not raise the score, and so is not added. Each addition costs
    a pass of the network wherever the features are used, and one score for every remaining timestep here.

    Args:
        score: scores of a list of candidates, each `(rows, views, columns)`.
        per_image: the parts of a candidate's score, `(images,)`; `None` if it is not a mean over images.
        cells: `(timesteps, rows, views, columns)`, the feature at every timestep.
        first: index of the first timestep.
        count: how many to choose at most.

    Returns:
        Indices in order of choice, and the score after each. If the search stopped early, one score more: the best
        that another timestep would give.
    """
    chosen, scores = [first], [float(*score([cells[first]]))]
    while len(chosen) < min(count, len(cells)):
        rest = [index for index in range(len(cells)) if index not in chosen]
        together = [np.concatenate([cells[index] for index in (*chosen, other)], axis=-1) for other in rest]
        found = [*score(together)]
        best = best_of(found)
        scores.append(float(found[best]))
        before = np.concatenate([cells[index] for index in chosen], axis=-1)
        if near_best(scores[-2:])[0] or not _significant(per_image(before), per_image(together[best])):
            break
        chosen.append(rest[best])
    return chosen, scores


def _significant(before: np.ndarray | None, after: np.ndarray | None) -> bool:
    """Whether the mean rises by more than chance, if there is one."""
    if before is None or after is None:
        return True
    gains = after - before
    return bool(gains.mean() > Z_95 * gains.std(ddof=1) / len(gains) ** 0.5)
