"""Parts of HTML pages that need no other file: figures as SVG, and pictures."""

from __future__ import annotations

import base64
import html
import io
import re
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

SVG: Any = {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "DejaVu Sans"],
    "savefig.transparent": True,
}
SIZE = re.compile(r'width="([\d.]+)pt" height="[\d.]+pt"')
_ONE_AT_A_TIME = threading.Lock()  # matplotlib's settings are those of the process


def inline_svg(draw: Callable[[Path], Any], description: str) -> str:
    """A figure as wide as its place at most, in the page's text color, on its background.

    Args:
        draw: writes the figure to a path that ends in `.svg`, with matplotlib.
        description: what a screen reader says.
    """
    import matplotlib

    with TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        with _ONE_AT_A_TIME, matplotlib.rc_context(SVG | {"svg.hashsalt": description}):
            draw(path)
        _, _, text = path.read_text(encoding="utf-8").partition("<svg ")
    found = SIZE.search(text)
    assert found is not None
    start = (
        f'<svg role="img" aria-label="{html.escape(description)}" fill="currentColor" style="max-width:{found[1]}pt" '
    )
    return start + text.replace(found[0], 'width="100%"', 1).replace("#000000", "currentColor")


def data_url(picture: Image.Image) -> str:
    """A picture inside of HTML."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
