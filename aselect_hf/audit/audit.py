"""`audit_timestep`: take or make a pick, check it by another rule, and judge it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aselect_hf.audit.curves import (
    NUM_AUDITED,
    Curves,
    audited_timesteps,
    compared_curves,
    rank_correlation,
    regret_by,
)
from aselect_hf.audit.degenerate import find_degenerate
from aselect_hf.audit.massive import find_massive_channels, find_upstream_channels
from aselect_hf.audit.memorizing import warn_of_memorizing
from aselect_hf.audit.regret import Regret, best_exceeds
from aselect_hf.audit.result import Audit
from aselect_hf.audit.suspicions import (
    FEW_TIMESTEPS,
    doubt_of_agreement,
    doubt_of_pick,
    shares_of_picks,
    warn_of_model,
    warn_of_pick,
)
from aselect_hf.audit.verdicts import (
    ANY_TIMESTEP,
    FEW_LABELED,
    TOLERANCE,
    TRUST,
    UNCERTAIN,
    VERDICTS,
    judge_by_agreement,
    judge_by_probe,
    verdict_of,
)
from aselect_hf.data.classes import has_classes
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection import AUTO, RULES, TimestepSelection, select_timestep
from aselect_hf.selection.request import automatic_method, check_request, report_unused_labels
from aselect_hf.selection.rule import BY_CLUSTERS
from aselect_hf.selection.rules.consensus import LEAST_FOR_CLUSTERS
from aselect_hf.selection.samples import LEAST_PER_CLASS


def audit_timestep(
    model: NoisyBackbone,
    images: Any,
    *,
    method: str = AUTO,
    selection: TimestepSelection | None = None,
    feature: str | None = None,
    timesteps: Sequence[int] | int | None = None,
    num_images: int | None = None,
    tolerance: float = TOLERANCE,
    held_out: Any = None,
    pool_size: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    on_error: str = "stop",
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Audit:
    """Pick a timestep, or take an existing pick, and check it by another rule.

    With masks or labels of two classes, a leave-one-out ridge probe runs at every timestep on at most 1,000 images. Its
    curve gives the regret of the pick, with bounds from a bootstrap over images (see `regret.py`); `verdict_of` turns
    these into the verdict. If every timestep would be trusted, there is nothing to choose, and the verdict is
    `"any timestep"`. For masks the score is the mean IoU of tokens, and each image's part in it is resampled.
    A pick that depends on rounding (`TimestepSelection.perturbed_timesteps`) is judged by the worst of the timesteps
    that rounding may give.

    A verdict is about the timestep and not about the model. The probe therefore also runs on an untrained network of
    the same shape, for which there must be memory; a checkpoint that is not significantly better gets a warning.

    Inputs that can tell nothing (a feature that is the same for all images, copies, labels of one class) are named and
    never trusted. If the verdict is bad, massive channels in the blocks before the feature are looked for and named.

    Without labels the check is an independent rule: `"consensus"`, or HFR if a rule by clusters picked (`"consensus"`,
    `"consensus_rank"`). The verdict is `"trust"` if the picks are equal or neighbors on the grid, the curves are alike
    over at least five timesteps, and the pick is stable; see `judge_by_agreement`. HFR always runs.

    Args:
        images, feature, timesteps, seed, batch_size, on_error, cache_dir, progress: see `select_timestep`.
        method: the rule that picks, see `select_timestep`; `"fixed"` with `timestep=` audits a guess.
        selection: an existing pick, instead of `method`, `feature`, `timesteps` and `options`. Its feature and its
            timesteps are used, and also the default timesteps if it scored only some of its candidates.
        num_images: random images for every rule (default: the rule's own; 1,000 for the probe).
        tolerance: points of the probe's score (accuracy or mean IoU) that the pick may lose.
        held_out: images that the network was not trained on, labeled as `images` are. If they are significantly better
            at a noisier timestep, a warning says that the network may have memorized the others.
        pool_size: cells per side into which tokens are averaged, see `pooled_features`. Give the value with which the
            features will be used.
        options: options of the method.

    Raises:
        ValueError: an argument is wrong, fewer than 2 timesteps or 3 images, and the errors of `select_timestep`.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be a positive number of points, got {tolerance}")
    if selection is None:
        check_request(method, options, feature)
    elif method != AUTO or feature is not None or timesteps is not None or options:
        raise ValueError("selection has its own method, feature and timesteps: leave out these and all options")
    elif selection.schedule != model.config.noise_schedule:
        raise ValueError("selection was made for a noise schedule other than the model's")
    data, labeled, warnings = _audited_images(images, num_images or NUM_AUDITED, seed, on_error)
    given = None if data.labels is None else np.asarray(data.labels)
    other = None if held_out is None else _held_out_images(held_out, num_images or NUM_AUDITED, seed, on_error, labeled)
    run: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "cache_dir": cache_dir, "progress": progress}
    picked = selection
    if picked is None:
        if method == AUTO:
            method = automatic_method(data)
            report_unused_labels(data, method)
        if "pool_size" in RULES[method].options:
            options["pool_size"] = pool_size
        run_picked = run | {"feature": feature, "timesteps": timesteps, "num_images": num_images}
        picked = select_timestep(model, data, method=method, **run_picked, **options)
    run["feature"] = picked.feature
    grid = audited_timesteps(model, picked, timesteps)
    curves = compared_curves(model, data, picked, grid, labeled, num_images, pool_size, run)
    checked = curves.checked
    shares = shares_of_picks(picked, grid, seed)
    warnings += warn_of_pick(curves.hfr, picked, curves.name, shares)
    massive = find_massive_channels(model, data, feature=picked.feature, timestep=picked.timestep, seed=seed)
    warnings += filter(None, [massive.sentence()])
    degenerate = find_degenerate(model, data, given, picked.feature, picked.timestep, seed)
    warnings += degenerate.all()
    correlation = None if checked is picked else rank_correlation(picked, checked)
    regret = regret_by(checked, grid.index(picked.timestep), seed)
    if other is not None:
        alike = run | {"num_images": num_images or (NUM_AUDITED if labeled else None), "pool_size": pool_size}
        if curves.rule == "hfr":
            del alike["pool_size"]
        warnings += warn_of_memorizing(model, checked, other, labeled, alike, seed)
    chance = untrained = None
    if labeled:
        chance, informative = _chance(data, checked, seed)
        verdict, sentence = _judge_with_labels(curves, regret, tolerance, informative, seed)
        if checked is not selection:
            run |= {"num_images": checked.num_images, "timesteps": [checked.timestep]}
            twin = select_timestep(model.untrained_twin(), data, method=curves.rule, pool_size=pool_size, **run)
            untrained = twin.scores[0]
            warnings += warn_of_model(checked, twin, seed)
    else:
        doubt = doubt_of_agreement(picked, checked) or doubt_of_pick(curves.hfr, picked, curves.name, shares)
        verdict, sentence = judge_by_agreement(picked, checked, curves.name, grid, correlation, regret.lower > 0, doubt)
    verdict, sentence = degenerate.capped(verdict, sentence)
    if verdict not in (ANY_TIMESTEP, TRUST):
        upstream = find_upstream_channels(model, data, feature=picked.feature, timestep=picked.timestep, seed=seed)
        warnings += filter(None, [upstream.sentence()])
    return Audit(
        verdict=verdict,
        sentence=sentence,
        warnings=warnings + _warnings_of_check(data, checked, labeled),
        method=curves.name,
        checked_by=curves.rule,
        timestep=picked.timestep,
        selections={"hfr": curves.hfr, curves.name: picked, curves.rule: checked},
        pick_shares=None if shares is None else shares.tolist(),
        regret=regret if labeled else None,
        chance=chance,
        untrained=untrained,
        rank_correlation=correlation,
        tolerance=tolerance,
    )


