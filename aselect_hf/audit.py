"""Whether to trust the timestep that HFR picks for one's own model and images: one sentence, and the evidence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from aselect_hf.data import ImageData
from aselect_hf.files import atomic_file
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.plots import plot_audit
from aselect_hf.regret import (
    Regret,
    best_exceeds,
    estimate_regret,
    paired_deviations,
    pick_shares,
    unpaired_deviations,
)
from aselect_hf.selection import TimestepSelection, select_timestep
from aselect_hf.selection.criterion import NUM_LABELLED, has_classes

TRUST, UNCERTAIN, DO_NOT_TRUST = VERDICTS = ("trust", "uncertain", "do not trust")
TOLERANCE = 2.0
"""Points of the probe's score that a pick may lose and still be trusted."""
PICK_RESAMPLES = 100
STABLE_SHARE = 0.8
"""Share of bootstrap picks at the commonest one and its neighbours, below which the pick is unstable (ours)."""
ALIKE = 0.5
"""Rank correlation of two curves from which their rules agree (ours)."""
NOISE_SHARE = 0.9
"""Share of the images' HFR that pure noise reaches, from which the feature is mostly noise or position (ours)."""
FEW_IMAGES, FEW_LABELLED = 32, 100


@dataclass
class Audit:
    """A verdict on the timestep that HFR picked.

    Args:
        verdict: `"trust"`, `"uncertain"` or `"do not trust"`.
        sentence: the verdict and its reason.
        warnings: what else a user should know.
        timestep: HFR's pick.
        selections: by name: `"hfr"`, and `"ridge"` (labels or masks) or `"retrieval"` (none).
        pick_shares: of every timestep, how often HFR picks it from a bootstrap sample of the images; their sum is 1.
        regret: of the pick by the probe's curve, in points; `None` without labels.
        chance: accuracy of always answering the commonest class; `None` without labels, and for masks.
        rank_correlation: Spearman's, of HFR's curve with the other one's.
        tolerance: points that the pick may lose.
    """

    verdict: str
    sentence: str
    warnings: list[str]
    timestep: int
    selections: dict[str, TimestepSelection]
    pick_shares: list[float]
    regret: Regret | None
    chance: float | None
    rank_correlation: float
    tolerance: float

    def describe(self) -> str:
        """Verdict, sentence and warnings, a line each."""
        return "\n".join([f"{self.verdict}: {self.sentence}", *(f"warning: {warning}" for warning in self.warnings)])

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON, whole or not at all."""
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        return Path(path)

    def plot(self, path: str | Path) -> Path:
        """Draw all curves, the bootstrap's picks and the pick; whole or not at all."""
        with atomic_file(path) as temporary:
            plot_audit(self, temporary)
        return Path(path)


