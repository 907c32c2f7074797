"""The curves that an audit compares: those of HFR, of the rule that picked, and of the rule that checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from aselect_hf.audit.regret import Regret, estimate_regret, paired_regret, unpaired_deviations
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection import TimestepSelection, default_timesteps, select_timestep
from aselect_hf.selection.rule import BY_CLUSTERS, CHECK_WITHOUT_LABELS

NUM_AUDITED = 1000
"""Default number of labeled images. With 500, the error of a regret is as large as the regrets that matter."""
LEAST_CURVE = 3
"""Timesteps that two rules must both have scored before their curves are compared."""


@dataclass
class Curves:
    """The selections that an audit compares.

    Args:
        name: name of the rule that picked, see `Audit.method`.
        rule: name of the rule that checks.
        grid: timesteps of the curves of HFR and of the check.
    """

    name: str
    rule: str
    grid: list[int]
    hfr: TimestepSelection
    picked: TimestepSelection
    checked: TimestepSelection


def compared_curves(
    model: NoisyBackbone,
    data: ImageData,
    picked: TimestepSelection,
    grid: list[int],
    labeled: bool,
    num_images: int | None,
    pool_size: int,
    run: dict[str, Any],
) -> Curves:
    """The curves of HFR and of the rule that checks, over the grid; the pick's own curve is not computed again."""
    run = run | {"timesteps": grid, "num_images": num_images}
    name = rule_name(picked, grid)
    hfr = picked if name == "hfr" else select_timestep(model, data, method="hfr", **run)
    rule = "ridge" if labeled else "hfr" if picked.method in BY_CLUSTERS else CHECK_WITHOUT_LABELS
    if rule == "hfr":
        checked = hfr
    elif rule == name and picked.timesteps == grid:
        checked = picked
    else:
        if labeled:
            run["num_images"] = num_images or NUM_AUDITED
        checked = select_timestep(model, data, method=rule, pool_size=pool_size, **run)
    return Curves(name, rule, grid, hfr, picked, checked)


def audited_timesteps(
    model: NoisyBackbone, picked: TimestepSelection, timesteps: Sequence[int] | int | None
) -> list[int]:
    """The timesteps that the rule scored, and all candidates if it did not score all of them.

    Raises:
        ValueError: there are fewer than 2.
    """
    grid = set(picked.timesteps) | {picked.timestep}
    if not picked.scored_all:
        schedule = model.noise_schedule
        if timesteps is None:
            grid |= set(default_timesteps(schedule))
        else:
            grid |= set(default_timesteps(schedule, timesteps) if isinstance(timesteps, int) else timesteps)
    if len(grid) < 2:
        raise ValueError(f"timesteps must hold at least 2 to compare, got {len(grid)}")
    return sorted(grid)


def rule_name(picked: TimestepSelection, grid: list[int]) -> str:
    """See `Audit.method`."""
    if picked.method != "hfr":
        return picked.method
    if not picked.options.get("noise_correction", True):
        return "hfr, uncorrected"
    return "hfr" if picked.timesteps == grid and picked.scored_all else "hfr, searched"


def regret_by(checked: TimestepSelection, pick: int, seed: int) -> Regret:
    """Regret of the pick by another rule's curve, paired if that rule scores single images."""
    if checked.per_image_scores is None:
        deviations = unpaired_deviations(checked.standard_errors, pick, seed)
        return estimate_regret(checked.timesteps, checked.scores, deviations, pick)
    outcomes = np.array(checked.per_image_scores)
    span = float(np.ptp(outcomes)) if checked.method == "hfr" else 1.0
    return paired_regret(checked.timesteps, outcomes, pick, seed, span)


def rank_correlation(one: TimestepSelection, other: TimestepSelection) -> float | None:
    """Spearman's rank correlation over the timesteps that both scored; 0 if a curve is constant, `None` below 3."""
    curves = [dict(zip(each.timesteps, each.scores, strict=False)) for each in (one, other)]
    common = sorted(set(curves[0]) & set(curves[1]))
    if len(common) < LEAST_CURVE:
        return None
    first, second = ([curve[t] for t in common] for curve in curves)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(spearmanr(first, second).statistic)
