"""A small checkpoint, a folder of images, and the commands as a user types them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from aselect_cli import app
from aselect_hf.conversion import save_model


@pytest.fixture
def checkpoint(make_model, tmp_path) -> Path:
    save_model(make_model(num_channels=1, timestep=None), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pictures(tmp_path) -> Path:
    for index in range(12):
        path = tmp_path / "images" / ("ab"[index % 2]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * index + 10).save(path)
    return tmp_path / "images"


@pytest.fixture
def aselect(monkeypatch, capsys):
    """Run a command in this process; returns exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aselect", *map(str, arguments)])
        try:
            app.main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
