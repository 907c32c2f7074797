"""The commands as a user types them, in a process of their own where that matters."""

from __future__ import annotations

import json
import re
import sys
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from aselect_hf import ASelectDiTForSemanticSegmentation, ASelectDiTModel, cli
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
            cli.main()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_select_writes_curve_picture_and_model(aselect, checkpoint, pictures, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = aselect(
        "select",
        checkpoint,
        pictures,
        "--timesteps",
        "0,200,800",
        "--method",
        "hfr",
        "--search",
        "coarse_to_fine",
        "--early-stopping",
        "0.1",
        "--output-dir",
        out,
        "--save-model",
        tmp_path / "chosen",
    )
    assert code == 0
    assert "log-SNR" in stdout
    selection = json.loads((out / "selection.json").read_text())
    assert selection["timesteps"] == [0, 200, 800]
    assert selection["options"].items() >= {"search": "coarse_to_fine", "early_stopping": 0.1}.items()
    assert (out / "selection.png").stat().st_size > 10_000
    config = json.loads((tmp_path / "chosen" / "config.json").read_text())
    assert config["timestep"] == selection["timestep"]
    assert config["selection"]["method"] == "hfr"


def test_features_are_listed_and_written(aselect, checkpoint, pictures, tmp_path):
    code, stdout, _ = aselect("features", checkpoint, "--list")
    assert code == 0
    assert len(stdout.splitlines()) == 30
    assert "blocks.1.query" in stdout
    assert stdout.count("<- config.feature") == 1
    output = tmp_path / "features.safetensors"
    code, *_ = aselect(
        "features", checkpoint, pictures, "--features", "blocks.0.hidden,blocks.-1.key", "--timesteps", "5,50",
        "--output", output, "--no-pool",
    )  # fmt: skip
    assert code == 0
    tensors = load_file(output)
    assert tensors["blocks.-1.key"].shape == (12, 2, 16, 24)
    assert tensors["labels"].tolist() == [0] * 6 + [1] * 6


def test_compare_on_parquet_splits(aselect, checkpoint, tmp_path):
    import datasets

    for split in ("train", "validation", "test"):
        rows = {
            "image": [Image.new("L", (8, 8), 10 * i + 40) for i in range(20)],
            "label": [i // 10 for i in range(20)],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    code, stdout, stderr = aselect(
        "compare", checkpoint, tmp_path / "data", "--timesteps", "0,400", "--num-images", "4",
        "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache",
    )  # fmt: skip
    assert code == 0, stderr
    assert "raw pixels" in stdout
    assert (tmp_path / "out" / "compare.png").is_file()


def test_convert_to_diffusers_and_back(aselect, checkpoint, make_model, tmp_path):
    save_model(make_model(mlp_ratio=4, timestep_freq_shift=1), tmp_path / "wide")
    assert aselect("convert", tmp_path / "wide", tmp_path / "diffusers", "--to", "diffusers")[0] == 0
    assert aselect("convert", tmp_path / "diffusers" / "transformer", tmp_path / "back")[0] == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "back"))
    assert all(torch.equal(before[name], after[name]) for name in before if name != "evaluation_noise")


def test_convert_with_a_tiny_autoencoder(aselect, make_model, tiny_taesd, tmp_path, normal):
    save_model(make_model(num_channels=4), tmp_path / "latent")
    tiny_taesd.save_pretrained(tmp_path / "taesd")
    code, _, stderr = aselect("convert", tmp_path / "latent", tmp_path / "out", "--vae", tmp_path / "taesd")
    assert code == 0, stderr
    model = ASelectDiTModel.from_pretrained(tmp_path / "out").eval()
    assert (model.config.vae_config["_class_name"], model.config.image_size) == ("AutoencoderTiny", 16)
    with torch.no_grad():
        expected = (tiny_taesd.encode(normal(1, 3, 16, 16)).latents - 0.25) * 1.5
        torch.testing.assert_close(model.encode(normal(1, 3, 16, 16)), expected)


@pytest.mark.parametrize("head", [None, ASelectDiTForSemanticSegmentation])
def test_convert_to_a_fixed_timestep(aselect, make_model, pictures, tmp_path, head):
    whole = make_model(num_channels=1)
    if head:
        whole = head(whole.config)
    save_model(whole, tmp_path / "whole")
    arguments = ["convert", tmp_path / "whole", tmp_path / "fixed", "--fix-timestep", "--timestep", "70"]
    code, stdout, stderr = aselect(*arguments, *([] if head else ["--feature", "blocks.0.key"]))
    assert code == 0, stderr
    fixed = (head or ASelectDiTModel).from_pretrained(tmp_path / "fixed").eval()
    assert f"{fixed.num_parameters() / 1e6:.1f} M parameters" in stdout
    assert fixed.config.fixed_to["timestep"] == 70
    assert (tmp_path / "fixed" / "preprocessor_config.json").is_file()
    whole.config.timestep, whole.config.feature = 70, fixed.config.feature
    with torch.no_grad():
        torch.testing.assert_close(fixed(torch.ones(1, 1, 8, 8))[0], whole.eval()(torch.ones(1, 1, 8, 8))[0])
    if head is None:
        code, stdout, _ = aselect("features", tmp_path / "fixed", "--list")
        assert (code, stdout.split()[0], len(stdout.splitlines())) == (0, "blocks.0.key", 1)
        output = tmp_path / "features.safetensors"
        assert aselect("features", tmp_path / "fixed", pictures, "--output", output)[0] == 0
    code, _, stderr = aselect("select", tmp_path / "fixed", pictures)
    assert code == 2
    assert "aselect: error: selecting a timestep is not possible: this model is fixed to timestep 70" in stderr


def test_a_fixed_timestep_does_not_convert_to_diffusers(aselect, checkpoint, tmp_path):
    code, _, stderr = aselect("convert", checkpoint, tmp_path / "out", "--to", "diffusers", "--fix-timestep")
    assert code == 2
    assert "fix_timestep needs to='aselect'" in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["select", "no/such", "sample"], "'no/such' is neither a local path nor reachable on the Hub"),
        (["select", "{checkpoint}", "no/such"], "cannot load images from 'no/such'"),
        (["select", "{checkpoint}", "{pictures}", "--split", "dev"], "no split 'dev'"),
        (["select", "{checkpoint}", "{pictures}", "--timesteps", "a,b"], "timesteps must be integers"),
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
        (["select", "{checkpoint}", "{pictures}", "--dtype", "int8"], "dtype must be one of"),
        (["select", "{checkpoint}", "{pictures}", "--output-dir", "{checkpoint}/config.json"], "is not writable"),
        (["select", "{checkpoint}", "{pictures}", "--save-model", "{checkpoint}"], "already exists"),
        (["features", "{checkpoint}"], "DATA is missing"),
        (["benchmark", "{checkpoint}", "--batch_sizes", "1,b"], "batch_sizes must be integers"),
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


@pytest.mark.parametrize("command", ["select", "audit", "compare", "features", "convert", "benchmark", "push"])
def test_help_has_an_example(command, monkeypatch, aselect):
    monkeypatch.setenv("COLUMNS", "120")
    code, stdout, _ = aselect(command, "--help")
    assert (code, f"Example: aselect {command}" in stdout) == (0, True)


def test_home_is_expanded_after_an_equals_sign(aselect, checkpoint, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, _ = aselect("features", checkpoint, pictures, "--output=~/features.safetensors")
    assert (code, (tmp_path / "features.safetensors").is_file()) == (0, True)


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
