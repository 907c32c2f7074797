"""The tutorial notebook runs in a kernel from its first cell to its last."""

from __future__ import annotations

import pytest

from tests.docs.snippets import ROOT

TUTORIAL = ROOT / "examples" / "tutorial.ipynb"


def read():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_it_is_kept_without_outputs():
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in read().cells)


@pytest.mark.app
def test_a_kernel_runs_the_tutorial(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    notebook = read()
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3  # the strip, the colors, the curve
    printed = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    assert float(printed.partition("accuracy on 240 test images: ")[2].split()[0]) > 0.5  # of ten classes
    assert (tmp_path / "tutorial" / "classifier" / "model.safetensors").is_file()
