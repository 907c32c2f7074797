"""`--json`: one document on stdout, everything else on stderr."""

from __future__ import annotations

import json

import pytest

from aselect_cli.app import app
from aselect_hf.conversion import save_model


def parsed(answer: tuple[int, str, str]) -> dict:
    code, stdout, stderr = answer
    assert code == 0, stderr
    return json.loads(stdout)


def test_every_command_has_it(aselect):
    import typer

    commands = typer.main.get_command(app).commands
    assert {"select", "audit", "compare", "features", "convert", "export", "push", "benchmark"} <= set(commands)
    for name, command in commands.items():
        assert "--json" in [option for each in command.params for option in each.opts], name


def test_select(aselect, checkpoint, pictures, tmp_path):
    arguments = ["--method", "hfr", "--timesteps", "0,400", "--output-dir", tmp_path / "out", "--json"]
    found = parsed(aselect("select", checkpoint, pictures, *arguments))
    assert found.pop("written") == [str(tmp_path / "out" / name) for name in ("selection.json", "selection.png")]
    assert found == json.loads((tmp_path / "out" / "selection.json").read_text())


def test_audit_keeps_its_exit_code(aselect, checkpoint, pictures, tmp_path):
    arguments = ["--method", "fixed", "--timestep", "400", "--timesteps", "0,400,800", "--num-images", "12"]
    code, stdout, _ = aselect("audit", checkpoint, pictures, *arguments, "--output-dir", tmp_path / "out", "--json")
    found = json.loads(stdout)
    assert found["timestep"] == 400
    assert code == {"trust": 0, "uncertain": 3, "do not trust": 4}[found["verdict"]]


def test_features(aselect, checkpoint, pictures, tmp_path):
    found = parsed(aselect("features", checkpoint, "--list", "--json"))
    assert (len(found["features"]), found["tokens"], found["width"]) == (30, 16, 24)
    assert found["default"] in found["features"]
    output = tmp_path / "features.safetensors"
    found = parsed(aselect("features", checkpoint, pictures, "--timesteps", "5", "--output", output, "--json"))
    assert found["written"] == [str(output)]
    assert found["shapes"]["labels"] == [12]


def test_messages_go_to_stderr(aselect, checkpoint, pictures, tmp_path):
    (pictures / "a" / "0.png").write_bytes(b"no image")
    output = tmp_path / "features.safetensors"
    arguments = ["--timesteps", "5", "--output", output, "--on-error", "skip", "--json"]
    code, stdout, stderr = aselect("features", checkpoint, pictures, *arguments)
    assert (code, json.loads(stdout)["shapes"]["labels"]) == (0, [11])
    assert "0.png cannot be read as an image" in stderr


def test_convert(aselect, checkpoint, make_model, tmp_path):
    model = make_model(mlp_ratio=4, timestep_freq_shift=1)
    save_model(model, tmp_path / "wide")
    found = parsed(aselect("convert", tmp_path / "wide", tmp_path / "out", "--to", "diffusers", "--json"))
    assert found == {
        "format": "diffusers",
        "parameters": model.num_parameters(),
        "written": [str(tmp_path / "out")],
    }


def test_benchmark(aselect, tmp_path):
    output = tmp_path / "speed.json"
    arguments = ["--batch_sizes", "1", "--rounds", "3", "--device", "cpu", "--output", output, "--json"]
    found = parsed(aselect("benchmark", "sample", *arguments))
    assert found.pop("written") == [str(output), str(output.with_suffix(".md"))]
    assert found == json.loads(output.read_text())


@pytest.mark.parametrize("arguments", [["select", "x", "y", "--method", "hrf"], ["select", "x", "y", "--metod", "hfr"]])
def test_a_mistake_is_still_one_line_on_stderr(aselect, arguments):
    code, stdout, stderr = aselect(*arguments, "--json")
    assert (code, stdout) == (2, "")
    assert [line for line in stderr.splitlines() if line.startswith("aselect: error:")] == stderr.splitlines()[-1:]
