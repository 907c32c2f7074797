"""A comparison in a few sentences, for a reader who sees one for the first time."""

from __future__ import annotations

from aselect_hf.compare.table import Comparison, ComparisonRow
from aselect_hf.selection.rules import RULES

LABELS = {"none": "without labels", "few": "with few labels", "all": "with all labels"}
CHANCE = 1.96 * 2**0.5
"""Standard errors of one accuracy within which two of them may differ by chance (95 %)."""


def conclude(comparison: Comparison) -> list[str]:
    """One sentence per rule (its timestep, the accuracy there, the cost), and one on what differences may be chance."""
    sentences = [_of_rule(comparison, row) for row in comparison.rows]
    count = comparison.num_test_images
    if len(comparison.rows) > 1 and count:
        best = max(row.test_accuracy_mean for row in comparison.rows)
        points = 100 * CHANCE * (best * (1 - best) / count) ** 0.5
        sentences.append(f"With {count:,} test images, differences below {points:.1f} points may be chance.")
    return sentences


def _of_rule(comparison: Comparison, row: ComparisonRow) -> str:
    selection, grid = row.selection, comparison.row("grid")
    rule, cost = RULES[selection.method], selection.cost
    accuracy = f"a probe there is right on {100 * row.test_accuracy_mean:.1f} % of the test images"
    if rule.runs == 0:
        return f"{row.strategy}, a guess, takes t = {selection.timestep}: {accuracy}. It costs nothing."
    if grid is not None and row is not grid and cost.flops:
        price = f"{100 * cost.flops / grid.selection.cost.flops:.2g} % of the operations of grid"
    else:
        price = f"{cost.forward_passes:,} runs of the network"
    return f"{row.strategy}, {LABELS[rule.labels]}, picks t = {selection.timestep}: {accuracy}. It costs {price}."
