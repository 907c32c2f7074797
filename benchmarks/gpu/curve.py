"""The exhaustive curve of the DiT from the stage `train`, and the picks of every rule."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np

from aselect_hf import select_timestep
from aselect_hf.modeling.features import parse_feature
from aselect_hf.selection import RULES, TimestepSelection
from aselect_hf.tasks import CLASSIFICATION
from benchmarks.gpu.speed import tf32
from benchmarks.gpu.stage import Stage
from benchmarks.gpu.training import model_dir
from benchmarks.selection.measure import Measurement
from benchmarks.selection.pairs import Pair
from benchmarks.selection.sources import Sources

IMAGES = {False: (3000, 2000), True: (40, 24)}
"""Numbers of training and validation images for the probes."""
KINDS = ("query", "attention", "hidden")
BLOCKS = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Blocks to measure, as fractions of the depth."""
SEEDS = {False: 3, True: 1}
SLOW = ("grid", "gate")
UNKNOWN = ("fixed",)


def curve(stage: Stage) -> None:
    """Ridge curves with stored noise and with fresh noise for each image, then every rule with its defaults."""
    folder = model_dir(stage)
    if not (folder / "config.json").is_file():
        stage.skip("the stage", f"{folder} holds no model: run the stage 'train' first")
        return
    with tf32(True):
        sources = sources_of(stage, str(folder))
        truth = truth_of(stage, sources)
        rules(stage, sources, truth)


def sources_of(stage: Stage, model: str) -> Sources:
    train, validation = IMAGES[stage.setting.tiny]
    return Sources(
        model, str(stage.setting.data), CLASSIFICATION, device=stage.device, num_train=train, num_validation=validation,
        feature_filter=chosen,
    )  # fmt: skip


def chosen(name: str, own: str, depth: int) -> bool:
    """Whether to measure a feature: the checkpoint's own feature, and `KINDS` at `BLOCKS`."""
    feature = parse_feature(name, depth)
    return name == own or (feature.kind in KINDS and feature.block in {round(x * depth) for x in BLOCKS})


def truth_of(stage: Stage, sources: Sources) -> np.ndarray:
    """Note the curves of all features, and return that of the checkpoint's own, `(seeds, timesteps)`."""
    pair = Pair("on-gpu", "", "", "classification", "confirm")
    measurement = Measurement(pair, sources)
    stage.note("timesteps", sources.timesteps)
    stage.note("default_feature", sources.default_feature)
    stage.note("images", {"train": len(sources.train), "validation": len(sources.validation)})
    started = time.perf_counter()
    curves = measurement.curves(sources.labeled_rows, sources.validation_rows)
    stage.note("truth", {name: summary(x) for name, x in curves.items()})
    stage.note("seconds", {"stored noise": time.perf_counter() - started})
    started = time.perf_counter()
    with stage.attempt("fresh noise"):
        fresh = measurement.curves(*sources.fresh_noise_rows(sources.features))
        stage.note("fresh_noise_truth", {name: summary(x) for name, x in fresh.items()})
        stage.note("seconds", stage.record["seconds"] | {"fresh noise": time.perf_counter() - started})
    return curves[sources.default_feature]


def rules(stage: Stage, sources: Sources, truth: np.ndarray) -> None:
    """Note the pick of every rule, and how much it loses against the best of the curve."""
    mean = truth.mean(axis=0)
    order = sorted((name for name in RULES if name not in UNKNOWN), key=lambda name: name in SLOW)
    for seed in range(SEEDS[stage.setting.tiny]):
        for method in order:
            if seed and method in SLOW:
                continue
            what = f"{method}, seed {seed}"
            if not stage.has_time_for(what, 0 if stage.setting.tiny else 5 if method not in SLOW else 20):
                continue
            with stage.attempt(what):
                found = pick(stage, sources, method, seed)
                index = int(np.abs(np.array(sources.timesteps) - found.timestep).argmin())
                stage.add("picks", {
                    "method": method, "seed": seed, "timestep": found.timestep, "images": found.num_images,
                    "loss_in_points": float(100 * (mean.max() - mean[index])), "seconds": found.cost.seconds,
                    "forward_passes": found.cost.forward_passes, "timesteps": found.timesteps,
                    "scores": [round(float(x), 5) for x in found.scores],
                })  # fmt: skip


def pick(stage: Stage, sources: Sources, method: str, seed: int) -> TimestepSelection:
    options: dict[str, Any] = {"timesteps": sources.timesteps, "cache_dir": stage.setting.scratch / "features"}
    if method == "grid":
        options["validation"] = sources.validation
    if method == "gate":
        options.pop("timesteps")
    if stage.setting.tiny and method in SLOW:
        options["timesteps"] = sources.timesteps[::8]
    data = copy.copy(sources.train)
    return select_timestep(sources.model, data, method=method, seed=seed, progress=False, **options)


def summary(curves: np.ndarray) -> dict[str, list[float]]:
    return {
        "mean": np.round(curves.mean(axis=0), 4).tolist(),
        "deviation": np.round(curves.std(axis=0, ddof=1), 4).tolist(),
    }
