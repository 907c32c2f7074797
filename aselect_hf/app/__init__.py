"""A page that shows what noise does to features; `aselect app` serves it. It needs the extra `app` (Gradio)."""

from aselect_hf.app.checkpoint import Checkpoint, load_shown
from aselect_hf.app.workbench import Workbench

__all__ = ["Checkpoint", "Workbench", "load_shown"]
