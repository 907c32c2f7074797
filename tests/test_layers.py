"""The rooms of the package lie on floors, as `pyproject.toml` declares them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_room_imports_from_lower_rooms_only():
    """In a process of its own: import-linter silences every logger that exists."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_at_most_six_modules_lie_outside_of_rooms():
    loose = {path.stem for path in (ROOT / "aselect_hf").glob("*.py")} - {"__init__"}

    assert len(loose) <= 6, sorted(loose)
