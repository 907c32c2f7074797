"""Whether to trust a timestep for one's own model and images, whoever picked it: one sentence, and the evidence."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from aselect_hf.data import ImageData
from aselect_hf.files import atomic_file, read_record
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.plots import plot_audit
from aselect_hf.regret import (
    Regret,
    best_exceeds,
    estimate_regret,
    paired_regret,
    pick_shares,
    unpaired_deviations,
)
from aselect_hf.selection import TimestepSelection, default_timesteps, select_timestep
from aselect_hf.selection.criterion import AUTO, CRITERIA, LEAST_FOR_CLUSTERS, has_classes
from aselect_hf.selection.select import NO_LABELS, automatic_method

TRUST, UNCERTAIN, DO_NOT_TRUST = VERDICTS = ("trust", "uncertain", "do not trust")

# What the verdicts and warnings rest on (ours).
TOLERANCE = 2.0
"""Points of the probe's score that a trusted pick may lose by the estimate; by the bound, twice as many."""
NUM_AUDITED = 1000
"""Labelled images by default: with 500, the regret's errors are as large as what is to be told (`docs/evidence.md`)."""
PICK_RESAMPLES = 100
STABLE_SHARE = 0.8
"""Share of bootstrap picks at the commonest one and its neighbours, below which the pick is unstable."""
NEAR = 1
"""Places on the grid by which two picks may differ and still agree."""
ALIKE = 0.5
"""Rank correlation of two curves from which their rules agree."""
NOISE_SHARE = 0.9
"""Share of the images' HFR that pure noise reaches, from which the feature is mostly noise or position."""
FEW_IMAGES, FEW_LABELLED = 32, 100
LEAST_CURVE = 3
"""Timesteps that two rules must both have scored, for their curves to be compared."""


@dataclass
class Audit:
    """A verdict on a timestep that a rule has picked.

    Args:
        verdict: `"trust"`, `"uncertain"` or `"do not trust"`.
        sentence: the verdict and its reason.
        warnings: what else a user should know.
        method: the rule that picked; `"hfr, uncorrected"` and `"hfr, searched"` are an HFR other than that of the
            whole corrected curve, which is `"hfr"`.
        checked_by: the rule that checks: `"ridge"` (labels or masks), else `"consensus"`, and `"hfr"` for that one.
        timestep: the pick.
        selections: by name: `"hfr"`, always, then those of `method` and `checked_by`.
        pick_shares: of every timestep of `"hfr"`, how often the rule picks it from other samples of the images, by
            bootstrap; their sum is 1. `None` where the rule has no scores of single images.
        regret: of the pick by the probe's curve, in points; `None` without labels.
        chance: accuracy of always answering the commonest class; `None` without labels, and for masks.
        untrained: score of the same probe on the same network with random weights, at the timestep where the checked
            one is best; `None` without labels.
        rank_correlation: Spearman's, of the picking rule's curve with the check's; `None` where the rule has no curve,
            or is the check.
        tolerance: points that the pick may lose.
    """

    verdict: str
    sentence: str
    warnings: list[str]
    method: str
    checked_by: str
    timestep: int
    selections: dict[str, TimestepSelection]
    pick_shares: list[float] | None
    regret: Regret | None
    chance: float | None
    untrained: float | None
    rank_correlation: float | None
    tolerance: float

    @property
    def picked(self) -> TimestepSelection:
        """The selection under audit."""
        return self.selections[self.method]

    @property
    def checked(self) -> TimestepSelection:
        """The selection by the rule that checks."""
        return self.selections[self.checked_by]

    def describe(self) -> str:
        """Verdict, sentence and warnings, a line each."""
        return "\n".join([f"{self.verdict}: {self.sentence}", *(f"warning: {warning}" for warning in self.warnings)])

    def save(self, path: str | Path) -> Path:
        """Write everything as JSON, whole or not at all; `load` reads it back equal."""
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Audit:
        """Read what `save` wrote.

        Raises:
            ValueError: not such a file.
        """
        return read_record(path, cls.from_dict, "audit")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Audit:
        """Rebuild from the fields that `save` writes."""
        fields = {entry.name: content[entry.name] for entry in dataclasses.fields(cls)}
        selections = {name: TimestepSelection.from_dict(each) for name, each in fields["selections"].items()}
        regret = Regret(**fields["regret"]) if fields["regret"] else None
        return cls(**fields | {"selections": selections, "regret": regret})

    def plot(self, path: str | Path) -> Path:
        """Draw all curves, the bootstrap's picks and the pick; whole or not at all."""
        with atomic_file(path) as temporary:
            plot_audit(self, temporary)
        return Path(path)


