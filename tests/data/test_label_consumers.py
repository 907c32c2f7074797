"""Rules, comparison, audit and commands on labels as they come: missing, sparse, as text, sorted, or of no use."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.utils.data import DataLoader, default_collate

from aselect_cli import app
from aselect_hf import select_timestep
from aselect_hf.audit import audit_timestep
from aselect_hf.compare.run import compare_strategies
from aselect_hf.conversion import save_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.selection import RULES

FEW = [name for name, rule in RULES.items() if rule.labels == "few"]
LABELED = [name for name, rule in RULES.items() if rule.labels != "none"]
NAMES = ["ant", "bee", "cat"]
MISSING = {"-1": -1, "None": None, "NaN": float("nan")}


@pytest.fixture
def bright(normal):
    """`bright(classes, seed=0)`: pixels whose brightness says the class."""

    def build(classes: Any, seed: int = 0) -> torch.Tensor:
        classes = torch.as_tensor(np.asarray(classes)).float()
        return 0.2 * normal(len(classes), 2, 8, 8, seed=seed) + (classes - 1).view(-1, 1, 1, 1)

    return build


@pytest.fixture
def choose(model, tmp_path):
    def choose(images: Any, method: str, **options: Any):
        options = ({"num_epochs": 1} if method == "gate" else {}) | options
        return select_timestep(
            model, images, method=method, timesteps=[0, 400, 900], cache_dir=tmp_path, progress=False, **options
        )

    return choose


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("rule", LABELED)
def test_a_rule_with_labels_sees_the_labeled_images_only(choose, bright, rule, missing, caplog):
    classes = np.arange(30) % 3
    labels = [MISSING[missing] if row % 5 == 4 else float(label) for row, label in enumerate(classes)]
    known = np.arange(30)[np.arange(30) % 5 != 4]
    pixels = bright(classes)
    selection = choose(ImageData(pixels, labels), rule)
    expected = choose(ImageData(pixels[known], classes[known]), rule)
    assert (selection.scores, selection.num_images) == (expected.scores, expected.num_images)
    assert "6 of 30 images of images have no label: not used" in caplog.text


@pytest.mark.parametrize("rule", LABELED)
def test_numbers_of_classes_change_no_score(choose, bright, rule):
    classes = np.arange(24) % 3
    pixels = bright(classes)
    scores = choose(ImageData(pixels, classes), rule).scores
    for labels in ([[0, 1000, 900_000_000][label] for label in classes], [NAMES[label] for label in classes]):
        assert choose(ImageData(pixels, labels), rule).scores == scores


@pytest.mark.parametrize("rule", FEW)
def test_a_sample_for_labels_has_every_class(choose, bright, rule):
    """Sorted by class, and one of them rare."""
    classes = np.repeat([0, 1], [300, 4])
    assert choose(ImageData(bright(classes), classes), rule, num_images=12).num_images == 12


def test_grid_validates_by_name(choose, bright):
    train, held_out = np.arange(24) % 3, np.repeat([1, 2], 5)
    validation = ImageData(bright(held_out, seed=1), [NAMES[label] for label in held_out])
    selection = choose(ImageData(bright(train), [NAMES[x] for x in train]), "grid", validation=validation)
    assert selection.scores[0] > 0.9
    validation = ImageData(bright([1]), ["zebra"])
    with pytest.raises(ValueError, match="have the class 'zebra', which the training images lack"):
        choose(ImageData(bright(train), [NAMES[x] for x in train]), "grid", validation=validation)


@pytest.mark.parametrize("rule", LABELED)
def test_too_few_images_of_a_class_are_named(choose, bright, rule):
    images = ImageData(bright([0] * 9 + [1]), ["common"] * 9 + ["rare"])
    if rule in ("grid", "gate"):  # they only need something to learn
        assert choose(images, rule).timestep in (0, 400, 900)
        return
    with pytest.raises(ValueError, match=r"needs at least 2 classes with 2 images each.*'rare' 1, 'common' 9"):
        choose(images, rule)


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([None] * 20, "all 20 are missing"),
        ([[0, 1]] * 20, r"column 'label' of images hold lists such as \[0, 1\]"),
        (np.random.default_rng(0).normal(size=20), "continuous numbers such as .*, not classes"),
    ],
    ids=["missing", "several", "regression"],
)
def test_useless_labels_are_not_used_and_the_reason_is_said(choose, bright, labels, why, caplog):
    features = {"image": datasets.Image()}
    images = [Image.new("L", (8, 8), 10 * row) for row in range(20)]
    dataset = datasets.Dataset.from_dict({"image": images}, datasets.Features(features))
    dataset = dataset.add_column("label", list(labels))
    data = ImageData.of(dataset)
    data.items = bright(np.arange(20) % 3)  # for the model of 2 channels
    assert choose(data, "auto").method == "consensus_rank"
    assert choose(data, "hfr").method == "hfr"
    assert re.search(f"no labels are used, so the rule is consensus_rank: .*{why}", caplog.text)
    for rule in LABELED:
        with pytest.raises(ValueError, match=f"has none: .*{why}"):
            choose(data, rule)
    if why != "all 20 are missing":
        with pytest.raises(ValueError, match=why):
            ImageData.of(dataset, label_column="label")


def test_the_audit_probes_labeled_images(model, bright, tmp_path):
    classes = np.arange(40) % 2
    pixels, run = bright(classes), {"timesteps": [0, 400, 900], "cache_dir": tmp_path, "progress": False}
    labels = [-1 if row % 4 == 3 else label for row, label in enumerate(classes)]
    known = np.array(labels) >= 0
    audit = audit_timestep(model, ImageData(pixels, labels), **run)
    expected = audit_timestep(model, ImageData(pixels[known], classes[known]), **run)
    assert audit.checked.scores == expected.checked.scores
    assert (audit.chance, audit.verdict) == (expected.chance, expected.verdict)
    assert "10 of 40 images have no label and are not used" in audit.warnings


@pytest.mark.parametrize("held_out", [[0, 1, 2], [1, 2]])
def test_the_comparison_matches_classes_by_name(model, bright, held_out, tmp_path):
    """The accuracies of text, in splits that lack a class, are those of integers."""
    classes = {"train": np.arange(30) % 3, "validation": np.arange(12) % 3, "test": np.resize(held_out, 12)}
    run = {"strategies": ["fixed"], "timesteps": [0, 500], "num_seeds": 2, "cache_dir": tmp_path, "progress": False}
    accuracies = []
    for named in (False, True):
        splits = {
            name: ImageData(bright(labels, seed), [NAMES[label] for label in labels] if named else labels)
            for seed, (name, labels) in enumerate(classes.items())
        }
        accuracies.append(compare_strategies(model, splits, **run).rows[0].test_accuracies)
    assert accuracies[0] == accuracies[1]
    assert min(accuracies[1]) > 0.8


def test_a_class_of_one_image_is_compared(model, bright, tmp_path):
    labels = {"train": np.array([0] * 10 + [1] * 9 + [2]), "validation": [0, 1], "test": [0, 1, 2]}
    splits = {name: ImageData(bright(values), values) for name, values in labels.items()}
    run = {"strategies": ["fixed"], "timesteps": [0, 500], "num_seeds": 2, "cache_dir": tmp_path, "progress": False}
    assert len(compare_strategies(model, splits, **run).rows[0].test_accuracies) == 2


@pytest.mark.parametrize("key", ["label", "labels"])
def test_a_loader_of_dicts_has_its_labels_under_either_name(bright, key):
    rows = [{"pixel_values": pixels, key: row % 2} for row, pixels in enumerate(bright(np.arange(6) % 2))]
    assert ImageData.of(DataLoader(rows, batch_size=4)).labels.tolist() == [0, 1, 0, 1, 0, 1]
    text = [row | {key: NAMES[row[key]]} for row in rows]
    data = ImageData.of(DataLoader(text, batch_size=4))
    assert (data.labels.tolist(), data.label_names) == ([0, 1, 0, 1, 0, 1], ["ant", "bee"])
    late = [rows[:4], [{"pixel_values": row["pixel_values"]} for row in rows[4:]]]
    some = ImageData.of(DataLoader(late, batch_size=None, collate_fn=default_collate))
    assert (some.labels, some.no_labels) == (None, "data loader: 4 labels for 6 images")
    unknown = ImageData.of(DataLoader([{"pixel_values": row["pixel_values"]} for row in rows], batch_size=4))
    assert "neither (images, labels) pairs nor dicts with 'labels' or 'label'" in unknown.no_labels


class TestCommands:
    @pytest.fixture
    def checkpoint(self, make_model, tmp_path) -> Path:
        save_model(make_model(num_channels=1, timestep=0), tmp_path / "model")
        return tmp_path / "model"

    @pytest.fixture
    def data(self, tmp_path) -> Path:
        """Text labels; the test split lacks a class and has one of its own."""
        folder = tmp_path / "data"
        folder.mkdir()
        for split, names in (("train", NAMES * 6), ("validation", NAMES * 2), ("test", ["cat", "bee", "zebra"] * 2)):
            images = [Image.new("L", (8, 8), 80 * (NAMES.index(name) if name in NAMES else 0)) for name in names]
            features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
            rows = {"image": images, "label": names}
            datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
        return folder

    @pytest.fixture
    def aselect(self, monkeypatch, capsys, tmp_path):
        def run(*arguments: Any) -> tuple[int, str]:
            monkeypatch.setattr(sys, "argv", ["aselect", *map(str, arguments)])
            monkeypatch.chdir(tmp_path)
            code: Any = 0
            try:
                app.main()
            except SystemExit as stopped:
                code = stopped.code or 0
            captured = capsys.readouterr()
            return code, captured.out + captured.err

        return run

    def test_features_have_the_same_numbers_in_every_split(self, aselect, checkpoint, data, tmp_path):
        found = {}
        for split in ("train", "validation", "test"):
            assert aselect("features", checkpoint, data, "--split", split, "--output", f"{split}.safetensors")[0] == 0
            with safe_open(tmp_path / f"{split}.safetensors", "pt") as file:
                names = json.loads(file.metadata()["label_names"])
                found[split] = (names, file.get_tensor("labels").tolist())
        assert found["train"] == (NAMES, [0, 1, 2] * 6)
        assert found["validation"] == (NAMES, [0, 1, 2] * 2)
        assert found["test"] == ([*NAMES, "zebra"], [2, 1, 3] * 2)

    @pytest.mark.parametrize("command", ["select", "audit", "compare", "features"])
    def test_a_label_column_that_is_not_there_is_an_error(self, aselect, checkpoint, data, command):
        code, text = aselect(command, checkpoint, data, "--label-column", "species")
        assert code == 2
        assert "label_column 'species'" in text
        assert "does not exist; its columns are image, label" in text

    def test_compare_refuses_a_class_that_training_lacks(self, aselect, checkpoint, data):
        code, text = aselect("compare", checkpoint, data, "--strategies", "fixed", "--timesteps", "0,500")
        assert code == 2
        assert "have the class 'zebra', which the train images lack (known: 'ant', 'bee', 'cat')" in text
        assert not Path("runs/compare/compare.json").exists()
