"""Moments give the scores of the rows themselves, and a rule on them ends in the same selection."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from aselect_hf.cost import encode_flops, feature_flops
from aselect_hf.data.image_data import ImageData
from aselect_hf.selection import criteria, moments, select_timestep, streaming
from aselect_hf.selection.moments import Moments, merged
from aselect_hf.selection.rules import grid
from aselect_hf.selection.streamed_ridge import RidgeFits


def rows(count: int, width: int, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, count)
    values = rng.standard_normal((count, width)) * np.linspace(0.1, 9, width) + offset
    values[:, 0] = 3.0  # a constant channel
    values[:, 1:5] += labels[:, None]
    return values.astype(np.float32), labels


@pytest.mark.parametrize(("count", "width"), [(200, 24), (20, 40)])
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_scores_of_moments_are_those_of_the_rows(count, width, offset):
    values, labels = rows(count, width, offset)
    cuts = [0, 1, 7, count // 2, count]
    found = merged(Moments.of(torch.from_numpy(values[a:b]), labels[a:b], 5) for a, b in pairwise(cuts))
    assert moments.rankme(found) == pytest.approx(criteria.rankme(values), rel=1e-6)
    assert moments.alpha_req(found) == pytest.approx(criteria.alpha_req(values), rel=1e-6, abs=1e-6)
    if count > width:  # else the classes are fitted without any error, and only rounding is left
        assert moments.logme(found) == pytest.approx(criteria.logme(values, labels), rel=1e-6)


def test_a_single_class_is_refused():
    values, _ = rows(10, 6)
    with pytest.raises(ValueError, match="at least 2 classes"):
        moments.logme(Moments.of(torch.from_numpy(values), np.zeros(10, dtype=int), 3))


@pytest.mark.parametrize("method", ["rankme", "alpha_req", "logme", "ridge"])
def test_a_large_set_is_scored_from_moments_alone(model, normal, tmp_path, monkeypatch, method):
    data = ImageData(normal(1500, 2, 8, 8), labels=[index % 3 for index in range(1500)])
    options = {"method": method, "timesteps": [0, 300, 900], "num_images": 1500, "progress": False}
    expected = select_timestep(model, data, **options)
    monkeypatch.setattr(streaming, "LEAST_BYTES", 0)
    monkeypatch.setattr("aselect_hf.selection.scoring.sweep_features", lambda *a, **o: pytest.fail("features are kept"))
    found = select_timestep(model, data, **options)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    np.testing.assert_allclose(found.standard_errors, expected.standard_errors, rtol=1e-4)
    passes = 2 if method == "ridge" else 1
    assert (found.timestep, found.options, found.cost.forward_passes) == (
        expected.timestep, expected.options, passes * expected.cost.forward_passes,
    )  # fmt: skip
    assert found.cost.flops == passes * expected.cost.flops
    assert len(found.perturbed_timesteps) == 3


@pytest.mark.parametrize(("method", "reads"), [("rankme", 1), ("ridge", 2)])
def test_the_latents_of_a_large_set_are_read_batch_by_batch(
    method, reads, make_model, tiny_kl, normal, tmp_path, monkeypatch
):
    config = dict(tiny_kl.config) | {"_class_name": "AutoencoderKL"}
    model = make_model(0, num_channels=4, sample_size=8, vae_config=config)
    model.vae.load_state_dict(tiny_kl.state_dict(), strict=False)
    data = ImageData(normal(1000, 3, 16, 16).clamp(-1, 1), labels=[index % 3 for index in range(1000)])
    options = {"method": method, "timesteps": [300], "num_images": 1000, "cache_dir": tmp_path, "progress": False}
    expected = select_timestep(model, data, **options)
    monkeypatch.setattr(streaming, "LEAST_BYTES", 0)
    monkeypatch.setattr("aselect_hf.selection.scoring.stored_noise_view", lambda *a, **o: pytest.fail("all are read"))
    found = select_timestep(model, data, **options)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    passes = reads * expected.cost.forward_passes
    assert found.cost.forward_passes == passes
    assert found.cost.flops == 1000 * encode_flops(model) + passes * feature_flops(model, found.feature)


@pytest.mark.parametrize("count", [60, 20])
def test_ridge_of_moments_leaves_out_each_row_as_ridge_of_the_rows_does(count):
    values, labels = rows(count, 12)
    classes, targets = np.unique(labels, return_inverse=True)
    fit = RidgeFits(Moments.of(torch.from_numpy(values), targets, len(classes)))
    for some in np.array_split(np.arange(count), 3):
        fit.show(torch.from_numpy(values[some]), targets[some], left_out=True)
    expected = criteria.ridge_predictions(values, labels)
    best = fit.errors.argmin()
    assert fit.hits[best] == (expected.classes == labels).sum()
    for number, penalty in enumerate(criteria.PENALTIES):
        one = criteria.ridge_predictions(values, labels, penalties=np.array([penalty]))
        assert fit.hits[number] == (one.classes == labels).sum()


@pytest.mark.parametrize("pool_size", [1, 2])
def test_the_ridge_probe_of_a_large_grid_keeps_no_features(model, normal, tmp_path, monkeypatch, pool_size):
    labels = [index % 3 for index in range(600)]
    pixels = normal(600, 2, 8, 8) + torch.tensor(labels)[:, None, None, None] / 4
    train, validation = ImageData(pixels[:400], labels=labels[:400]), ImageData(pixels[400:], labels=labels[400:])
    options = {"method": "grid", "probe": "ridge", "timesteps": [0, 300, 900], "pool_size": pool_size}
    options |= {"validation": validation, "cache_dir": tmp_path, "progress": False}
    expected = select_timestep(model, train, **options)
    assert 0.4 < max(expected.scores) < 1
    monkeypatch.setattr(streaming, "LEAST_BYTES", 0)
    monkeypatch.setattr(grid, "image_samples", lambda *a, **o: pytest.fail("features are kept"))
    found = select_timestep(model, train, **options)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-9)
    np.testing.assert_allclose(found.standard_errors, expected.standard_errors, atol=1e-9)
    assert (found.timestep, found.options, found.num_images) == (
        expected.timestep, expected.options, expected.num_images,
    )  # fmt: skip
    assert (found.cost.forward_passes, found.cost.flops) == (expected.cost.forward_passes, expected.cost.flops)
