"""The warnings of an audit: what is suspicious about a pick, about the curves of HFR, and about the model."""

from __future__ import annotations

import numpy as np

from aselect_hf.audit.regret import paired_regret, pick_shares
from aselect_hf.audit.verdicts import written
from aselect_hf.selection import TimestepSelection
from aselect_hf.selection.rule import BY_CLUSTERS
from aselect_hf.selection.rules.consensus import LEAST_FOR_CLUSTERS
from aselect_hf.selection.ties import best_of

# What the warnings rest on (ours).
PICK_RESAMPLES = 100
STABLE_SHARE = 0.8
"""A pick is unstable if the most common bootstrap pick and its neighbors have a smaller share."""
NOISE_SHARE = 0.9
"""A feature is mostly noise or position if pure noise reaches this share of the images' HFR."""
FEW_IMAGES = 32
FEW_TIMESTEPS = 5
"""Below so many timesteps rules agree too easily: two independent orders of 3 are alike (0.5) every other time."""


def warn_of_pick(hfr: TimestepSelection, picked: TimestepSelection, name: str, shares: np.ndarray | None) -> list[str]:
    """What is suspicious about the pick and HFR's curves.

    Args:
        hfr: the whole corrected curve.
        name, shares: see `Audit`.
    """
    grid, schedule, warnings = hfr.timesteps, hfr.noise_schedule, picked.doubts()
    pick, raw_pick = grid.index(picked.timestep), best_of(hfr.raw_scores or [])
    enough = LEAST_FOR_CLUSTERS if picked.method in BY_CLUSTERS else FEW_IMAGES
    if picked.scores and picked.num_images < enough:
        warnings.append(f"{written(name)} saw only {picked.num_images} images: give {enough} or more")
    if shares is not None and not _is_stable(shares):
        common = ", ".join(f"t = {grid[i]} ({shares[i]:.0%})" for i in np.argsort(-shares, kind="stable")[:3])
        warnings.append(f"the pick is unstable: other samples of the images give {common}")
    if name == "hfr, uncorrected" and schedule.log_snr(picked.timestep) < 0:
        warnings.append(
            f"HFR without noise correction picked t = {picked.timestep}, where the input is mostly noise: "
            "turn the noise correction on"
        )
    elif picked.method == "hfr" and raw_pick > pick + 1 and schedule.log_snr(grid[raw_pick]) < 0:
        warnings.append(
            f"HFR without noise correction would pick t = {grid[raw_pick]}, where the input is mostly noise: "
            "do not use the raw curve"
        )
    if (share := noise_share(hfr, picked.timestep)) >= NOISE_SHARE:
        warnings.append(
            f"at t = {picked.timestep} pure noise reaches {share:.0%} of the images' HFR: "
            "the feature is mostly noise or position there"
        )
    return warnings


def doubt_of_agreement(picked: TimestepSelection, checked: TimestepSelection) -> str:
    """Why agreement of two rules means little; empty if it counts."""
    if checked.tied:
        return f"{written(checked.method)} gives all timesteps the same score"
    if len(checked.timesteps) < FEW_TIMESTEPS:
        return f"{len(checked.timesteps)} timesteps are too few to tell"
    if picked.hangs_on_rounding:
        return f"the pick of {written(picked.method)} depends on rounding"
    return ""


def doubt_of_pick(hfr: TimestepSelection, picked: TimestepSelection, name: str, shares: np.ndarray | None) -> str:
    """Why not to trust the pick although the rules agree; empty if there is no reason."""
    if shares is not None and not _is_stable(shares):
        return f"the pick of {written(name)} is unstable"
    if noise_share(hfr, picked.timestep) >= NOISE_SHARE:
        return "the feature is mostly noise or position at this timestep"
    return ""


def noise_share(hfr: TimestepSelection, timestep: int) -> float:
    """HFR of pure noise over HFR of the images at a timestep; 0 if the images have none."""
    at = hfr.timesteps.index(timestep)
    raw, control = (hfr.raw_scores or [])[at], (hfr.control_scores or [])[at]
    return control / raw if raw > 0 else 0.0


def shares_of_picks(picked: TimestepSelection, grid: list[int], seed: int) -> np.ndarray | None:
    """See `Audit.pick_shares`; `None` also if some images were not scored at some timesteps.

    Standard errors cannot replace the scores of images: most of LogME's error is common to all timesteps, and
    independent draws would call every pick unstable.
    """
    scores = np.array(picked.per_image_scores or [], dtype=float)
    if not scores.size or np.isnan(scores).any():
        return None
    shares = np.zeros(len(grid))
    shares[[grid.index(t) for t in picked.timesteps]] = pick_shares(scores, seed, PICK_RESAMPLES)
    return shares


def _is_stable(shares: np.ndarray) -> bool:
    """Whether the most common pick and its neighbors on the grid make up nearly all picks."""
    mode = int(shares.argmax())
    return bool(shares[max(mode - 1, 0) : mode + 2].sum() >= STABLE_SHARE)


def warn_of_model(probe: TimestepSelection, twin: TimestepSelection, seed: int) -> list[str]:
    """Warn if the best score of the probe is not significantly above that of an untrained network.

    Args:
        twin: the probe of the untrained network on the same images, at the timestep of the best score.
    """
    best = probe.timesteps.index(probe.timestep)
    outcomes = np.stack([np.array(x)[:, at] for x, at in ((twin.per_image_scores, 0), (probe.per_image_scores, best))])
    if paired_regret([probe.timestep] * 2, outcomes.T, 0, seed).lower > 0:
        return []
    scores = f"{100 * max(probe.scores):.0f} % vs {100 * twin.scores[0]:.0f} % at t = {probe.timestep}"
    doubt = f"the features are not significantly better than an untrained network's ({scores})"
    return [f"{doubt}; check that the checkpoint is trained and was loaded correctly"]