def audit_timestep(
    model: ASelectDiTModel,
    images: Any,
    *,
    method: str = AUTO,
    selection: TimestepSelection | None = None,
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
    **options: Any,
) -> Audit:
    """Pick a timestep, or take a pick that was made, then check it by a rule that shares nothing with the picking one.

    With labels or masks: a leave-one-out ridge probe at every timestep on at most 1,000 images. The regret of the pick
    by its curve, with bounds by a bootstrap over images (`aselect_hf.regret` has the formulas), decides, see
    `verdict_of`. For masks, the score is the mean IoU of tokens, and what is resampled is every image's part in it.
    The probe also runs on an untrained network of the same shape (memory for both is needed): a checkpoint that is not
    surely better gets a warning, since verdicts are on timesteps.
    Without labels of two classes: agreement with an independent rule without labels (`"consensus"`; HFR where that one
    picked), `"trust"` where picks are equal or neighbours on the grid, curves alike and the pick stable; see
    `judge_by_agreement`. The curves of HFR are always there.

    Args:
        images, feature, timesteps, seed, batch_size, on_error, cache_dir, progress: see `select_timestep`.
        method: the rule that picks, see `select_timestep`; `"fixed"` with `timestep=` audits a guess.
        selection: a pick that was made already, instead of `method`, `feature`, `timesteps` and `options`: its feature
            is used, and its timesteps (where it scored some of its candidates only, the default ones besides).
        num_images: random images for every rule; default 64 for HFR, 1,000 for the probe, see `select_timestep`.
        tolerance: points of the probe's score (accuracy or mean IoU) that the pick may lose.
        pool_size: cells per side into which tokens are averaged for every rule that reads averages, see
            `pooled_features`: as the features will be used.
        options: of the method.

    Raises:
        ValueError: an argument is wrong, fewer than 2 timesteps or 3 images, and as `select_timestep`.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be a positive number of points, got {tolerance}")
    data = ImageData.of(images, num_images or NUM_AUDITED).sample(num_images or NUM_AUDITED, seed).readable(on_error)
    run: dict[str, Any] = {"num_images": num_images, "seed": seed, "batch_size": batch_size, "cache_dir": cache_dir}
    run |= {"progress": progress}
    if selection is None:
        if method == AUTO:
            method = automatic_method(data, options)
        if method in (*CRITERIA, "grid"):
            options["pool_size"] = pool_size
        picked = select_timestep(model, data, method=method, feature=feature, timesteps=timesteps, **run, **options)
    else:
        if method != AUTO or feature is not None or timesteps is not None or options:
            raise ValueError("selection has its own method, feature and timesteps: leave those out, or selection")
        if selection.schedule != model.config.noise_schedule:
            raise ValueError("selection was made for another noise schedule than the model's")
        picked = selection
    grid = audited_timesteps(model, picked, timesteps)
    run |= {"feature": picked.feature, "timesteps": grid}
    name = rule_name(picked, grid)
    hfr = picked if name == "hfr" else select_timestep(model, data, method="hfr", **run)
    labelled = data.masks is not None or has_classes(data.labels)
    rule = "ridge" if labelled else "hfr" if picked.method == NO_LABELS else NO_LABELS
    if rule == "hfr":
        checked = hfr
    elif rule == name and picked.timesteps == grid:
        checked = picked
    else:
        if labelled:
            run["num_images"] = num_images or NUM_AUDITED
        checked = select_timestep(model, data, method=rule, pool_size=pool_size, **run)
    pick = grid.index(picked.timestep)
    shares = shares_of_picks(picked, grid, seed)
    warnings = warn_of_pick(hfr, picked, name, shares)
    correlation = None if checked is picked else rank_correlation(picked, checked)
    regret = regret_by(checked, pick, seed)
    chance = untrained = None
    if labelled:
        informative = True
        if data.masks is None:
            chance = float(np.unique(np.asarray(data.labels), return_counts=True)[1].max() / len(data))
            if checked.per_image_scores is not None:
                informative = best_exceeds(np.array(checked.per_image_scores), chance, seed)
        itself = "ridge" in (picked.method, picked.options.get("second"))
        verdict, sentence = judge_by_probe(checked, pick, regret, tolerance, informative, itself)
        if checked is not selection:
            run |= {"num_images": checked.num_images, "timesteps": [checked.timestep]}
            twin = select_timestep(untrained_twin(model), data, method=rule, pool_size=pool_size, **run)
            untrained = twin.scores[0]
            warnings += warn_of_model(checked, twin, seed)
        if checked.num_images < FEW_LABELLED:
            warnings.append(f"the probe has only {checked.num_images} images: label {FEW_LABELLED} or more")
    else:
        if data.labels is not None:
            warnings.append("the labels are not of 2 classes with 2 images each: they were not used")
        if rule == NO_LABELS and checked.num_images < LEAST_FOR_CLUSTERS:
            warnings.append(f"the check has only {checked.num_images} images: give {LEAST_FOR_CLUSTERS} or more")
        doubt = doubt_of_pick(hfr, picked, name, shares)
        verdict, sentence = judge_by_agreement(picked, checked, name, grid, correlation, regret.lower > 0, doubt)
    return Audit(
        verdict=verdict,
        sentence=sentence,
        warnings=warnings,
        method=name,
        checked_by=rule,
        timestep=picked.timestep,
        selections={"hfr": hfr, name: picked, rule: checked},
        pick_shares=None if shares is None else shares.tolist(),
        regret=regret if labelled else None,
        chance=chance,
        untrained=untrained,
        rank_correlation=correlation,
        tolerance=tolerance,
    )


def audited_timesteps(
    model: ASelectDiTModel, picked: TimestepSelection, timesteps: Sequence[int] | int | None
) -> list[int]:
    """Where the curves are taken: at the timesteps that the rule scored; where not all, at its candidates besides.

    Raises:
        ValueError: they are fewer than 2.
    """
    grid = set(picked.timesteps) | {picked.timestep}
    if not _scored_all(picked):
        schedule = model.noise_schedule
        if timesteps is None:
            grid |= set(default_timesteps(schedule))
        else:
            grid |= set(default_timesteps(schedule, timesteps) if isinstance(timesteps, int) else timesteps)
    if len(grid) < 2:
        raise ValueError(f"timesteps must be at least 2 to compare, got {len(grid)}")
    return sorted(grid)


def rule_name(picked: TimestepSelection, grid: list[int]) -> str:
    """See `Audit.method`."""
    if picked.method != "hfr":
        return picked.method
    if not picked.options.get("noise_correction", True):
        return "hfr, uncorrected"
    return "hfr" if picked.timesteps == grid and _scored_all(picked) else "hfr, searched"


def judge_by_probe(
    probe: TimestepSelection, pick: int, regret: Regret, tolerance: float, informative: bool, itself: bool = False
) -> tuple[str, str]:
    """Verdict and sentence where there are labels.

    The curve is called flat where it varies by no more than `tolerance`, or nothing on it differs from the pick beyond
    its error. The bounds decide all the same: of too few images every curve is flat.

    Args:
        pick: index of the pick.
        informative: whether the probe is above chance somewhere.
        itself: whether the probe is also the rule that picked.
    """
    grid, t = probe.timesteps, probe.timesteps[pick]
    evidence = f"leave-one-out ridge, {probe.num_images} images"
    if itself:
        evidence += ", which also made the pick: it checks itself, and the bounds are optimistic"
    if not informative:
        return DO_NOT_TRUST, f"features tell nothing about these labels at any timestep ({evidence})"
    spread = 100 * (max(probe.scores) - min(probe.scores))
    flat = ""
    if spread <= tolerance:
        flat = f"the curve is flat: any timestep from {grid[0]} to {grid[-1]} is as good; "
    elif not regret.differs:
        flat = f"the curve is flat within its error: none from {grid[0]} to {grid[-1]} differs from t = {t}; "
    verdict, best = verdict_of(regret, tolerance, informative), "against the best of the grid"
    estimate, upper = f"{regret.estimate:.1f}", f"{regret.upper:.1f}"
    if verdict == DO_NOT_TRUST:
        loss = f"t = {t} loses about {estimate} points against t = {regret.best_timestep}"
        return verdict, f"{loss}, at least {regret.lower:.1f} with 95 % confidence ({evidence})"
    if verdict == UNCERTAIN:
        loss = f"t = {t} may lose up to {upper} points {best}"
        return verdict, f"{flat}{loss} (95 % confidence; estimate {estimate}; {evidence})"
    loss = f"is within {upper} points of the best of the grid"
    if regret.upper > tolerance:
        loss = f"loses about {estimate} points {best}, at most {upper}"
    return verdict, f"{flat}t = {t} {loss} with 95 % confidence ({evidence})"


def verdict_of(regret: Regret, tolerance: float, informative: bool) -> str:
    """Whether to trust a pick, by its regret.

    Trust needs an estimate within `tolerance` and an upper bound within twice that; distrust an estimate beyond it and
    a timestep that is surely better, or a probe that is nowhere above chance. How often either is right:
    `docs/evidence.md`.
    """
    if not informative:
        return DO_NOT_TRUST
    if regret.estimate > tolerance:
        return DO_NOT_TRUST if regret.lower > 0 else UNCERTAIN
    return TRUST if regret.upper <= 2 * tolerance else UNCERTAIN


def judge_by_agreement(
    picked: TimestepSelection,
    checked: TimestepSelection,
    name: str,
    grid: list[int],
    correlation: float | None,
    refuted: bool,
    doubt: str = "",
) -> tuple[str, str]:
    """Verdict and sentence where there are no labels.

    A pick of the rule that is best without labels (`docs/evidence.md`) is only doubted where the other one disagrees.

    Args:
        name: of the rule that picked, see `Audit.method`.
        grid: timesteps of the curves.
        correlation: rank correlation of the curves; `None` where the rule has none: then the pick is not trusted.
        refuted: whether the check is better elsewhere than at the pick with 95 % confidence.
        doubt: see `doubt_of_pick`; with any, the pick is not trusted.
    """
    picks = f"{_written(name)} t = {picked.timestep}, {_written(checked.method)} t = {checked.timestep}"
    near = abs(grid.index(picked.timestep) - grid.index(checked.timestep)) <= NEAR
    alike = correlation is not None and correlation >= ALIKE
    unlike = correlation is not None and correlation < ALIKE
    if not near and (refuted or unlike) and picked.method != NO_LABELS:
        return DO_NOT_TRUST, (
            f"no labels, and independent rules disagree ({picks}): do not trust this; "
            f"label {FEW_LABELLED} images and run again"
        )
    evidence = picks if correlation is None else f"{picks}, rank correlation {correlation:.2f}"
    if near and alike and not doubt:
        return (
            TRUST,
            f"no labels, but independent rules agree ({evidence}); labels would say how many points it may lose",
        )
    how = f"agree, but {doubt}" if near and alike else "agree only in part"
    return UNCERTAIN, f"no labels, and independent rules {how} ({evidence}): label {FEW_LABELLED} images to be sure"


def doubt_of_pick(hfr: TimestepSelection, picked: TimestepSelection, name: str, shares: np.ndarray | None) -> str:
    """Why not to trust the pick even where rules agree; empty where nothing speaks against it."""
    if shares is not None and not _is_stable(shares):
        return f"the pick of {_written(name)} is unstable"
    if noise_share(hfr, picked.timestep) >= NOISE_SHARE:
        return "the feature is mostly noise or position there"
    return ""


def warn_of_pick(hfr: TimestepSelection, picked: TimestepSelection, name: str, shares: np.ndarray | None) -> list[str]:
    """What is suspicious about the pick and HFR's curves.

    Args:
        hfr: the whole corrected curve.
        name, shares: see `Audit`.
    """
    grid, schedule, warnings = hfr.timesteps, hfr.noise_schedule, []
    pick, raw_pick = grid.index(picked.timestep), int(np.argmax(hfr.raw_scores or []))
    enough = LEAST_FOR_CLUSTERS if picked.method == NO_LABELS else FEW_IMAGES
    if picked.scores and picked.num_images < enough:
        warnings.append(f"{_written(name)} saw only {picked.num_images} images: give {enough} or more")
    if shares is not None and not _is_stable(shares):
        common = ", ".join(f"t = {grid[i]} ({shares[i]:.0%})" for i in np.argsort(-shares, kind="stable")[:3])
        warnings.append(f"the pick is unstable: other samples of the images give {common}")
    if name == "hfr, uncorrected" and schedule.log_snr(picked.timestep) < 0:
        warnings.append(
            f"HFR without noise correction picked t = {picked.timestep}, where the input is mostly noise: correct it"
        )
    elif picked.method == "hfr" and raw_pick > pick + 1 and schedule.log_snr(grid[raw_pick]) < 0:
        warnings.append(
            f"HFR without noise correction would pick t = {grid[raw_pick]}, where the input is mostly noise: "
            "do not use the raw curve"
        )
    if (share := noise_share(hfr, picked.timestep)) >= NOISE_SHARE:
        warnings.append(
            f"at t = {picked.timestep} pure noise has {share:.0%} of the images' HFR: "
            "the feature is mostly noise or position there"
        )
    return warnings


def untrained_twin(model: ASelectDiTModel) -> ASelectDiTModel:
    """The same network, stored noise and VAE, with random weights: what a probe reads from architecture alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        twin: Any = type(model)(copy.deepcopy(model.config))
    twin.to(model.device, next(model.layers.parameters()).dtype)  # the VAE may be of another one
    twin.vae = model.vae
    return twin.eval()


