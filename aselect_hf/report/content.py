"""What a report says of each kind of result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aselect_hf.audit import Audit
from aselect_hf.audit.picture import plot_audit
from aselect_hf.compare.picture import plot_comparison
from aselect_hf.compare.table import Comparison
from aselect_hf.selection import TimestepSelection
from aselect_hf.selection.picture import plot_selection
from aselect_hf.selection.rules import RULES

Row = Mapping[str, str]


@dataclass(frozen=True)
class Content:
    """The parts of a report that differ between results.

    Args:
        title: of the page.
        summary: sentences at the top.
        selection: whose timestep and feature the pictures show.
        figures: descriptions, and functions that draw to a path.
        tables: headings, and rows with the same columns.
        protocol: names and values.
        versions: of packages, when the result was computed.
    """

    title: str
    summary: Sequence[str]
    selection: TimestepSelection
    figures: Mapping[str, Callable[[Path], None]]
    tables: Mapping[str, Sequence[Row]]
    protocol: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)


def content_of(result: TimestepSelection | Audit | Comparison) -> Content:
    """The content for a result.

    Raises:
        TypeError: it is of another type.
    """
    if isinstance(result, TimestepSelection):
        return of_selection(result)
    if isinstance(result, Audit):
        return of_audit(result)
    if isinstance(result, Comparison):
        return of_comparison(result)
    raise TypeError(f"result must be a TimestepSelection, an Audit or a Comparison, got {type(result).__name__}")


def of_selection(selection: TimestepSelection) -> Content:
    doubts = [f"Doubt: {doubt}." for doubt in selection.doubts()]
    return Content(
        title=f"Timestep selection by {selection.method}",
        summary=[f"{selection.describe()}.", *doubts, *filter(None, [selection.fusion])],
        selection=selection,
        figures=figure_of(selection),
        tables={"Every candidate": candidates(selection), "Cost": [cost(selection)]},
        protocol=protocol(selection),
        versions=selection.versions,
    )


def of_audit(audit: Audit) -> Content:
    return Content(
        title=f"Audit of t = {audit.timestep}, picked by {audit.method}: {audit.verdict}",
        summary=[f"{audit.sentence}.", *(f"Warning: {warning}." for warning in audit.warnings)],
        selection=audit.picked,
        figures={"Curves of the audit over the noise axis": functools.partial(plot_audit, audit)},
        tables={
            **{f"Every candidate, by {each.method}": candidates(each) for each in audit.selections.values()},
            "Cost": [cost(each) for each in audit.selections.values()],
        },
        protocol=protocol(audit.picked) | {"checked by": audit.checked_by, "tolerance in points": audit.tolerance},
        versions=audit.picked.versions,
    )


def of_comparison(comparison: Comparison) -> Content:
    best = max(comparison.rows, key=lambda row: row.validation_accuracy)
    selections = [row.selection for row in comparison.rows]
    others = {f"Candidates of {row.strategy}": candidates(row.selection) for row in comparison.rows}
    tables: dict[str, Sequence[Row]] = {"Rules": comparison.table(), "Encoders": comparison.encoder_table(), **others}
    return Content(
        title=f"Comparison of {', '.join(row.strategy for row in comparison.rows)}",
        summary=list(comparison.summary()),
        selection=best.selection,
        figures={
            "Accuracy and scores over the noise axis": lambda path: plot_comparison(
                comparison.rows, path, comparison.encoders[1:]
            )
        },
        tables=tables | {"Cost": [cost(each) for each in selections]},
        protocol={name: value for name, value in comparison.protocol.items() if name not in ("versions", "hardware")},
        versions=selections[0].versions,
    )


def figure_of(selection: TimestepSelection) -> dict[str, Callable[[Path], None]]:
    """The curve; nothing if the rule has none."""
    if not selection.scores:
        return {}
    return {f"{selection.score_name} over the noise axis": functools.partial(plot_selection, selection)}


def candidates(selection: TimestepSelection) -> list[Row]:
    """One row per candidate; none if the rule scores nothing."""
    schedule = selection.noise_schedule
    if not selection.scores:
        return []
    return [
        {
            "t": str(t),
            "sigma": f"{schedule.sigma(t):.3f}",
            "log-SNR": f"{schedule.log_snr(t):.2f}",
            selection.score_name: f"{score:.4g}",
            "standard error": f"{error:.2g}",
        }
        for t, score, error in zip(selection.timesteps, selection.scores, selection.standard_errors, strict=True)
    ]


def cost(selection: TimestepSelection) -> Row:
    spent = selection.cost
    return {
        "rule": selection.method,
        "forward passes": f"{spent.forward_passes:,}",
        "seconds": f"{spent.seconds:.1f}",
        "GFLOP": f"{spent.flops / 1e9:,.1f}",
    }


def protocol(selection: TimestepSelection) -> dict[str, Any]:
    """What was done, by name."""
    rule = RULES.get(selection.method)
    return {
        **({"rule": rule.explanation} if rule else {}),
        "feature": selection.feature,
        "images": selection.num_images,
        "seed": selection.seed,
        **selection.options,
    }
