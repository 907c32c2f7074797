"""Can a rule without labels tell that there is nothing to choose? The spread of scores beside that of accuracies."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.selection.curves import Content, needs_labels, table, true_curve
from benchmarks.selection.rules import MEASURED

FLAT = 4.0
"""Points by which the truth of a flat curve varies at most: twice what a trusted pick may lose."""
SHOWN = ("consensus", "hfr", "rankme", "retrieval")


def relative_spread(scores: np.ndarray) -> float:
    """Highest less lowest score of the mean curve of `(samples, timesteps)`, over the mean size; 0 if all are 0."""
    curve = scores.mean(axis=0)
    size = float(np.abs(curve).mean())
    return float(np.ptp(curve)) / size if size else 0.0


def spreads(contents: list[Content]) -> str:
    """Of the checkpoint's own feature: how far the truth and the scores without labels spread over the timesteps."""
    rows = []
    for content in contents:
        own = content["default_feature"]
        cells = [f"{relative_spread(np.array(content['scores'][rule][own])):.1f}" for rule in SHOWN]
        rows.append([content["pair"], f"{np.ptp(true_curve(content)):.1f}", *cells])
    return table(["pair", "truth, points", *SHOWN], rows)


def tellers(contents: list[Content]) -> str:
    """How well the spread of every rule tells flat true curves from others, over all features of all pairs."""
    flat, found = [], {rule: [] for rule in MEASURED if all(rule in content["scores"] for content in contents)}
    for content in contents:
        for name, curve in content["truth"].items():
            flat.append(100 * np.ptp(curve["mean"]) <= FLAT)
            for rule, values in found.items():
                values.append(relative_spread(np.array(content["scores"][rule][name])))
    rows = [[rule, "yes" if needs_labels(rule) else "no", f"{roc_auc_score(flat, np.negative(values)):.2f}"]
            for rule, values in found.items()]  # fmt: skip
    return f"Flat: {sum(flat)} of {len(flat)} curves.\n\n" + table(["rule", "labels", "area under the curve"], rows)
