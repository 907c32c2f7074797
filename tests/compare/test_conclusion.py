"""A comparison in plain sentences: what each rule picked, how good it is, what it cost."""

from __future__ import annotations

from rich.console import Console

from aselect_hf.compare import Comparison, ComparisonRow, conclude
from aselect_hf.selection import TimestepSelection
from aselect_hf.selection.result import SelectionCost


def row(strategy: str, accuracy: float, flops: float, method: str | None = None) -> ComparisonRow:
    cost = SelectionCost(forward_passes=1200, seconds=1.0, flops=flops)
    selection = TimestepSelection(method or strategy, "blocks.0.hidden", 50, [50], [1.0], [0.1], cost, {})
    return ComparisonRow(strategy, selection, accuracy, [accuracy])


def test_each_rule_has_a_sentence():
    rows = [row("hfr", 0.8, 2e9), row("grid", 0.82, 8e10), row("fixed", 0.7, 0)]
    sentences = conclude(Comparison(rows, [0.5], {}, num_test_images=400))
    assert sentences == [
        "hfr, without labels, picks t = 50: a probe there is right on 80.0 % of the test images. "
        "It costs 2.5 % of the operations of grid.",
        "grid, with all labels, picks t = 50: a probe there is right on 82.0 % of the test images. "
        "It costs 1,200 runs of the network.",
        "fixed, a guess, takes t = 50: a probe there is right on 70.0 % of the test images. It costs nothing.",
        "With 400 test images, differences below 5.3 points may be chance.",
    ]


def test_without_a_grid_the_cost_is_in_runs():
    (sentence,) = conclude(Comparison([row("auto", 0.8, 2e9, method="logme")], [0.5], {}, num_test_images=400))
    assert sentence.startswith("auto, with few labels, picks t = 50")
    assert sentence.endswith("It costs 1,200 runs of the network.")


def test_its_table_fits_a_narrow_terminal():
    rows = [row("consensus_rank", 0.8, 2e9), row("grid", 0.82, 8e10), row("fixed", 0.7, 0)]
    rows[1].selection.scores = [0.82]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(*Comparison(rows, [0.5], {}, num_test_images=400).rich_tables())
    shown = captured.get()
    assert "…" not in shown
    assert all(word in shown for word in ("consensus_rank", "(validation)", "vs", "1/40"))
