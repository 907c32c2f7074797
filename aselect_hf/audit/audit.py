"""`audit_timestep`: take or make a pick, check it by another rule, judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aselect_hf.audit.check import NUM_AUDITED, Check, audited_images, audited_timesteps, check_pick
from aselect_hf.audit.regret import best_exceeds
from aselect_hf.audit.result import Audit
from aselect_hf.audit.suspicions import (
    doubt_of_agreement,
    doubt_of_pick,
    untrained_twin,
    warn_of_model,
    warn_of_pick,
)
from aselect_hf.audit.verdicts import FEW_LABELLED, TOLERANCE, VERDICTS, judge_by_agreement, judge_by_probe
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.selection import AUTO, RULES, TimestepSelection, select_timestep
from aselect_hf.selection.request import automatic_method, check_request, report_unused_labels
from aselect_hf.selection.rule import WITHOUT_LABELS
from aselect_hf.selection.rules.consensus import LEAST_FOR_CLUSTERS


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
    by its curve, with bounds by a bootstrap over images (`regret.py` has the formulas), decides, see `verdict_of`. For
    masks, the score is the mean IoU of tokens, and what is resampled is every image's part in it.
    The probe also runs on an untrained network of the same shape (memory for both is needed): a checkpoint that is not
    surely better gets a warning, since verdicts are on timesteps.
    A pick that depends on rounding (`TimestepSelection.perturbed_timesteps`) is judged by the worst of the timesteps
    that rounding may give.
    Without labels of two classes: agreement with an independent rule without labels (`"consensus"`; HFR where that one
    picked), `"trust"` where picks are equal or neighbors on the grid, curves alike over at least five timesteps, and
    the pick stable; see `judge_by_agreement`. The curves of HFR are always there.

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
        ValueError: an argument is wrong, fewer than 2 timesteps or 3 images, and as `select_timestep` (which refuses
            images that are all the same).
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be a positive number of points, got {tolerance}")
    if selection is None:
        check_request(method, options, feature)
    elif method != AUTO or feature is not None or timesteps is not None or options:
        raise ValueError("selection has its own method, feature and timesteps: leave those out, or selection")
    elif selection.schedule != model.config.noise_schedule:
        raise ValueError("selection was made for another noise schedule than the model's")
    data, labelled, warnings = audited_images(images, num_images or NUM_AUDITED, seed, on_error)
    run: dict[str, Any] = {"num_images": num_images, "seed": seed, "batch_size": batch_size, "cache_dir": cache_dir}
    run |= {"progress": progress}
    picked = selection
    if picked is None:
        if method == AUTO:
            method = automatic_method(data)
            report_unused_labels(data, method)
        if "pool_size" in RULES[method].options:
            options["pool_size"] = pool_size
        picked = select_timestep(model, data, method=method, feature=feature, timesteps=timesteps, **run, **options)
    run |= {"feature": picked.feature, "timesteps": audited_timesteps(model, picked, timesteps)}
    check = check_pick(model, data, labelled, picked, run, pool_size)
    warnings += warn_of_pick(check.hfr, picked, check.name, check.shares)
    chance = untrained = None
    if labelled:
        chance = None if data.masks is not None else commonest_share(data)
        verdict, sentence = judge_by_labels(check, chance, tolerance)
        if check.checked is not selection:
            run |= {"num_images": check.checked.num_images, "timesteps": [check.checked.timestep]}
            twin = select_timestep(untrained_twin(model), data, method=check.rule, pool_size=pool_size, **run)
            untrained = twin.scores[0]
            warnings += warn_of_model(check.checked, twin, seed)
    else:
        verdict, sentence = judge_without_labels(check)
    return Audit(
        verdict=verdict,
        sentence=sentence,
        warnings=warnings + warn_of_images(check, data),
        method=check.name,
        checked_by=check.rule,
        timestep=picked.timestep,
        selections={"hfr": check.hfr, check.name: picked, check.rule: check.checked},
        pick_shares=None if check.shares is None else check.shares.tolist(),
        regret=check.regret if labelled else None,
        chance=chance,
        untrained=untrained,
        rank_correlation=check.correlation,
        tolerance=tolerance,
    )


def commonest_share(data: ImageData) -> float:
    """Accuracy of always answering the commonest class."""
    return float(np.unique(np.asarray(data.labels), return_counts=True)[1].max() / len(data))


def judge_by_labels(check: Check, chance: float | None, tolerance: float) -> tuple[str, str]:
    """Verdict and sentence by a probe; of the timesteps that rounding may give, that of the worst."""
    picked, probe = check.picked, check.checked
    informative = True
    if chance is not None and probe.per_image_scores is not None:
        informative = best_exceeds(np.array(probe.per_image_scores), chance, check.seed)
    itself = "ridge" in (picked.method, picked.options.get("second"))

    def judge(t: int) -> tuple[str, str]:
        return judge_by_probe(probe, check.grid.index(t), check.regret_at(t), tolerance, informative, itself)

    verdict, sentence = judge(picked.timestep)
    for t in sorted(set(picked.perturbed_timesteps or []) - {picked.timestep}):
        worse, why = judge(t)
        if VERDICTS.index(worse) > VERDICTS.index(verdict):
            verdict, sentence = worse, f"the pick depends on rounding, which may give t = {t}; {why}"
    return verdict, sentence


def judge_without_labels(check: Check) -> tuple[str, str]:
    """Verdict and sentence by an independent rule."""
    picked, checked = check.picked, check.checked
    doubt = doubt_of_agreement(picked, checked) or doubt_of_pick(check.hfr, picked, check.name, check.shares)
    refuted = check.regret.lower > 0
    return judge_by_agreement(picked, checked, check.name, check.grid, check.correlation, refuted, doubt)


def warn_of_images(check: Check, data: ImageData) -> list[str]:
    """Whether labels could not be used, and whether the check had few images."""
    count, warnings = check.checked.num_images, []
    if check.labelled:
        if count < FEW_LABELLED:
            warnings.append(f"the probe has only {count} images: label {FEW_LABELLED} or more")
        return warnings
    if data.labels is not None:
        warnings.append(
            f"the labels are not of 2 classes with 2 images each ({data.describe_classes()}): they were not used"
        )
    if check.rule == WITHOUT_LABELS and count < LEAST_FOR_CLUSTERS:
        warnings.append(f"the check has only {count} images: give {LEAST_FOR_CLUSTERS} or more")
    return warnings