def warn_of_model(probe: TimestepSelection, twin: TimestepSelection, seed: int) -> list[str]:
    """Whether the best of the probe's curve is not surely above an untrained network there, on the same images.

    Args:
        twin: the probe of the untrained network, at that timestep.
    """
    best = probe.timesteps.index(probe.timestep)
    outcomes = np.stack([np.array(x)[:, at] for x, at in ((twin.per_image_scores, 0), (probe.per_image_scores, best))])
    if paired_regret([probe.timestep] * 2, outcomes.T, 0, seed).lower > 0:
        return []
    scores = f"{100 * max(probe.scores):.0f} % against {100 * twin.scores[0]:.0f} % at t = {probe.timestep}"
    return [f"the features are not surely better than those of an untrained network ({scores}): "
            "is the checkpoint trained, and read rightly?"]  # fmt: skip


def noise_share(hfr: TimestepSelection, timestep: int) -> float:
    """HFR of pure noise over that of the images, at a timestep; 0 where the images have none."""
    at = hfr.timesteps.index(timestep)
    raw, control = (hfr.raw_scores or [])[at], (hfr.control_scores or [])[at]
    return control / raw if raw > 0 else 0.0


def regret_by(checked: TimestepSelection, pick: int, seed: int) -> Regret:
    """Regret of the pick by another rule's curve; paired where that rule scores single images."""
    if checked.per_image_scores is None:
        deviations = unpaired_deviations(checked.standard_errors, pick, seed)
        return estimate_regret(checked.timesteps, checked.scores, deviations, pick)
    outcomes = np.array(checked.per_image_scores)
    span = float(np.ptp(outcomes)) if checked.method == "hfr" else 1.0
    return paired_regret(checked.timesteps, outcomes, pick, seed, span)


