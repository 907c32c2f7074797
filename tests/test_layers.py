"""The rooms of the package lie on floors, as `pyproject.toml` declares them."""

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[1]


def test_every_room_imports_from_lower_rooms_only(capsys):
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)

    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_at_most_six_modules_lie_outside_of_rooms():
    loose = {path.stem for path in (ROOT / "aselect_hf").glob("*.py")} - {"__init__"}

    assert len(loose) <= 6, sorted(loose)
