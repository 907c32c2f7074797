"""The notebook beside a model runs from its first cell to its last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aselect_hf import ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation, select_timestep
from aselect_hf.conversion import load_model, save_model
from aselect_hf.data.sources import SAMPLE_MODEL
from aselect_hf.hub.notebook import INSTALL
from aselect_hf.hub.upload import prepare_upload


def code_of(content: dict) -> str:
    """All code cells but the one that installs, without a notebook's own commands."""
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells if INSTALL not in cell["metadata"]["tags"] for line in [*cell["source"], "\n"]]
    return "".join(line for line in lines if not line.startswith("%"))


def run(folder: Path, tmp_path: Path) -> str:
    """Push-time notebook of a folder, run on that folder in a process of its own."""
    content = json.loads(prepare_upload(folder, "ada/tiny").files["notebook.ipynb"])
    script = code_of(content).replace('name = "ada/tiny"', f"name = {str(folder)!r}", 1)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_of_the_sample_trains_a_head_that_sees(tmp_path):
    save_model(load_model(SAMPLE_MODEL), tmp_path / "sample")
    printed = run(tmp_path / "sample", tmp_path)
    assert float(printed.rpartition(":")[2]) > 0.5  # of ten classes


@pytest.mark.parametrize("head", [ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation])
def test_of_models_with_heads(make_config, randomize, tmp_path, head):
    config = make_config(num_channels=1, num_labels=3)
    save_model(randomize(head(config)), tmp_path / "model")
    assert "accuracy on 256 test images" in run(tmp_path / "model", tmp_path)


def test_of_a_fixed_timestep(make_model, tmp_path):
    save_model(make_model(num_channels=1).fix_timestep(70), tmp_path / "fixed")
    assert "accuracy on 256 test images" in run(tmp_path / "fixed", tmp_path)


def test_its_format(make_model, normal, tmp_path):
    model = make_model(num_channels=1, timestep=None)
    select_timestep(model, normal(4, 1, 8, 8).clamp(-1, 1), method="hfr", timesteps=[0, 100]).apply(model)
    save_model(model, tmp_path / "model")
    content = json.loads(prepare_upload(tmp_path / "model", "ada/tiny").files["notebook.ipynb"])
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    assert "from_config" in code_of(content)
    assert any("%pip install" in "".join(cell["source"]) for cell in content["cells"])


@pytest.mark.app
def test_a_kernel_runs_it(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    save_model(load_model(SAMPLE_MODEL), tmp_path / "sample")
    text = prepare_upload(tmp_path / "sample", "ada/tiny").files["notebook.ipynb"].decode()
    found = nbformat.reads(text.replace("ada/tiny", str(tmp_path / "sample")), as_version=4)
    nbformat.validate(found)
    found.cells = [cell for cell in found.cells if INSTALL not in cell.metadata.tags]
    nbclient.NotebookClient(found, timeout=300, kernel_name="python3").execute()
    outputs = [output.get("data", {}) for cell in found.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in data for data in outputs) == 4  # the picture, the strip, the similarity, the curve