def shares_of_picks(picked: TimestepSelection, grid: list[int], seed: int) -> np.ndarray | None:
    """See `Audit.pick_shares`; `None` also where some images were not scored at some timesteps.

    Standard errors do not stand in for scores of images: most of LogME's is common to all timesteps, and independent
    draws of it would call every pick unstable.
    """
    scores = np.array(picked.per_image_scores or [], dtype=float)
    if not scores.size or np.isnan(scores).any():
        return None
    shares = np.zeros(len(grid))
    shares[[grid.index(t) for t in picked.timesteps]] = pick_shares(scores, seed, PICK_RESAMPLES)
    return shares


def rank_correlation(one: TimestepSelection, other: TimestepSelection) -> float | None:
    """Spearman's, from -1 to 1, over timesteps that both scored; 0 of a constant curve, `None` of fewer than 3."""
    curves = [dict(zip(each.timesteps, each.scores, strict=False)) for each in (one, other)]
    common = sorted(set(curves[0]) & set(curves[1]))
    if len(common) < LEAST_CURVE:
        return None
    first, second = ([curve[t] for t in common] for curve in curves)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(spearmanr(first, second).statistic)


def _written(name: str) -> str:
    """A rule's name in a sentence."""
    return name.replace("hfr", "HFR")


def _scored_all(picked: TimestepSelection) -> bool:
    """Whether the rule scored every candidate on every image."""
    options = picked.options
    searched = options.get("search", "full") != "full" or options.get("early_stopping") is not None
    return picked.method not in ("fixed", "shortlist") and not searched


def _is_stable(shares: np.ndarray) -> bool:
    """Whether the commonest pick and its neighbours on the grid are nearly all of them."""
    mode = int(shares.argmax())
    return bool(shares[max(mode - 1, 0) : mode + 2].sum() >= STABLE_SHARE)