def _audited_images(images: Any, num_images: int, seed: int, on_error: str) -> tuple[ImageData, bool, list[str]]:
    """A sample of the images, whether they have labels or masks to use, and a warning if images are left out."""
    data, warnings = ImageData.of(images, num_images), []
    labeled = data.masks is not None or has_classes(data.labels)
    if labeled and data.masks is None:
        if data.num_unlabeled:
            warnings.append(f"{data.num_unlabeled:,} of {len(data):,} images have no label and are not used")
        data = data.labeled()
    data = data.sample(num_images, seed, per_class=LEAST_PER_CLASS if labeled else 0)
    return data.readable(on_error), labeled, warnings


def _held_out_images(images: Any, num_images: int, seed: int, on_error: str, labeled: bool) -> ImageData:
    """A sample of the held-out images.

    Raises:
        ValueError: the audited images have labels, and these have none.
    """
    data, has_labels, _ = _audited_images(images, num_images, seed, on_error)
    if labeled and not has_labels:
        raise ValueError("held_out needs labels of 2 classes or masks, as images has; it has none")
    return data


def _chance(data: ImageData, checked: TimestepSelection, seed: int) -> tuple[float | None, bool]:
    """Accuracy of always answering the most common class (masks: none), and whether the probe beats it somewhere."""
    if data.masks is not None:
        return None, True
    chance = float(np.unique(np.asarray(data.labels), return_counts=True)[1].max() / len(data))
    if checked.per_image_scores is None:
        return chance, True
    return chance, best_exceeds(np.array(checked.per_image_scores), chance, seed)