def audit_timestep(
    model: ASelectDiTModel,
    images: Any,
    *,
    feature: str | None = None,
    timesteps: Sequence[int] | int | None = None,
    num_images: int | None = None,
    tolerance: float = TOLERANCE,
    pool_size: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    on_error: str = "stop",
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Audit:
    """Pick a timestep by HFR, then check the pick by a rule that shares nothing with it.

    With labels or masks: a leave-one-out ridge probe at every timestep on at most 500 images. The regret of the pick by
    its curve, with bounds by a bootstrap over images (`aselect_hf.regret` has the formulas), decides: `"trust"` where
    the upper bound is within `tolerance`, `"do not trust"` where the lower bound is beyond it or the probe is nowhere
    above chance, else `"uncertain"`. For masks, the score is the mean IoU of tokens, and its errors at two timesteps
    count as independent. Without labels of two classes: agreement with instance retrieval between views, `"trust"`
    where picks are equal or neighbours on the grid, curves alike and the pick stable; see `judge_by_agreement`.

    Args:
        images, feature, timesteps, seed, batch_size, on_error, cache_dir, progress: see `select_timestep`.
        num_images: random images for every rule; default 64 for HFR, 500 for the probe, 256 for retrieval.
        tolerance: points of the probe's score (accuracy or mean IoU) that the pick may lose.
        pool_size: cells per side into which tokens are averaged for probe and retrieval, see `pooled_features`: as the
            features will be used.

    Raises:
        ValueError: an argument is wrong, fewer than 2 timesteps or 3 images, and as `select_timestep`.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be a positive number of points, got {tolerance}")
    data = ImageData.of(images, num_images or NUM_LABELLED).sample(num_images or NUM_LABELLED, seed).readable(on_error)
    run: dict[str, Any] = {"feature": feature, "timesteps": timesteps, "seed": seed, "batch_size": batch_size}
    run |= {"num_images": num_images, "cache_dir": cache_dir, "progress": progress}
    hfr = select_timestep(model, data, method="hfr", **run)
    grid = hfr.timesteps
    if len(grid) < 2:
        raise ValueError(f"timesteps must be at least 2 to compare, got {len(grid)}")
    pick = grid.index(hfr.timestep)
    shares = pick_shares(np.array(hfr.per_image_scores), seed, PICK_RESAMPLES)
    warnings = warn_of_pick(hfr, shares)
    labelled = data.masks is not None or has_classes(data.labels)
    checked = select_timestep(
        model, data, method="ridge" if labelled else "retrieval", pool_size=pool_size, **run,
    )  # fmt: skip
    correlation = rank_correlation(hfr.scores, checked.scores)
    regret = regret_by(checked, pick, seed)
    chance = None
    if labelled:
        informative = True
        if data.masks is None:
            chance = float(np.unique(np.asarray(data.labels), return_counts=True)[1].max() / len(data))
            informative = best_exceeds(np.array(checked.per_image_scores), chance, seed)
        verdict, sentence = judge_by_probe(checked, pick, regret, tolerance, informative)
        if checked.num_images < FEW_LABELLED:
            warnings.append(f"the probe has only {checked.num_images} images: label {FEW_LABELLED} or more")
    else:
        if data.labels is not None:
            warnings.append("the labels are not of 2 classes with 2 images each: they were not used")
        verdict, sentence = judge_by_agreement(hfr, checked, correlation, regret.lower > 0, _is_stable(shares))
    return Audit(
        verdict=verdict,
        sentence=sentence,
        warnings=warnings,
        timestep=hfr.timestep,
        selections={"hfr": hfr, checked.method: checked},
        pick_shares=shares.tolist(),
        regret=regret if labelled else None,
        chance=chance,
        rank_correlation=correlation,
        tolerance=tolerance,
    )


def judge_by_probe(
    probe: TimestepSelection, pick: int, regret: Regret, tolerance: float, informative: bool
) -> tuple[str, str]:
    """Verdict and sentence where there are labels.

    The curve is called flat where it varies by no more than `tolerance`, or nothing on it differs from the pick beyond
    its error. The bounds decide all the same: of too few images every curve is flat.

    Args:
        pick: index of the pick.
        informative: whether the probe is above chance somewhere.
    """
    grid, t = probe.timesteps, probe.timesteps[pick]
    evidence = f"leave-one-out ridge, {probe.num_images} images"
    if not informative:
        return DO_NOT_TRUST, f"features tell nothing about these labels at any timestep ({evidence})"
    spread = 100 * (max(probe.scores) - min(probe.scores))
    flat = ""
    if spread <= tolerance:
        flat = f"the curve is flat: any timestep from {grid[0]} to {grid[-1]} is as good; "
    elif not regret.differs:
        flat = f"the curve is flat within its error: none from {grid[0]} to {grid[-1]} differs from t = {t}; "
    if regret.upper <= tolerance:
        bound = f"t = {t} is within {regret.upper:.1f} points of the best of the grid"
        return TRUST, f"{flat}{bound} with 95 % confidence ({evidence})"
    if regret.lower > tolerance:
        loss = f"t = {t} loses about {regret.estimate:.1f} points against t = {regret.best_timestep}"
        return DO_NOT_TRUST, f"{loss}, at least {regret.lower:.1f} with 95 % confidence ({evidence})"
    loss = f"t = {t} may lose up to {regret.upper:.1f} points against the best of the grid"
    return UNCERTAIN, f"{flat}{loss} (95 % confidence; estimate {regret.estimate:.1f}; {evidence})"


def judge_by_agreement(
    hfr: TimestepSelection, retrieval: TimestepSelection, correlation: float, refuted: bool, stable: bool
) -> tuple[str, str]:
    """Verdict and sentence where there are no labels.

    Args:
        correlation: rank correlation of the curves.
        refuted: whether retrieval is better elsewhere than at HFR's pick with 95 % confidence.
        stable: whether HFR picks much the same timestep from other samples of the images.
    """
    picks = f"HFR t = {hfr.timestep}, retrieval t = {retrieval.timestep}"
    near = abs(hfr.timesteps.index(hfr.timestep) - hfr.timesteps.index(retrieval.timestep)) <= 1
    if not near and (refuted or correlation < ALIKE):
        return DO_NOT_TRUST, (
            f"no labels, and independent rules disagree ({picks}): do not trust this; "
            f"label {FEW_LABELLED} images and run again"
        )
    evidence = f"{picks}, rank correlation {correlation:.2f}"
    if near and correlation >= ALIKE and stable:
        return (
            TRUST,
            f"no labels, but independent rules agree ({evidence}); labels would say how many points it may lose",
        )
    doubt = "agree only in part" if stable else "agree, but HFR's pick is unstable"
    return UNCERTAIN, f"no labels, and independent rules {doubt} ({evidence}): label {FEW_LABELLED} images to be sure"


def warn_of_pick(hfr: TimestepSelection, shares: np.ndarray) -> list[str]:
    """What is suspicious about HFR's own curves.

    Args:
        shares: see `Audit.pick_shares`.
    """
    raw, control = np.array(hfr.raw_scores), np.array(hfr.control_scores)
    grid, schedule, warnings = hfr.timesteps, hfr.noise_schedule, []
    pick, raw_pick = grid.index(hfr.timestep), int(raw.argmax())
    if hfr.num_images < FEW_IMAGES:
        warnings.append(f"HFR saw only {hfr.num_images} images: give {FEW_IMAGES} or more")
    if not _is_stable(shares):
        picked = ", ".join(f"t = {grid[i]} ({shares[i]:.0%})" for i in np.argsort(-shares, kind="stable")[:3])
        warnings.append(f"the pick is unstable: other samples of the images give {picked}")
    if raw_pick > pick + 1 and schedule.log_snr(grid[raw_pick]) < 0:
        warnings.append(
            f"HFR without noise correction would pick t = {grid[raw_pick]}, where the input is mostly noise: "
            "do not use the raw curve"
        )
    if raw[pick] > 0 and (share := control[pick] / raw[pick]) >= NOISE_SHARE:
        warnings.append(
            f"at t = {hfr.timestep} pure noise has {share:.0%} of the images' HFR: "
            "the feature is mostly noise or position there"
        )
    return warnings


def regret_by(checked: TimestepSelection, pick: int, seed: int) -> Regret:
    """Regret of the pick by another rule's curve; paired where that rule scores single images."""
    if checked.per_image_scores is not None:
        deviations = paired_deviations(np.array(checked.per_image_scores), pick, seed)
    else:
        deviations = unpaired_deviations(checked.standard_errors, pick, seed)
    return estimate_regret(checked.timesteps, checked.scores, deviations, pick)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, from -1 to 1; 0 where a curve is constant."""
    if any(np.ptp(curve) == 0 for curve in (one, other)):
        return 0.0
    return float(spearmanr(one, other).statistic)


def _is_stable(shares: np.ndarray) -> bool:
    """Whether the commonest pick and its neighbours on the grid are nearly all of them."""
    mode = int(shares.argmax())
    return bool(shares[max(mode - 1, 0) : mode + 2].sum() >= STABLE_SHARE)
