"""What each command does and writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from modeling.tiny_transformers import store_prompt, tiny_config, tiny_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from aselect_hf import ASelectDiffusionForImageClassification, ASelectDiTForSemanticSegmentation, ASelectDiTModel
from aselect_hf.conversion import save_model
from tests.data.tars import write_tars


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
    assert tensors["rows"].tolist() == [*range(12)]
    with safe_open(output, framework="pt") as file:
        metadata = {name: json.loads(text) for name, text in file.metadata().items()}
    assert metadata["ids"][:2] == ["a/0.png", "a/10.png"]
    assert metadata["record"]["columns"]["blocks_0_hidden_t5"]["timestep"] == 5


def test_tars_are_streamed(aselect, checkpoint, tmp_path):
    tars, out = write_tars(tmp_path / "tars", [6, 4]) / "part-*.tar", tmp_path / "out"
    run = ("features", checkpoint, tars, "--streaming", "--timesteps", "5", "-o", out)
    assert aselect(*run, "--shard", "1/2")[0] == 0
    code, stdout, stderr = aselect(*run)
    assert (code, "(10, 24)" in stdout, len(list(out.glob("*.parquet")))) == (0, True, 2)
    assert "2 shards" in stdout
    assert "1 of 1 shards, 00:00 left" in stderr  # of what was missing
    code, _, stderr = aselect(*run, "--max-samples", "3")
    assert (code, "neither max_samples nor num_shards" in stderr) == (2, True)
    run = ("select", checkpoint, tars, "--streaming", "--max-samples", "8", "--method", "ridge", "--timesteps", "5,200")
    assert aselect(*run, "--output-dir", tmp_path / "selected")[0] == 0
    assert json.loads((tmp_path / "selected" / "selection.json").read_text())["num_images"] == 8


def test_a_streamed_split_has_the_classes_of_the_training_split(aselect, checkpoint, tmp_path):
    """A split may lack a class; its others keep their numbers. Ids tell files of the same name apart."""
    for split, classes in (("train", "abc"), ("validation", "ac")):
        for name in classes:
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            Image.fromarray(np.full((8, 8), ord(name), np.uint8)).save(folder / "0.png")
    rows = []
    for extra in ([], ["--streaming"]):
        out = tmp_path / f"out{len(extra)}"
        asked = ("--split", "validation", "--timesteps", "5", *extra)
        assert aselect("features", checkpoint, tmp_path / "data", *asked, "-o", out)[0] == 0
        rows.append(pd.read_parquet(out).sort_values("id"))
    for found in rows:
        assert found["label"].tolist() == [0, 2]
        assert found["label_name"].tolist() == ["a", "c"]
    assert rows[0]["id"].tolist() == ["a/0.png", "c/0.png"]
    assert rows[1]["id"].tolist() == ["validation/a/0.png", "validation/c/0.png"]


def test_features_become_a_data_set_and_a_job_does_its_share(aselect, checkpoint, pictures, tmp_path):
    run = ("features", checkpoint, pictures, "--timesteps", "5,50", "-o", tmp_path / "out", "--num-shards", "3")
    code, stdout, _ = aselect(*run, "--shard", "1/3")
    assert code == 0
    assert "wrote the shards of job 1/3" in stdout
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["features-00001-of-00003.parquet"]
    code, stdout, _ = aselect(*run)
    assert code == 0
    assert "wrote" in stdout
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 3
    code, _, stderr = aselect(*run, "--stored-dtype", "float16")
    assert code == 2
    assert "holds features of another request" in stderr
    code, _, stderr = aselect("features", checkpoint, pictures, "--num-shards", "3")
    assert (code, "num_shards needs a folder" in stderr) == (2, True)


@pytest.fixture
def splits(tmp_path) -> Path:
    import datasets

    for split in ("train", "validation", "test"):
        rows = {
            "image": [Image.new("L", (8, 8), 10 * i + 40) for i in range(20)],
            "label": [i // 10 for i in range(20)],
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    return tmp_path / "data"


def test_compare_on_parquet_splits(aselect, checkpoint, splits, tmp_path):
    code, stdout, stderr = aselect(
        "compare", checkpoint, splits, "--timesteps", "0,400", "--num-images", "4",
        "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache",
    )  # fmt: skip
    assert code == 0, stderr
    assert "raw pixels" in stdout
    assert f"The picture: {tmp_path / 'out' / 'compare.png'}\nNext: aselect select {checkpoint}" in stdout
    assert (tmp_path / "out" / "compare.png").is_file()


def test_compare_hands_feature_and_cells_to_the_next_command(aselect, checkpoint, splits, tmp_path):
    code, stdout, stderr = aselect(
        "compare", checkpoint, splits, "--timesteps", "0,400", "--num-images", "4", "--feature", "blocks.0.mlp",
        "--pool-size", "2", "--methods", "hfr,fixed", "--output-dir", tmp_path / "out", "--cache-dir", tmp_path,
    )  # fmt: skip
    assert code == 0, stderr
    assert f"Next: aselect select {checkpoint} {splits} --feature blocks.0.mlp --pool-size 2 --save-model" in stdout


def test_compare_hands_options_to_the_rules_that_have_them(aselect, checkpoint, splits, tmp_path):
    code, stdout, stderr = aselect(
        "compare", checkpoint, splits, "--strategies", "hfr,lidar,snr,grid,fixed", "--timesteps", "0,400",
        "--num_images", "8", "--num-views", "3", "--cutoff", "0.2", "--fixed-timestep", "77", "--max-tokens", "50",
        "--probe", "knn", "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--json",
    )  # fmt: skip
    assert code == 0, stderr
    found = {row["strategy"]: row["selection"] for row in json.loads(stdout)["rows"]}
    assert found["hfr"]["options"]["cutoff"] == 0.2
    assert found["lidar"]["options"]["num_views"] == found["snr"]["options"]["num_views"] == 3
    assert found["grid"]["options"]["probe"] == "knn"
    assert found["fixed"]["timestep"] == 77


def test_select_has_the_options_of_every_rule(aselect, checkpoint, pictures, tmp_path):
    code, stdout, stderr = aselect(
        "select", checkpoint, pictures, "--method", "lidar", "--timesteps", "0,400", "--num_views", "3",
        "--pool_size", "2", "--output-dir", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0, stderr
    found = json.loads(stdout)
    assert found["options"].items() >= {"num_views": 3, "pool_size": 2}.items()


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


@pytest.mark.parametrize("family", ["SD3.5", "Sana"])
def test_convert_a_text_to_image_classifier_to_a_fixed_timestep(aselect, tmp_path, family):
    """With the options and the head of any other model; what has no fold says which families have one."""
    whole = ASelectDiffusionForImageClassification(tiny_config(family, num_labels=3, kept_blocks=2)).eval()
    save_model(store_prompt(whole), tmp_path / "whole")
    code, stdout, stderr = aselect("convert", tmp_path / "whole", tmp_path / "fixed", "--fix-timestep")
    assert code == 0, stderr
    fixed = ASelectDiffusionForImageClassification.from_pretrained(tmp_path / "fixed").eval()
    assert f"{fixed.num_parameters() / 1e6:.1f} M parameters" in stdout
    with torch.no_grad():
        latents = torch.ones(1, 4, 8, 8)
        torch.testing.assert_close(fixed(latents)[0], whole(latents)[0], rtol=1e-4, atol=1e-4)
    save_model(tiny_model("FLUX"), tmp_path / "flux")
    code, _, stderr = aselect("convert", tmp_path / "flux", tmp_path / "nothing", "--fix-timestep")
    assert code == 2
    assert "there is one for SD3Transformer2DModel, PixArtTransformer2DModel, SanaTransformer2DModel and DiT" in stderr
    assert not (tmp_path / "nothing").exists()


def test_a_fixed_timestep_does_not_convert_to_diffusers(aselect, checkpoint, tmp_path):
    code, _, stderr = aselect("convert", checkpoint, tmp_path / "out", "--to", "diffusers", "--fix-timestep")
    assert code == 2
    assert "fix_timestep needs to='aselect'" in stderr


@pytest.mark.parametrize("command", ["select", "audit", "compare", "features", "convert", "benchmark", "push"])
def test_help_has_an_example(command, monkeypatch, aselect):
    monkeypatch.setenv("COLUMNS", "120")
    code, stdout, _ = aselect(command, "--help")
    assert (code, f"Example: aselect {command}" in stdout) == (0, True)


def test_home_is_expanded_after_an_equals_sign(aselect, checkpoint, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, _ = aselect("features", checkpoint, pictures, "--output=~/features.safetensors")
    assert (code, (tmp_path / "features.safetensors").is_file()) == (0, True)


@pytest.mark.parametrize("command", ["select", "audit"])
def test_a_report_is_written_beside_the_result(aselect, checkpoint, pictures, tmp_path, command):
    report = tmp_path / "reports" / "report.html"
    code, stdout, stderr = aselect(
        command, checkpoint, pictures, "--method", "hfr", "--timesteps", "0,400", "--output-dir", tmp_path / "out",
        "--report", report, "--cache-dir", tmp_path / "cache",
    )  # fmt: skip
    assert code in (0, 3, 4), stderr
    assert str(report) in stdout
    assert f"aselect {command}" in report.read_text(encoding="utf-8")


def test_compare_writes_a_report(aselect, checkpoint, splits, tmp_path):
    code, _, stderr = aselect(
        "compare", checkpoint, splits, "--methods", "hfr,fixed", "--timesteps", "0,400", "--num-images", "4",
        "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache", "--report", tmp_path / "report.html",
    )  # fmt: skip
    assert code == 0, stderr
    assert "Comparison of hfr, fixed" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_ends_before_the_work(aselect, checkpoint, pictures, tmp_path):
    code, _, stderr = aselect("select", checkpoint, pictures, "--output-dir", tmp_path / "out", "--report", tmp_path)
    assert (code, "is a folder: give the path of a file" in stderr) == (2, True)
    assert not (tmp_path / "out" / "selection.json").exists()
