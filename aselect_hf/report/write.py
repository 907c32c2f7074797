"""Write a report: one HTML file that asks for nothing from anywhere, in light and dark, for screen and paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from aselect_hf.audit import Audit
from aselect_hf.compare.table import Comparison
from aselect_hf.data.image_data import ImageData
from aselect_hf.files import as_path, write_text
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.report.content import Row, content_of
from aselect_hf.report.pictures import draw_strips, strip_timesteps
from aselect_hf.reporting.web import inline_svg
from aselect_hf.selection import TimestepSelection
from aselect_hf.versions import hardware, installed_versions

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    path: str | Path,
    result: TimestepSelection | Audit | Comparison,
    model: NoisyBackbone,
    images: ImageData,
    *,
    command: str = "",
) -> Path:
    """Write the report of a result, whole or not at all.

    Args:
        path: of the HTML file.
        result: what is reported.
        model: the backbone that it was computed with, for pictures of its features.
        images: those that it was computed on; three of them are shown.
        command: what made it.

    Raises:
        TypeError: `result` is of another type.
    """
    content = content_of(result)
    selection = content.selection
    timesteps = strip_timesteps(model, selection.timestep)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html").render(
        content=content,
        selection=selection,
        figures={name: Markup(inline_svg(draw, name)) for name, draw in content.figures.items()},
        columns=[(t, f"{model.noise_schedule.sigma(t):.2f}") for t in timesteps],
        strips=draw_strips(model, images, selection.feature, timesteps, selection.timestep),
        tables=shown_tables(content.tables),
        model=Path(selection.model).name if Path(selection.model).exists() else selection.model,
        images=images.name,
        versions=content.versions or installed_versions(),
        hardware=hardware(model.device),
        command=command,
    )
    return write_text(as_path(path), text)


def shown_tables(tables: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """Tables that have rows."""
    return {heading: rows for heading, rows in tables.items() if rows}
