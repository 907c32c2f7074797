"""Mistakes end in one line that names what is wrong, before any work."""

from __future__ import annotations

import json
import re
import zlib

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["select", "no/such", "sample"], "'no/such' is neither a local path nor reachable on the Hub"),
        (["select", "{checkpoint}", "no/such"], "cannot load images from 'no/such'"),
        (["select", "{checkpoint}", "{pictures}", "--split", "dev"], "no split 'dev'"),
        (["select", "x", "y", "--timesteps", "a,b"], "timesteps must be integers"),
        (["audit", "x", "y", "--timesteps", "a,b"], "timesteps must be integers"),
        (["compare", "x", "y", "--timesteps", "a,b"], "timesteps must be integers"),
        (["select", "{checkpoint}", "{pictures}", "--timesteps", "0,5000"], "0..999"),
        (["select", "{checkpoint}", "{pictures}", "--feature", "blocks.1.q"], "feature 'blocks.1.q' is unknown"),
        (["select", "{checkpoint}", "{pictures}", "--method", "hfr", "--cutoff", "2"], "leaves no bins"),
        (["select", "x", "y", "--cutoff", "0.15"], "'auto' has no option cutoff; .*; cutoff is an option of hfr"),
        (["select", "x", "y", "--method", "hfr", "--timestep", "5"], "timestep is an option of fixed"),
        (["select", "x", "y", "--method", "fixed", "--no-noise-correction"], "noise_correction is an option of hfr"),
        (["select", "x", "y", "--method", "hrf"], "method 'hrf' is unknown"),
        (["audit", "x", "y", "--method", "hfr", "--timestep", "5"], "timestep is an option of fixed"),
        (["compare", "x", "y", "--strategies", "hfr,gird"], "method 'gird' is unknown"),
        (["compare", "x", "y", "--strategies", "hfr", "--fixed-timestep", "5"], "timestep of 'fixed' is given, but"),
        (
            ["compare", "x", "y", "--methods", "hfr", "--num-views", "3"],
            "num_views of 'icr' or 'lidar' or 'retrieval' or 'snr' is",
        ),
        (["audit", "x", "y", "--method", "fixed", "--cutoff", "0.3"], "cutoff is an option of hfr"),
        (
            ["select", "x", "y", "--method", "grid", "--num-views", "3"],
            "num_views is an option of icr, lidar, retrieval, snr",
        ),
        (["select", "x", "y", "--method", "hfr", "--search", "corse"], "'corse' is not one of 'full'"),
        (["select", "x", "y", "--seed", "one"], "Invalid value for '--seed'"),
        (["select", "x", "y", "--metod", "hfr"], "No such option: --metod .*--method"),
        (["compair", "x", "y"], "Did you mean 'compare'"),
        (["select", "{checkpoint}", "{pictures}", "--dtype", "int8"], "dtype must be one of"),
        (["select", "{checkpoint}", "{pictures}", "--output-dir", "{checkpoint}/config.json"], "is not writable"),
        (["select", "{checkpoint}", "{pictures}", "--save-model", "{checkpoint}"], "already exists"),
        (["features", "{checkpoint}"], "DATA is missing"),
        (["benchmark", "x", "--batch_sizes", "1,b"], "batch_sizes must be integers"),
        (["benchmark", "{checkpoint}", "--batch_sizes", "0"], "batch_sizes must be positive"),
        (["benchmark", "{checkpoint}", "--feature", "blocks.1.mlp"], "hidden, query, key, value"),
        (["benchmark", "{checkpoint}", "--output", "{checkpoint}/config.json/x.json"], "is not writable"),
        (["convert", "{pictures}", "out"], "is not a checkpoint"),
    ],
    ids=str,
)
def test_mistakes_end_in_one_line(aselect, checkpoint, pictures, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    filled = [argument.format(checkpoint=checkpoint, pictures=pictures) for argument in arguments]
    code, _, stderr = aselect(*filled)
    assert code == 2
    last = [line for line in stderr.splitlines() if line.startswith("aselect: error:")]
    assert len(last) == 1
    assert re.search(message, last[0])
    left = [path for path in tmp_path.rglob("*") if path not in before and path.is_file()]
    assert not left


def test_truncated_weights_are_named(aselect, checkpoint, pictures):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, stderr = aselect("select", checkpoint, pictures)
    assert code == 2
    assert f"{weights} cannot be read" in stderr


def test_another_model_type_is_named(aselect, pictures, tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    code, _, stderr = aselect("select", tmp_path / "vit", pictures)
    assert code == 2
    assert "model of type 'vit'" in stderr


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_bomb_is_named_or_skipped(aselect, checkpoint, pictures, tmp_path, on_error):
    """The header of a picture of 50,000 x 50,000 pixels."""
    content = bytearray((pictures / "a" / "0.png").read_bytes())
    content[16:24] = (50_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (pictures / "a" / "0.png").write_bytes(content)
    out = tmp_path / "features.safetensors"
    code, stdout, stderr = aselect("features", checkpoint, pictures, "--output", out, "--on-error", on_error)
    assert code == (0 if on_error == "skip" else 2)
    assert "0.png cannot be read as an image" in (stdout if on_error == "skip" else stderr)
    assert out.is_file() == (on_error == "skip")


def test_a_split_does_not_judge_itself(aselect, pictures):
    code, _, stderr = aselect("compare", "sample", pictures, "--validation-split", "train")
    assert (code, "validation_split and train_split are both 'train'" in stderr) == (2, True)