def _judge_with_labels(
    curves: Curves, regret: Regret, tolerance: float, informative: bool, seed: int
) -> tuple[str, str]:
    """Verdict and sentence by the probe for the worst of the timesteps that rounding may give."""
    picked, checked, grid = curves.picked, curves.checked, curves.grid
    itself = "ridge" in (picked.method, picked.options.get("second"))
    pick = grid.index(picked.timestep)
    worst = _worst_if_all_are_trusted(checked, tolerance, informative, seed)
    verdict, sentence = judge_by_probe(checked, pick, regret, tolerance, informative, itself, worst)
    if verdict in (ANY_TIMESTEP, TRUST) and len(grid) < FEW_TIMESTEPS:
        verdict, sentence = UNCERTAIN, f"only {len(grid)} timesteps were compared; {sentence}"
    for t in sorted(set(picked.perturbed_timesteps or []) - {picked.timestep}):
        other = grid.index(t)
        worse = judge_by_probe(checked, other, regret_by(checked, other, seed), tolerance, informative, itself, worst)
        if VERDICTS.index(worse[0]) > VERDICTS.index(verdict):
            verdict, sentence = worse[0], f"the pick depends on rounding, which may change it to t = {t}; {worse[1]}"
    return verdict, sentence


def _worst_if_all_are_trusted(
    checked: TimestepSelection, tolerance: float, informative: bool, seed: int
) -> float | None:
    """The largest upper bound of what a timestep loses, if the probe would trust every timestep; else `None`."""
    if 100 * (max(checked.scores) - min(checked.scores)) > tolerance:
        return None
    regrets = [regret_by(checked, index, seed) for index in range(len(checked.timesteps))]
    trusted = all(verdict_of(each, tolerance, informative) == TRUST for each in regrets)
    return max(each.upper for each in regrets) if trusted else None


def _warnings_of_check(data: ImageData, checked: TimestepSelection, labeled: bool) -> list[str]:
    """Warnings of too few images, and of labels that the check could not use."""
    if labeled:
        if checked.num_images < FEW_LABELED:
            return [f"the probe has only {checked.num_images} images: label {FEW_LABELED} or more"]
        return []
    warnings = []
    if data.labels is not None:
        classes = data.describe_classes()
        warnings.append(f"the labels are not used, because no 2 classes have 2 images each ({classes})")
    if checked.method in BY_CLUSTERS and checked.num_images < LEAST_FOR_CLUSTERS:
        warnings.append(f"the check has only {checked.num_images} images: give {LEAST_FOR_CLUSTERS} or more")
    return warnings
