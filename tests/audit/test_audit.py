"""The audit of whole models and folders, in Python and by the command."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aselect_cli import app
from aselect_hf import select_timestep
from aselect_hf.audit import ANY_TIMESTEP, DO_NOT_TRUST, TRUST, UNCERTAIN, VERDICTS, Audit, audit_timestep
from aselect_hf.audit.curves import regret_by
from aselect_hf.conversion import load_model, save_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.selection import TimestepSelection


@pytest.fixture(scope="module")
def sample_model():
    return load_model("sample")


@pytest.mark.parametrize("labeled", [True, False])
def test_the_sample_from_end_to_end(sample_model, labeled, tmp_path):
    import datasets

    from aselect_hf.data.sources import load_images

    images: datasets.Dataset = load_images("sample", "train").select(range(120))
    if not labeled:
        images = images.select_columns(["image"])
    audit = audit_timestep(sample_model, images, method="hfr", timesteps=[0, 300, 949], num_images=100, progress=False)
    assert audit.timestep == 0
    assert audit.verdict in VERDICTS
    assert list(audit.selections) == ["hfr", "ridge" if labeled else "consensus"]
    assert (audit.method, audit.picked.timestep) == ("hfr", 0)
    assert sum(audit.pick_shares) == pytest.approx(1)
    assert any("untrained network" in warning for warning in audit.warnings) == labeled  # 100 images are few
    assert (audit.regret is not None) == (audit.chance is not None) == labeled
    assert audit.describe().startswith(f"{audit.verdict}: {audit.sentence}\nwarning: ")
    assert Audit.load(audit.save(tmp_path / "audit.json")) == audit
    assert audit.plot(tmp_path / "audit.png").stat().st_size > 30_000


@pytest.fixture
def labeled_images(normal) -> ImageData:
    """Two classes that differ in brightness, with noise on top."""
    labels = np.arange(30) % 2
    return ImageData(0.3 * normal(30, 2, 8, 8) + torch.from_numpy(labels - 0.5).float().view(-1, 1, 1, 1), labels)


RULES = {
    "auto": ("logme", ["hfr", "logme", "ridge"], False),
    "ridge": ("ridge", ["hfr", "ridge"], True),
    "shortlist": ("shortlist", ["hfr", "shortlist", "ridge"], True),
    "fixed": ("fixed", ["hfr", "fixed", "ridge"], False),
    "grid": ("grid", ["hfr", "grid", "ridge"], False),
}


@pytest.mark.parametrize("method", RULES)
def test_any_rule_is_audited(model, labeled_images, method, tmp_path):
    name, selections, itself = RULES[method]
    audit = audit_timestep(
        model, labeled_images, method=method, timesteps=[0, 300, 600, 900], cache_dir=tmp_path, progress=False
    )
    assert (audit.method, [*audit.selections]) == (name, selections)
    assert audit.timestep == audit.picked.timestep in audit.selections["hfr"].timesteps
    assert audit.regret == regret_by(audit.checked, audit.selections["hfr"].timesteps.index(audit.timestep), 0)
    assert ("it checks itself" in audit.sentence) == itself
    assert (audit.pick_shares is not None) == (name in ("ridge", "shortlist"))
    assert audit.plot(tmp_path / "audit.png").is_file()


class TestUntrainedNetwork:
    def test_differs_from_the_model_in_its_weights_alone(self, make_model, tiny_kl):
        vae_config = dict(tiny_kl.config) | {"_class_name": "AutoencoderKL"}
        model = make_model(num_channels=4, vae_config=vae_config).to(torch.bfloat16)
        model.vae.float()
        state = torch.get_rng_state()
        twin, again = model.untrained_twin(), model.untrained_twin()
        assert torch.equal(torch.get_rng_state(), state)
        assert twin.vae is model.vae
        assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
        assert twin.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
        pixels = torch.zeros(1, 3, 16, 16)
        latents = model.prepare_latents(pixels)
        assert torch.equal(twin.stored_noise(latents), model.stored_noise(latents))
        weights = [dict(each.layers.named_parameters()) for each in (model, twin, again)]
        assert not torch.equal(*(each["0.mlp.fc1.weight"] for each in weights[:2]))
        assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])

    def test_a_model_that_never_learned_is_noticed(self, model, labeled_images):
        audit = audit_timestep(model.untrained_twin(), labeled_images, timesteps=[0, 900], progress=False)
        assert audit.untrained == max(audit.checked.scores)
        assert any("untrained network" in warning for warning in audit.warnings)

    def test_a_trained_one_is_not_blamed(self, sample_model):
        from aselect_hf.data.sources import load_images

        images = load_images("sample", "train").select(range(600))
        audit = audit_timestep(sample_model, images, method="fixed", timestep=300, timesteps=[0, 213], progress=False)
        assert audit.chance < audit.untrained < max(audit.checked.scores)
        assert not any("untrained network" in warning for warning in audit.warnings)


@pytest.mark.parametrize(("method", "check"), [("rankme", "consensus"), ("consensus", "hfr"), ("hfr", "consensus")])
def test_without_labels_the_check_is_independent_of_the_rule(model, normal, method, check, tmp_path):
    audit = audit_timestep(model, normal(12, 2, 8, 8), method=method, timesteps=[0, 300, 900], progress=False)
    assert (audit.method, audit.checked_by, audit.regret) == (method, check, None)
    assert {"hfr", method, check} == {*audit.selections}
    assert -1 <= audit.rank_correlation <= 1
    assert audit.plot(tmp_path / "audit.png").is_file()


def test_a_guess_is_audited_where_it_stands(model, labeled_images):
    audit = audit_timestep(model, labeled_images, method="fixed", timestep=77, timesteps=[0, 900], progress=False)
    assert audit.timestep == 77
    assert audit.selections["hfr"].timesteps == audit.checked.timesteps == [0, 77, 900]
    assert audit.rank_correlation is None


def test_a_pick_that_was_made_is_audited(model, labeled_images):
    pick = partial(select_timestep, model, labeled_images, timesteps=[0, 400, 900], progress=False)
    made = pick(method="hfr", feature="blocks.0.key")
    audit = audit_timestep(model, labeled_images, selection=made, progress=False)
    assert audit.picked is audit.selections["hfr"] is made
    assert audit.checked.feature == "blocks.0.key"
    raw = pick(method="hfr", noise_correction=False)
    audit = audit_timestep(model, labeled_images, selection=raw, progress=False)
    assert audit.picked is raw
    assert audit.method == "hfr, uncorrected"
    assert audit.selections["hfr"].options["noise_correction"]
    with pytest.raises(ValueError, match="selection has its own method, feature and timesteps"):
        audit_timestep(model, labeled_images, selection=made, timesteps=[0, 5])
    made.schedule = made.schedule | {"beta_end": 0.5}
    with pytest.raises(ValueError, match="made for a noise schedule other than the model's"):
        audit_timestep(model, labeled_images, selection=made)


def test_a_pick_that_hangs_on_rounding_is_judged_by_the_worst_it_may_be(model, labeled_images, monkeypatch):
    monkeypatch.setattr(
        "aselect_hf.audit.audit.judge_by_probe", lambda probe, pick, *_: (VERDICTS[1:][pick], f"at {pick}")
    )
    monkeypatch.setattr("aselect_hf.audit.audit.FEW_TIMESTEPS", 3)
    made = select_timestep(model, labeled_images, method="logme", timesteps=[0, 400, 999], progress=False)
    assert (made.timestep, made.perturbed_timesteps) == (0, [0, 0, 0])
    assert audit_timestep(model, labeled_images, selection=made, progress=False).sentence == "at 0"
    made.perturbed_timesteps = [0, 999, 400]
    audit = audit_timestep(model, labeled_images, selection=made, progress=False)
    assert audit.verdict == DO_NOT_TRUST
    assert audit.sentence == "the pick depends on rounding, which may change it to t = 999; at 2"
    assert "the pick of logme depends on rounding" in audit.warnings[0]


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("method", ["auto", "hfr", "rankme"])
def test_images_that_are_all_the_same_are_not_audited(model, normal, labeled, method):
    copies = ImageData(normal(1, 2, 8, 8).repeat(12, 1, 1, 1), np.arange(12) % 2 if labeled else None)
    with pytest.raises(ValueError, match="no timestep can be chosen: all 12 images of images are the same"):
        audit_timestep(model, copies, method=method, timesteps=[0, 300, 900], progress=False)


@pytest.mark.parametrize("labels", [[1] * 12, range(12)], ids=["one class", "a class each"])
def test_labels_that_tell_nothing_are_named(model, normal, labels):
    data = ImageData(normal(12, 2, 8, 8), np.array(labels))
    audit = audit_timestep(model, data, method="rankme", timesteps=[0, 300, 900], progress=False)
    unused = "the labels are not used, because no 2 classes have 2 images each (images by class"
    assert any(unused in warning for warning in audit.warnings)
    assert audit.verdict != TRUST


def test_what_is_not_an_audit_is_named(tmp_path):
    (tmp_path / "audit.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a saved audit"):
        Audit.load(tmp_path / "audit.json")


def test_masks_are_audited(make_model, tmp_path):
    import datasets

    rng = np.random.default_rng(0)
    masks = [np.repeat(np.repeat(rng.integers(0, 2, (4, 4)), 2, 0), 2, 1).astype(np.uint8) for _ in range(12)]
    rows = {"image": [Image.fromarray(200 * mask) for mask in masks], "mask": [Image.fromarray(mask) for mask in masks]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(image=datasets.Image(), mask=datasets.Image()))
    audit = audit_timestep(make_model(num_channels=1), data, timesteps=[0, 900], progress=False)
    assert audit.selections["ridge"].options["task"] == "segmentation"
    assert audit.regret is not None
    assert audit.chance is None
    assert audit.plot(tmp_path / "audit.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"tolerance": 0}, "tolerance must be a positive"), ({"timesteps": [5]}, "timesteps must hold at least 2")],
)
def test_bad_arguments(model, normal, arguments, message):
    with pytest.raises(ValueError, match=message):
        audit_timestep(model, normal(6, 2, 8, 8), progress=False, **arguments)


@pytest.fixture
def files(make_model, tmp_path) -> tuple[Path, Path]:
    save_model(make_model(num_channels=1), tmp_path / "model")
    rng = np.random.default_rng(0)
    for index in range(16):
        path = tmp_path / "images" / ("ab"[index % 2]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
    return tmp_path / "model", tmp_path / "images"


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["aselect", "audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        app.main()
    return exit.value.code or 0


@pytest.mark.parametrize(("verdict", "code"), [(ANY_TIMESTEP, 0), (TRUST, 0), (UNCERTAIN, 3), (DO_NOT_TRUST, 4)])
def test_exit_codes(files, monkeypatch, capsys, tmp_path, verdict, code):
    """Noise has no classes; only the judgment is replaced."""
    monkeypatch.setattr("aselect_hf.audit.audit.judge_by_probe", lambda *arguments: (verdict, "because"))
    assert run(monkeypatch, *files, "--timesteps", "0,200,500,700,900", "--output-dir", tmp_path / "out") == code
    assert f"\n{verdict}: because\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["verdict"] == verdict
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.json", "audit.png"]


def test_few_timesteps_are_never_trusted(files, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("aselect_hf.audit.audit.judge_by_probe", lambda *arguments: (TRUST, "because"))
    assert run(monkeypatch, *files, "--timesteps", "0,200,500,900", "--output-dir", tmp_path / "out") == 3
    assert "uncertain: only 4 timesteps were compared; because" in capsys.readouterr().out


def test_noise_is_not_trusted_by_the_command(files, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, *files, "--timesteps", "0,500", "--output-dir", tmp_path / "out") == 4
    assert (
        "at no timestep do the features predict these labels significantly better than chance"
        in capsys.readouterr().out
    )


def test_guesses_and_saved_picks_by_the_command(files, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    arguments = [*files, "--timesteps", "0,500", "--method", "fixed", "--timestep", "40", "--output-dir", out]
    assert run(monkeypatch, *arguments) in (0, 3, 4)
    assert "t = 40 of 1000" in capsys.readouterr().out
    content = json.loads((out / "audit.json").read_text())
    assert (content["method"], content["timestep"]) == ("fixed", 40)
    TimestepSelection.from_dict(content["selections"]["hfr"]).save(tmp_path / "selection.json")
    assert run(monkeypatch, *files, "--selection", tmp_path / "selection.json", "--output-dir", out) in (0, 3, 4)
    again = json.loads((out / "audit.json").read_text())
    assert again["selections"]["hfr"] == content["selections"]["hfr"]
    assert again["timestep"] == content["selections"]["hfr"]["timestep"]
    assert run(monkeypatch, *files, "--timestep", "40", "--output-dir", out) == 2
    assert "method 'auto' has no option timestep;" in capsys.readouterr().err


def test_nothing_is_left_of_a_failure(files, monkeypatch, tmp_path):
    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("aselect_hf.audit.result.plot_audit", fail)
    assert run(monkeypatch, *files, "--timesteps", "0,500", "--output-dir", tmp_path / "out") == 2
    assert list((tmp_path / "out").iterdir()) == []
