"""Rules side by side: the timestep that each chooses, the score of a probe there, and the cost of the choice.

Protocol: rules see only training images and, for `"grid"`, validation images. At each chosen timestep a probe is fitted
on the pooled features of the training split, its regularization is chosen on the validation split, and the test split
is scored once per seed. Each seed draws another stratified 80 % of the training split. One pick is audited on a sample
of the training split: HFR's, or that of the first rule with `Rule.audited`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aselect_hf.audit import audit_timestep
from aselect_hf.compare.baselines import Baseline, BaselineRow
from aselect_hf.compare.table import Comparison, ComparisonRow
from aselect_hf.cost import encode_flops, feature_flops, weight_bytes
from aselect_hf.data.classes import stratified_sample
from aselect_hf.data.feature_cache import pooled_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import cached_latents
from aselect_hf.data.processes import processes
from aselect_hf.data.splits import share_classes
from aselect_hf.files import as_path
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection import AUTO, select_timestep
from aselect_hf.selection.inputs import DEFAULT_BATCH_SIZE
from aselect_hf.selection.probe import Probe, fit_in_parallel, fit_probe
from aselect_hf.selection.request import check_request, rules_with
from aselect_hf.selection.rules import RULES
from aselect_hf.selection.uncertainty import binomial_error
from aselect_hf.tasks import CLASSIFICATION
from aselect_hf.versions import hardware, installed_versions

SPLITS = ("train", "validation", "test")
TRAIN_SHARE = 0.8
RAW_PIXEL_SIDE = 32


def compare_strategies(
    model: NoisyBackbone,
    splits: dict[str, ImageData],
    *,
    strategies: list[str] | tuple[str, ...] = ("hfr", "grid", "fixed"),
    feature: str | None = None,
    timesteps: list[int] | int | None = None,
    num_images: int | None = None,
    seed: int = 0,
    num_seeds: int = 3,
    probe: str = "linear",
    pool_size: int = 1,
    batch_size: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    strategy_options: dict[str, dict[str, Any]] | None = None,
    baselines: Sequence[str] = (),
) -> Comparison:
    """Run rules on the same data and score a probe at each choice, by the protocol of this module.

    Args:
        splits: labeled `"train"`, `"validation"` and `"test"` images, whose classes are matched by name
            (`share_classes`). Images without a label are left out.
        strategies: names of rules in `aselect_hf.selection.RULES`.
        num_images: random images for rules that do not need all (default: each rule's own number).
        num_seeds: probes per rule, each on its own 80 % of the training split.
        pool_size: cells per side into which tokens are averaged, for the probes and for every rule that has this
            option; see `pooled_features`.
        strategy_options: options by name of the rule.
        baselines: plain vision encoders to put under the same probe, see `Baseline`; one that is named twice runs once.

    Raises:
        ValueError: an argument is wrong, see `check_strategies`, and the errors of `select_timestep` and `Baseline`.
    """
    check_strategies(strategies, strategy_options or {}, feature)
    if num_seeds < 1:
        raise ValueError(f"num_seeds must be at least 1, got {num_seeds}")
    splits = _checked_splits(splits)
    encoders = [Baseline(name, model.device) for name in dict.fromkeys(baselines)]
    others = [_encoder_row(encoder, splits, probe, num_seeds, cache_dir, progress) for encoder in encoders]
    run: dict[str, Any] = {"batch_size": batch_size, "cache_dir": cache_dir, "progress": progress}
    chosen = {name: dict(options) for name, options in (strategy_options or {}).items()}
    chosen["grid"] = {"probe": probe, "task": CLASSIFICATION.name} | chosen.get("grid", {})
    for name in strategies:
        if name == AUTO or "pool_size" in RULES[name].options:
            chosen[name] = {"pool_size": pool_size} | chosen.get(name, {})
    rows: list[ComparisonRow] = []
    scored: dict[tuple[str, int], tuple[float, list[float]]] = {}
    for strategy in strategies:
        shared = {"feature": feature, "timesteps": timesteps, "num_images": num_images, "seed": seed} | run
        shared["validation"] = splits["validation"]
        selection = select_timestep(model, splits["train"], method=strategy, **shared, **chosen.get(strategy, {}))
        place = (selection.feature, selection.timestep)
        if place not in scored:
            scored[place] = score_probes(_features_at(model, splits, *place, pool_size, run), splits, probe, num_seeds)
        rows.append(ComparisonRow(strategy, selection, *scored[place]))
    pixels = {name: raw_pixels(data, model.config) for name, data in splits.items()}
    _, raw_pixel_accuracies = score_probes(pixels, splits, probe, num_seeds)
    latent_accuracies = None
    if model.vae is not None:
        latents = {name: vae_latents(model, data, **run) for name, data in splits.items()}
        _, latent_accuracies = score_probes(latents, splits, probe, num_seeds)
    error = binomial_error(rows[0].test_accuracy_mean, len(splits["test"]))
    protocol = {
        "images": " + ".join(f"{len(splits[name]):,} {name}" for name in SPLITS),
        "classes": len(splits["train"].class_names),
        "probe": f"{probe} on {rows[0].selection.feature} averaged over {pool_size} x {pool_size} cells",
        "seeds": num_seeds,
        "spread": "standard deviation over seeds, each on its own stratified 80 % of train",
        "test standard error": f"{100 * error:.2f} points (binomial)",
        "hardware": hardware(model.device),
        "processes": processes().count,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": ", ".join(f"{name} {number}" for name, number in installed_versions().items()),
    }
    audit = None
    if (row := audited_row(rows)) is not None:
        audit = audit_timestep(model, splits["train"], selection=row.selection, pool_size=pool_size, seed=seed, **run)
    compared = [_backbone_row(model, max(rows, key=lambda row: row.validation_accuracy)), *others] if others else []
    comparison = Comparison(
        rows, raw_pixel_accuracies, protocol, audit, compared, len(splits["test"]), latent_accuracies
    )
    if audit is not None:
        audit.warnings.extend(comparison.better_baselines())
    return comparison


def _encoder_row(
    encoder: Baseline,
    splits: dict[str, ImageData],
    probe: str,
    num_seeds: int,
    cache_dir: str | Path | None,
    progress: bool,
) -> BaselineRow:
    """A baseline under the probe."""
    run: dict[str, Any] = {"cache_dir": cache_dir, "progress": progress}
    features = {name: encoder.cached_features(data, **run) for name, data in splits.items()}
    return encoder.row(splits["test"].decode(0), *score_probes(features, splits, probe, num_seeds))


def _backbone_row(model: NoisyBackbone, row: ComparisonRow) -> BaselineRow:
    """The diffusion backbone at the pick of the rule that is best on the validation split."""
    feature, timestep = row.selection.feature, row.selection.timestep
    return BaselineRow(
        name=row.selection.model,
        revision=getattr(model.config, "_commit_hash", None),
        reads=f"{feature} at t = {timestep}, by {row.strategy}",
        width=model.config.feature_width(feature),
        parameters=sum(each.numel() for each in model.parameters()),
        weight_bytes=weight_bytes(model),
        flops=encode_flops(model) + model.config.num_noise_draws * feature_flops(model, feature),
        validation_accuracy=row.validation_accuracy,
        test_accuracies=row.test_accuracies,
    )


def _checked_splits(splits: dict[str, ImageData]) -> dict[str, ImageData]:
    """The three splits, their classes matched.

    Raises:
        ValueError: a split is missing, or has no labels.
    """
    if missing := [name for name in SPLITS if name not in splits]:
        raise ValueError(f"a comparison needs the splits {', '.join(SPLITS)}; missing: {', '.join(missing)}")
    for name in SPLITS:
        if splits[name].labels is None:
            raise ValueError(f"a comparison needs labels; {name} has none: {splits[name].no_labels}")
    return share_classes({name: splits[name] for name in SPLITS})


def _features_at(
    model: NoisyBackbone,
    splits: dict[str, ImageData],
    feature: str,
    timestep: int,
    pool_size: int,
    run: dict[str, Any],
) -> dict[str, np.ndarray]:
    """Pooled features of every split at one timestep: `(images, width)`."""
    run = run | {"batch_size": run["batch_size"] or DEFAULT_BATCH_SIZE, "pool_size": pool_size}
    return {name: pooled_features(model, data, [timestep], feature, **run).values[0] for name, data in splits.items()}


def check_strategies(
    strategies: Sequence[str], options: Mapping[str, Mapping[str, Any]], feature: str | None = None
) -> None:
    """Refuse, before any work, what `select_timestep` would refuse, and options of rules that are not compared.

    Raises:
        ValueError: no rule is named, a rule is unknown, or an option is of another rule or of one not compared.
    """
    if not strategies:
        raise ValueError("strategies must name at least one method")
    for strategy in strategies:
        check_request(strategy, options.get(strategy, {}), feature)
    for strategy, given in options.items():
        if given and strategy not in strategies:
            raise ValueError(
                f"{', '.join(given)} of {strategy!r} is given, but strategies are {', '.join(strategies)}: "
                f"add {strategy!r}, or leave it out"
            )


def options_by_rule(rules: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Hand each option to all compared rules that have it.

    Raises:
        ValueError: none has it; the message names the rules that do.
    """
    shared: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        owners = rules_with(name)
        if not set(owners) & set(rules):
            named = " or ".join(map(repr, owners))
            raise ValueError(
                f"{name} of {named} is given, but strategies are {', '.join(rules)}: add {named}, or leave it out"
            )
        for rule in set(owners) & set(rules):
            shared.setdefault(rule, {})[name] = value
    return shared


def audited_row(rows: list[ComparisonRow]) -> ComparisonRow | None:
    """The row of HFR, or else the first whose rule is `audited`; `None` if there is none."""
    worth = [row for row in rows if RULES[row.selection.method].audited]
    return next((row for row in worth if row.strategy == "hfr"), worth[0] if worth else None)


def score_probes(
    features: dict[str, np.ndarray], splits: dict[str, ImageData], probe: str, num_seeds: int
) -> tuple[float, list[float]]:
    """Validation accuracy of a probe on the whole training split, and test accuracies of one probe per seed."""
    labels = {name: np.asarray(data.labels) for name, data in splits.items()}
    validation = (features["validation"], labels["validation"])
    rows = np.arange(len(labels["train"]))
    parts = [rows] + [
        stratified_sample(labels["train"], int(TRAIN_SHARE * len(rows)), seed) for seed in range(num_seeds)
    ]

    def fit(part: np.ndarray) -> Probe:
        return fit_probe(features["train"][part], labels["train"][part], *validation, kind=probe)

    fits = [partial(fit, part) for part in parts]
    whole, *fitted = processes().spread(fits, partial(fit_in_parallel, num_rows=len(rows)))
    return whole.validation_score, [each.accuracy(features["test"], labels["test"]) for each in fitted]


def raw_pixels(data: ImageData, config: NoisyBackboneConfig) -> np.ndarray:
    """Flattened pixel values, averaged down to at most 32 x 32: `(images, dimensions)`."""
    side = min(config.image_size or RAW_PIXEL_SIDE, RAW_PIXEL_SIDE)
    batches = [torch.nn.functional.adaptive_avg_pool2d(batch, side) for batch in data.batches(config, 256)]
    return torch.cat(batches).flatten(1).numpy()


def vae_latents(
    model: NoisyBackbone, data: ImageData, batch_size: int | None, cache_dir: str | Path | None, progress: bool
) -> np.ndarray:
    """Flattened latents of the model's VAE, averaged down to at most 32 x 32: `(images, dimensions)`."""
    batch_size = batch_size or DEFAULT_BATCH_SIZE
    folder = as_path(cache_dir) / "latents" if cache_dir else None
    cache = cached_latents(model, data, batch_size=batch_size, cache_dir=folder, progress=progress)
    side = min(model.config.sample_size, RAW_PIXEL_SIDE)
    starts = range(0, len(data), batch_size)
    batches = [cache.gather(range(start, min(start + batch_size, len(data)))) for start in starts]
    return torch.cat([torch.nn.functional.adaptive_avg_pool2d(batch, side) for batch in batches]).flatten(1).numpy()
