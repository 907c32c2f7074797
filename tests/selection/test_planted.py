"""The planted pair of the selection benchmark: its optimum lies where it was put."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from aselect_hf.conversion import load_model, save_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from benchmarks.selection import planted

SIZES = {"train": 450, "validation": 450}
TIMESTEPS = [0, 40, 150, 600]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "data"
    planted.build_data(path, SIZES)
    return path


@torch.no_grad()
@pytest.mark.parametrize("timestep", [40, 150])
def test_the_probe_is_best_at_the_planted_timestep(folder: Path, tmp_path: Path, timestep: int) -> None:
    save_model(planted.build_model(timestep), tmp_path)
    model = load_model(tmp_path).eval()
    pooled, labels = {}, {}
    for split in SIZES:
        data = ImageData.of(load_images(folder, split))
        (pixels,) = data.batches(model.config, len(data))
        tokens = model.extract_features(pixels, timesteps=TIMESTEPS)[str(model.config.feature)]
        pooled[split], labels[split] = tokens.mean(dim=2).numpy(), data.labels
    accuracies = {}
    for column, t in enumerate(TIMESTEPS):
        x = {split: values[:, column] - pooled["train"][:, column].mean(axis=0) for split, values in pooled.items()}
        classifier = RidgeClassifier(1e-3).fit(x["train"], labels["train"])
        accuracies[t] = classifier.score(x["validation"], labels["validation"])
    best = accuracies.pop(timestep)
    assert best > 0.75
    assert max(accuracies.values()) < best - 0.05
    assert accuracies[0] < best - 0.15
    assert accuracies[600] < 0.5


def test_pixels_and_their_means_do_not_tell_classes(folder: Path) -> None:
    splits = [ImageData.of(load_images(folder, split)) for split in SIZES]
    x, truth = zip(*((np.stack([np.asarray(d[i][0]) for i in range(len(d))]), d.labels) for d in splits), strict=True)
    patches = [np.stack([each[:, i::4, j::4].mean((1, 2)) for i in range(4) for j in range(4)], axis=1) for each in x]
    accuracy = RidgeClassifier().fit(patches[0], truth[0]).score(patches[1], truth[1])
    assert abs(accuracy - 1 / 3) < 0.1
    assert np.bincount(truth[0]).tolist() == [150] * 3


def test_the_same_seed_makes_the_same_pair() -> None:
    first, second = planted.build_model(), planted.build_model()
    other = planted.build_model(seed=1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.layers[1].mlp.fc2.weight, other.layers[1].mlp.fc2.weight)
    (images, labels), (again, labels_again) = planted.textures(9, 5), planted.textures(9, 5)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, labels_again)
    assert not np.array_equal(images, planted.textures(9, 6)[0])
