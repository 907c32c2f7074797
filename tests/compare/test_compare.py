"""The comparison keeps its protocol: chosen without the test split, scored on it once per seed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from aselect_hf import select_timestep
from aselect_hf.audit import Audit
from aselect_hf.compare import run
from aselect_hf.compare.run import compare_strategies, raw_pixels
from aselect_hf.compare.table import Comparison
from aselect_hf.data.image_data import ImageData
from aselect_hf.selection import RULES
from aselect_hf.selection.probe import PROBES, Probe, fit_probe


@pytest.fixture
def splits(normal) -> dict[str, ImageData]:
    def draw(count: int, seed: int) -> ImageData:
        labels = np.arange(count) % 3
        offset = torch.from_numpy(labels - 1.0).float().view(-1, 1, 1, 1)
        return ImageData(0.5 * normal(count, 2, 8, 8, seed=seed) + offset, labels)

    return {"train": draw(60, 1), "validation": draw(30, 2), "test": draw(45, 3)}


@pytest.fixture
def comparison(model, splits, tmp_path):
    return compare_strategies(
        model,
        splits,
        strategies=list(RULES),
        timesteps=[0, 300, 900],
        num_images=6,
        cache_dir=tmp_path,
        progress=False,
    )


def test_rows_and_cost(comparison):
    assert [row.strategy for row in comparison.rows] == list(RULES)
    grid, hfr = comparison.row("grid"), comparison.row("hfr")
    assert comparison.regret(grid) == 0
    assert grid.validation_accuracy == max(grid.selection.scores)
    assert hfr.selection.cost.forward_passes == 2 * 6 * 3
    assert grid.selection.cost.forward_passes == 90 * 3
    (row,) = (row for row in comparison.table() if row["strategy"] == "hfr")
    assert row["FLOPs vs grid"] == "1/8"
    assert all(len(row.test_accuracies) == 3 for row in comparison.rows)


def test_what_uncorrected_hfr_would_pick_is_said_only_where_all_was_scored(comparison):
    assert "HFR without noise correction would pick" in comparison.summary()[1]
    comparison.row("hfr").selection.options["search"] = "coarse_to_fine"
    assert not any("HFR without noise correction" in line for line in comparison.summary())


def test_the_pick_of_hfr_is_audited(comparison, tmp_path):
    audit = comparison.audit
    assert audit.picked is comparison.row("hfr").selection
    assert audit.checked.num_images == 60  # as a probe needs, not the 6 that strategies may see
    assert audit.checked.cost.forward_passes < comparison.row("grid").selection.cost.forward_passes
    assert comparison.summary()[-1] == f"Audit of hfr: {audit.verdict}: {audit.sentence}."
    folder = comparison.save(tmp_path / "out")
    assert Audit.load(folder / "audit.json") == audit == Comparison.load(folder / "compare.json").audit
    assert (folder / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert audit.sentence in (folder / "compare.md").read_text()


@pytest.mark.parametrize(
    ("strategies", "audited"), [(["fixed"], None), (["fixed", "logme"], "logme"), (["rankme", "hfr"], "hfr")]
)
def test_what_is_audited(model, splits, strategies, audited, tmp_path):
    run = {"timesteps": [0, 900], "num_seeds": 1, "cache_dir": tmp_path, "progress": False}
    comparison = compare_strategies(model, splits, strategies=strategies, **run)
    assert (comparison.audit and comparison.audit.method) == audited
    folder = comparison.save(tmp_path / "out")
    assert (folder / "audit.json").exists() == (folder / "audit.png").exists() == (audited is not None)
    assert Comparison.load(folder / "compare.json").audit == comparison.audit


def test_same_timestep_gives_the_same_accuracy(comparison):
    by_timestep = {}
    for row in comparison.rows:
        known = by_timestep.setdefault(row.selection.timestep, row.test_accuracies)
        assert row.test_accuracies == known


def test_features_of_one_timestep_are_told_apart(model, splits, tmp_path, monkeypatch):
    """With `feature="auto"`, rules may choose the same timestep of different features."""
    chosen = iter(("blocks.0.query", "blocks.2.mlp", "blocks.2.mlp"))
    asked, plain = [], run.pooled_features

    def pooled(model, data, timesteps, feature, **options):
        asked.append(feature)
        return plain(model, data, timesteps, feature, **options)

    def select(*arguments, method, **options):
        selection = select_timestep(*arguments, method="fixed", progress=False)
        return dataclasses.replace(selection, method=method, feature=next(chosen))

    monkeypatch.setattr(run, "pooled_features", pooled)
    monkeypatch.setattr(run, "select_timestep", select)
    monkeypatch.setattr(run, "audited_row", lambda rows: None)
    rules = ["knn", "logme", "ridge"]
    options = {"feature": "auto", "num_seeds": 1, "cache_dir": tmp_path, "progress": False}
    first, *others = compare_strategies(model, splits, strategies=rules, **options).rows
    assert asked == ["blocks.0.query"] * 3 + ["blocks.2.mlp"] * 3
    assert others[0].test_accuracies == others[1].test_accuracies
    assert first.selection.feature != others[0].selection.feature


def test_test_split_is_touched_only_at_the_chosen_timesteps(model, splits, tmp_path, monkeypatch):
    scored = []
    accuracy = Probe.accuracy
    monkeypatch.setattr(Probe, "accuracy", lambda self, x, y: scored.append(len(y)) or accuracy(self, x, y))
    compare_strategies(
        model, splits, strategies=["grid"], timesteps=[0, 300, 900], num_seeds=2, cache_dir=tmp_path, progress=False
    )
    assert scored == [45] * 2 + [45] * 2  # the strategy's two seeds, the raw pixels' two seeds


def test_saved_files(comparison, tmp_path):
    folder = comparison.save(tmp_path / "out")
    content = json.loads((folder / "compare.json").read_text())
    assert [row["strategy"] for row in content["rows"]] == list(RULES)
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "compare.md").read_text()
    assert "60 train + 30 validation + 45 test" in text
    assert "raw pixels" in text
    assert {path.name for path in folder.iterdir()} >= {f"selection-{name}.json" for name in RULES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategies": []}, "strategies must name at least one"),
        ({"strategies": ["grid", "hrf"]}, "method 'hrf' is unknown"),
        ({"strategies": ["grid"], "strategy_options": {"fixed": {"timestep": 5}}}, "timestep of 'fixed' is given, but"),
        ({"strategies": ["hfr"], "strategy_options": {"hfr": {"probe": "knn"}}}, "probe is an option of grid"),
        ({"strategies": ["rankme", "hfr"], "feature": "auto"}, "not those of 'rankme'"),
    ],
    ids=str,
)
def test_wrong_requests_are_refused_before_any_work(model, splits, monkeypatch, arguments, message):
    monkeypatch.setattr("aselect_hf.compare.run.select_timestep", lambda *_, **__: pytest.fail("a strategy was run"))
    with pytest.raises(ValueError, match=message):
        compare_strategies(model, splits, **arguments)


def test_splits_and_labels_are_required(model, splits, normal):
    with pytest.raises(ValueError, match="missing: test"):
        compare_strategies(model, {name: splits[name] for name in ("train", "validation")})
    with pytest.raises(ValueError, match="test has none"):
        compare_strategies(model, splits | {"test": ImageData(normal(4, 2, 8, 8))})


@pytest.mark.parametrize("kind", PROBES)
def test_probe_learns_and_chooses_on_validation(kind):
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 4
    features = generator.normal(size=(200, 8)) + 4 * np.eye(4, 8)[labels]
    probe = fit_probe(features[:120], labels[:120], features[120:160], labels[120:160], kind=kind)
    assert probe.accuracy(features[160:], labels[160:]) > 0.7
    assert probe.validation_score == probe.accuracy(features[120:160], labels[120:160])
    useless = fit_probe(features[:120], generator.permutation(labels[:120]), features[120:160], labels[120:160])
    assert useless.validation_score < 0.5


def test_a_latent_model_is_compared_with_its_latents(make_model, tiny_kl, normal, tmp_path):
    config = dict(tiny_kl.config) | {"_class_name": "AutoencoderKL"}
    model = make_model(num_channels=4, sample_size=8, vae_config=config)
    sizes = {"train": 30, "validation": 15, "test": 20}
    splits = {name: ImageData(normal(size, 3, 16, 16, seed=size), np.arange(size) % 3) for name, size in sizes.items()}
    options = {"timesteps": [0, 300], "num_images": 6, "cache_dir": tmp_path, "progress": False}
    found = compare_strategies(model, splits, strategies=["fixed"], **options)
    assert len(found.latent_accuracies) == 3
    latents = run.vae_latents(model, splits["test"], None, tmp_path, False)
    with torch.no_grad():
        expected = model.prepare_latents(torch.cat([*splits["test"].batches(model.config, 64)]))
    np.testing.assert_allclose(latents, expected.flatten(1).numpy(), atol=1e-4)
    assert "The same probe on the VAE's latents:" in found.summary()[1]
    assert Comparison.load(found.save(tmp_path / "out") / "compare.json").latent_accuracies == found.latent_accuracies


def test_raw_pixels_are_the_pixels(splits, make_config):
    assert np.array_equal(raw_pixels(splits["test"], make_config()), splits["test"].items.flatten(1).numpy())
    assert raw_pixels(ImageData(torch.zeros(2, 2, 64, 64)), make_config(sample_size=64)).shape == (2, 2 * 32 * 32)
