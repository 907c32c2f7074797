"""A pick does not hang on the last bits of features, nor on scores that are equal: the same on every machine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aselect_hf import select_timestep
from aselect_hf.data.image_data import ImageData
from aselect_hf.selection import RULES, TimestepSelection, criteria
from aselect_hf.selection.ties import ROUNDING, best_of, near_best, ranking
from tests.selection.test_scoring import TIMESTEPS, VeiledModel

SEEDS = range(10)


def shaken(model, seed: int):
    """The model with its features multiplied by 1 + 1e-5 times noise, which is more than processors differ."""
    generator = torch.Generator().manual_seed(seed)

    def shake(name: str):
        plain = getattr(type(model), name)

        def features(*args, **kwargs):
            found = plain(model, *args, **kwargs)
            return {name: x * (1 + ROUNDING * torch.randn(x.shape, generator=generator)) for name, x in found.items()}

        return features

    for name in ("features_of_noisy", "extract_features"):
        setattr(model, name, shake(name))
    return model


@pytest.fixture
def veiled(make_config, randomize) -> VeiledModel:
    """Tells images apart at one timestep, and behind noise at the others."""
    return randomize(VeiledModel(make_config()))


@pytest.fixture
def colors(normal) -> ImageData:
    labels = np.arange(36) % 2
    colors = normal(36, 2, 1, 1, seed=1)
    colors[:, 0] += torch.from_numpy(4.0 * labels - 2).float()[:, None, None]
    return ImageData(colors + 0.05 * normal(36, 2, 8, 8), labels)


@pytest.fixture
def pick(veiled, colors, tmp_path):
    def pick(method: str, model=veiled, images=colors, **options) -> TimestepSelection:
        options = {"timesteps": TIMESTEPS, "feature": "blocks.1.value", "progress": False} | options
        options = {"cache_dir": tmp_path / "cache"} | options
        return select_timestep(model, images, method=method, **options)

    return pick


@pytest.mark.parametrize("method", RULES)
def test_the_pick_is_stable_under_small_relative_changes_of_the_features(pick, veiled, method, tmp_path):
    options = {"num_epochs": 5} if method == "gate" else {}
    expected = pick(method, **options)
    if expected.scores:
        assert near_best(expected.scores).sum() == 1  # the test of the test: one candidate is best
    for seed in SEEDS:
        found = pick(method, shaken(veiled, seed), cache_dir=tmp_path / str(seed), **options)
        assert found.timestep == expected.timestep
        assert not found.hangs_on_rounding


@pytest.mark.parametrize("method", [name for name in RULES if name != "fixed"])
class TestNothingToChoose:
    def test_images_that_are_all_the_same_are_refused(self, pick, colors, method):
        copies = ImageData(colors.items[:1].repeat(12, 1, 1, 1), np.arange(12) % 2)
        with pytest.raises(ValueError, match="no timestep can be chosen: all 12 images of images are the same; give"):
            pick(method, images=copies)

    def test_equal_scores_are_said(self, veiled, pick, method, caplog, monkeypatch):
        """All features are the same for every image and timestep."""
        options = {"num_epochs": 1, "gate_learning_rate": 0.0} if method == "gate" else {}
        for name in ("features_of_noisy", "extract_features"):
            plain = getattr(veiled, name)
            constant = lambda *a, plain=plain, **k: {n: torch.ones_like(x) for n, x in plain(*a, **k).items()}  # noqa: E731
            monkeypatch.setattr(veiled, name, constant)
        selection = pick(method, **options)
        assert selection.tied
        assert selection.describe().endswith("; all candidates have the same score")
        assert f"{method} cannot choose: all 4 candidates have the same score" in caplog.text
        assert TimestepSelection.from_dict(dataclasses.asdict(selection)).tied

    def test_features_that_are_not_finite_are_refused(self, veiled, pick, method, monkeypatch):
        for name in ("features_of_noisy", "extract_features"):
            plain = getattr(veiled, name)
            infinite = lambda *a, plain=plain, **k: {n: x + torch.inf for n, x in plain(*a, **k).items()}  # noqa: E731
            monkeypatch.setattr(veiled, name, infinite)
        with pytest.raises(
            ValueError, match=r"blocks.1.value holds NaN or infinite values in float32: check the images"
        ):
            pick(method)


class TestEqualScores:
    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.integers(0, 99))
    def test_rounding_never_decides(self, scores, seed):
        """Far from the edge of the tolerance, the first of the equal ones is best, however they are rounded."""
        scores = np.round(np.array(scores), 1 - int(np.floor(np.log10(max(map(abs, scores)) or 1))))
        noise = 1e-7 * np.abs(scores).max() * np.random.default_rng(seed).standard_normal(len(scores))
        assert best_of(scores + noise) == best_of(scores) == int(scores.argmax())
        assert ranking(scores + noise) == ranking(scores) == np.argsort(-scores, kind="stable").tolist()

    @pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
    def test_scores_must_be_finite(self, score):
        with pytest.raises(ValueError, match="scores hold NaN or infinite values"):
            best_of([0.5, score])

    def test_the_tolerance_is_relative_to_the_scale(self):
        assert near_best([1.0, 1.0 - 1e-7, 0.9]).tolist() == [True, True, False]
        assert near_best([1e-8, -1e-8]).tolist() == [True, False]
        assert near_best([1e-8, -1e-8], scale=0.4).tolist() == [True, True]


def test_mutual_neighbors_and_offsets_do_not_change_the_clusters():
    """Rounding of 1e-13 by an offset; k-means that compares trials breaks exact ties by it."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        groups, centres = rng.integers(0, 4, 80), rng.standard_normal((4, 12))
        cells = [centres[groups] + noise * rng.standard_normal((80, 12)) for noise in (6.0, 1.0, 0.2, 1.0, 6.0)]
        shifted = [cell + 1e3 for cell in cells]
        np.testing.assert_allclose(criteria.consensus(shifted).scores, criteria.consensus(cells).scores, atol=1e-9)


def test_copies_and_single_dimensions_all_vote():
    """Among 9 copies in two classes, the last bits alone would choose the nearest 5."""
    rows = np.repeat([[1.0], [-1.0]], [9, 9], axis=0)
    labels = np.array([0] * 5 + [1] * 4 + [1] * 5 + [0] * 4)
    expected = criteria.knn_predictions(rows, labels, 5)
    for seed in SEEDS:
        order = np.random.default_rng(seed).permutation(18)
        changed = rows[order] * (1 + 1e-7 * np.random.default_rng(seed).standard_normal((18, 1)))
        np.testing.assert_array_equal(criteria.knn_predictions(changed, labels[order], 5), expected[order])


def test_a_pick_that_hangs_on_rounding_is_said(pick, monkeypatch, caplog):
    flat = iter([[0.5, 0.4, 0.3, 0.2], [0.4, 0.5, 0.3, 0.2], [0.5, 0.4, 0.3, 0.2], [0.2, 0.4, 0.3, 0.5]])
    monkeypatch.setattr("aselect_hf.selection.judges.fit_in_parallel", lambda calls: next(flat))
    selection = pick("rankme")
    assert (selection.timestep, selection.perturbed_timesteps) == (10, [20, 10, 40])
    assert selection.describe().endswith("; this pick depends on rounding")
    assert "relative changes of 1e-05 in the features give t = 20, t = 40 instead of t = 10" in caplog.text
