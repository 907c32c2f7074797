"""The stored curves of rules on pairs, and the cells of the report's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from aselect_hf.files import read_json
from benchmarks.selection.pairs import PAIRS
from benchmarks.selection.rules import COMBINED, MEASURED, combine, criterion_of, parts_of

RESULTS = Path(__file__).parents[1] / "results" / "selection"
GUESSES = {"fixed t = 100": 100, "fixed t = 0": 0}

Content = dict[str, Any]


def stored() -> list[Content]:
    """What was measured, in the order of `PAIRS`."""
    return [read_json(path) for name in PAIRS if (path := RESULTS / f"{name}.json").is_file()]


def true_curve(content: Content) -> np.ndarray:
    """True scores of the checkpoint's own feature, in points: `(timesteps,)`."""
    return 100 * np.array(content["truth"][content["default_feature"]]["mean"])


def lost(content: Content, scores: np.ndarray) -> np.ndarray:
    """What the picks of `scores` `(samples, timesteps)` lose, in points: `(samples,)`."""
    curve = true_curve(content)
    return curve.max() - curve[scores.argmax(axis=1)]


def scores_of(content: Content, rule: str, kind: str) -> np.ndarray:
    """Of the checkpoint's own feature: `(samples, timesteps)`, all draws of noise together.

    Args:
        kind: `"usual"`, the number of images that the rule has by default, or `"few"`, 64.
    """
    if rule in GUESSES:
        return -np.abs(np.array(content["timesteps"]) - float(GUESSES[rule]))[None]
    if rule in COMBINED:
        return combine(COMBINED[rule], [scores_of(content, part, kind) for part in parts_of(COMBINED[rule])])
    found = np.array(content["own_scores"][rule][kind])
    return found.reshape(-1, found.shape[-1])


def feature_scores(content: Content, rule: str) -> dict[str, np.ndarray]:
    """Of every feature: `(samples, timesteps)`."""
    if rule in GUESSES:
        return {name: scores_of(content, rule, "usual") for name in content["truth"]}
    if rule in COMBINED:
        parts = [feature_scores(content, part) for part in parts_of(COMBINED[rule])]
        return {name: combine(COMBINED[rule], [part[name] for part in parts]) for name in content["truth"]}
    return {name: np.array(x) for name, x in content["scores"][rule].items()}


def is_measured(content: Content, rule: str) -> bool:
    """Whether a pair has scores of a rule, or of the rules that a combined one is made of."""
    parts = parts_of(COMBINED[rule]) if rule in COMBINED else [rule]
    return rule in GUESSES or all(part in content["own_scores"] for part in parts)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(spearmanr(np.where(np.isfinite(one), one, -1e9), other).statistic)


def needs_labels(rule: str) -> bool:
    known = MEASURED | COMBINED
    return rule in known and known[rule].labels != "none"


def runs_of(rule: str) -> int:
    """Runs of the network at a timestep; those that parts of a rule share count once."""
    if rule in COMBINED:
        return sum({criterion_of(MEASURED[part]).sees: runs_of(part) for part in parts_of(COMBINED[rule])}.values())
    return MEASURED[rule].num_images * MEASURED[rule].runs if rule in MEASURED else 0


def interval(values: np.ndarray) -> str:
    low, high = np.percentile(values, (2.5, 97.5))
    return f"{low:.1f}..{high:.1f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])
