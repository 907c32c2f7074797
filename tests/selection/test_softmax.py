"""The probe of large sets is the probe of small ones, found another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aselect_hf import select_timestep
from aselect_hf.data.image_data import ImageData
from aselect_hf.selection import probe, softmax
from aselect_hf.selection.probe import INVERSE_REGULARIZATION, fit_probe
from aselect_hf.selection.softmax import SoftmaxRegression
from tests.processes.two_processes import tiny_model


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    """1,200 rows of four overlapping classes named 3, 5, 7 and 9, on columns of very different scales, one constant."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 1200)
    features = generator.standard_normal((1200, 12)) + generator.standard_normal((4, 12))[labels] / 2
    features = features * 10.0 ** np.linspace(-2, 4, 12) + 100
    features[:, 3] = 7.0
    return features.astype(np.float32), 3 + 2 * labels


@pytest.mark.parametrize("inverse_regularization", INVERSE_REGULARIZATION)
@pytest.mark.parametrize("chunk", [100, 5000])
def test_it_is_the_minimum_of_scikit_learn(rows, inverse_regularization, chunk, monkeypatch):
    monkeypatch.setattr(softmax, "CHUNK", chunk)
    monkeypatch.setattr(softmax, "GRADIENT", 1e-6)
    features, labels = rows
    ours = SoftmaxRegression(inverse_regularization).fit(features, labels)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_regularization, tol=1e-8, max_iter=5000))
    theirs.fit(features.astype(np.float64), labels)
    weights = ours.weights.numpy()
    np.testing.assert_allclose(weights[:, :-1], theirs[-1].coef_, atol=2e-3)
    biases = theirs[-1].intercept_
    np.testing.assert_allclose(weights[:, -1] - weights[:, -1].mean(), biases - biases.mean(), atol=2e-3)
    assert np.mean(ours.predict(features) == theirs.predict(features)) > 0.998
    assert ours.score(features, labels) == pytest.approx(theirs.score(features, labels), abs=2e-3)


def test_a_start_changes_the_way_and_not_the_minimum(rows, monkeypatch):
    monkeypatch.setattr(softmax, "GRADIENT", 1e-6)
    features, labels = rows
    weak = SoftmaxRegression(0.1).fit(features, labels)
    started = SoftmaxRegression(0.1).fit(features, labels, SoftmaxRegression(0.001).fit(features, labels))
    np.testing.assert_allclose(started.weights, weak.weights, atol=2e-3)


def test_probes_of_many_rows_are_fitted_this_way(rows, monkeypatch):
    features, labels = rows
    split = (features[:800], labels[:800], features[800:], labels[800:])
    small = fit_probe(*split)
    monkeypatch.setattr(probe, "LARGE_ROWS", 799)
    large = fit_probe(*split)
    assert isinstance(large.classifier, SoftmaxRegression)
    assert not isinstance(small.classifier, SoftmaxRegression)
    assert large.setting == small.setting
    assert large.validation_score == pytest.approx(small.validation_score, abs=0.006)
    assert large.accuracy(*split[2:]) == large.validation_score
    assert not isinstance(fit_probe(*split, kind="knn").classifier, SoftmaxRegression)


def test_the_grid_of_many_rows_picks_as_that_of_few(monkeypatch, tmp_path):
    labels = torch.arange(240) % 3
    pixels = torch.randn(240, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + labels.view(-1, 1, 1, 1) / 5
    data = ImageData(pixels, labels=labels.tolist())
    request = {"method": "grid", "timesteps": 6, "cache_dir": tmp_path, "progress": False}
    small = select_timestep(tiny_model(), data, **request)
    monkeypatch.setattr(probe, "LARGE_ROWS", 10)
    large = select_timestep(tiny_model(), data, **request)
    assert large.timestep == small.timestep
    assert len(set(small.scores)) > 2
    np.testing.assert_allclose(large.scores, small.scores, atol=0.03)  # one of 48 images
