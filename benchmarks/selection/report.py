"""The table of regrets from what `measure.py` wrote.

    python -m benchmarks.selection.report

Regret, in points: the best true score over the grid of timesteps minus that at the pick. `default feature`: of the
checkpoint's own feature, mean and greatest over the repetitions. `all features`: the same rule for every block and
kind, mean over features and repetitions. `auto`: block, kind and timestep chosen together, against the best of all.
`rank`: Spearman correlation of a rule's scores with the true curve, mean over features.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from aselect_hf.selection.select import CHOOSE_FEATURES

RESULTS = Path(__file__).parents[1] / "results" / "selection"
SHORTLIST = 5
PASSES = {"hfr": 2 * 64, "hfr, uncorrected": 64, "rankme": 256, "alpha_req": 256, "lidar": 512, "retrieval": 512,
          "snr": 512, "ridge": 500, "knn": 500, "logme": 500}  # fmt: skip
"""Runs a timestep; few-label rules on masks: 64."""


def rules_of(content: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Scores `(repetitions, timesteps)` by rule and feature, with the baselines and the shortlist."""
    rules = {
        rule: {name: np.array(x) for name, x in scores.items()} for rule, scores in content["scores"].items()
    }  # fmt: skip
    steps = np.array(content["timesteps"])
    rules["fixed t = 100"] = {name: -np.abs(steps - 100.0)[None] for name in content["truth"]}
    rules["fixed t = 0"] = {name: -steps[None].astype(float) for name in content["truth"]}
    rules["shortlist"] = {
        name: np.where(_ranks(rules["retrieval"][name]) < SHORTLIST, rules["ridge"][name], -np.inf)
        for name in content["truth"]
    }
    return rules


def _ranks(scores: np.ndarray) -> np.ndarray:
    return (-scores).argsort(axis=1, kind="stable").argsort(axis=1)


def regrets(content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Figures by rule, in points."""
    truth = {name: 100 * np.array(curve["mean"]) for name, curve in content["truth"].items()}
    best = max(curve.max() for curve in truth.values())
    found = {}
    for rule, scores in rules_of(content).items():
        single = {name: truth[name].max() - truth[name][each.argmax(axis=1)] for name, each in scores.items()}
        own = single[content["default_feature"]]
        finite = [(np.where(np.isfinite(x), x, x[np.isfinite(x)].min() - 1), truth[name]) for name, x in scores.items()]
        found[rule] = {
            "default_mean": own.mean(), "default_max": own.max(),
            "all_mean": float(np.mean([each.mean() for each in single.values()])),
            "all_max": max(each.max() for each in single.values()),
            "rank": float(np.mean([spearmanr(x.mean(axis=0), curve).statistic for x, curve in finite])),
        }  # fmt: skip
        if rule in CHOOSE_FEATURES:
            stacked = np.stack([*scores.values()], axis=1).reshape(len(next(iter(scores.values()))), -1)
            picked = np.concatenate([*truth.values()])[stacked.argmax(axis=1)]
            found[rule]["auto_mean"] = float((best - picked).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    contents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    tables = {content["pair"]: regrets(content) for content in contents}
    heads = [f"{content['pair']} ({content['role']})" for content in contents]
    print("| rule | runs a timestep | " + " | ".join(heads) + " | mean | max |\n" + "|---" * (len(heads) + 4) + "|")
    for rule in tables[contents[0]["pair"]]:
        rows = [table[rule] for table in tables.values()]
        cells = [f"{row['default_mean']:.1f} ({row['default_max']:.1f}); all {row['all_mean']:.1f}; "
                 f"rank {row['rank']:.2f}" + (f"; auto {row['auto_mean']:.1f}" if "auto_mean" in row else "")
                 for row in rows]  # fmt: skip
        mean, largest = np.mean([row["default_mean"] for row in rows]), max(row["default_max"] for row in rows)
        print(f"| {rule} | {PASSES.get(rule, '-')} | " + " | ".join(cells) + f" | {mean:.1f} | {largest:.1f} |")


if __name__ == "__main__":
    main()
