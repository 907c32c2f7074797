"""Each criterion against a known answer, what it must not see, and bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from aselect_hf.selection import criteria

LABEL_FREE = {"rankme": criteria.rankme, "alpha_req": criteria.alpha_req}
FROM_VIEWS = {
    "icr": criteria.icr,
    "lidar": criteria.lidar,
    "view_retrieval": criteria.view_retrieval,
    "snr": criteria.signal_to_noise,
}


def ridge_loo(features, labels, groups=None):
    return float((criteria.ridge_predictions(features, labels, groups=groups).classes == np.asarray(labels)).mean())


def knn_loo(features, labels, k=5, groups=None):
    return float((criteria.knn_predictions(features, labels, k, groups=groups) == np.asarray(labels)).mean())


LABELED = {"ridge": ridge_loo, "knn": knn_loo, "logme": criteria.logme}

seeds = st.integers(0, 1000)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def rotation(width: int, seed: int) -> np.ndarray:
    return np.linalg.qr(draw(width, width, seed=seed))[0]


def classed(samples: int, width: int, classes: int, seed: int = 0, distance: float = 1.5) -> tuple:
    """Blobs in channels of many scales and offsets, and their classes (not 0, 1, ...)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(samples) % classes)
    features = distance * rng.standard_normal((classes, width))[labels] + rng.standard_normal((samples, width))
    return features * np.exp(rng.standard_normal(width)) + 5 * rng.standard_normal(width), 10 * labels - 7


def viewed(images: int, views: int, width: int, noise: float, seed: int = 0) -> np.ndarray:
    return draw(images, 1, width, seed=seed) + noise * draw(images, views, width, seed=seed + 1)


def judge(name: str, seed: int):
    """The criterion of random features, as a function of a change to them."""
    if name in FROM_VIEWS:
        views = viewed(20, 3, 8, 0.5, seed)
        return lambda change, order=slice(None): FROM_VIEWS[name](change(views)[order])
    features, labels = classed(20, 8, 2, seed)
    if name in LABEL_FREE:
        return lambda change, order=slice(None): LABEL_FREE[name](change(features)[order])
    return lambda change, order=slice(None): LABELED[name](change(features)[order], labels[order])


EVERY = [*LABEL_FREE, *FROM_VIEWS, *LABELED]


class TestInvariances:
    @pytest.mark.parametrize("name", EVERY)
    @given(seed=seeds, scale=st.sampled_from([1e-4, 0.3, 1e5]))
    def test_scale_and_offset_of_every_channel(self, name, seed, scale):
        score = judge(name, seed)
        scales, offsets = scale * np.exp(draw(8, seed=seed)), scale * draw(8, seed=seed + 1)
        assert score(lambda x: x * scales + offsets) == pytest.approx(score(lambda x: x), abs=1e-6)

    @pytest.mark.parametrize("name", EVERY)
    @given(seed=seeds)
    def test_order_of_images(self, name, seed):
        score, order = judge(name, seed), np.random.default_rng(seed).permutation(20)
        assert score(lambda x: x, order) == pytest.approx(score(lambda x: x), abs=1e-6)

    @pytest.mark.parametrize("criterion", [criteria.rankme, criteria.alpha_req, criteria.lidar])
    @given(seed=seeds)
    def test_rotation_where_channels_are_not_standardised(self, criterion, seed):
        features = viewed(20, 3, 8, 0.5, seed)
        features = features if criterion is criteria.lidar else features[:, 0]
        turned = features @ rotation(8, seed)
        assert criterion(turned, standardize=False) == pytest.approx(criterion(features, standardize=False), abs=1e-6)

    @given(seed=seeds)
    def test_logme_of_the_paper_sees_neither_rotation_nor_scale(self, seed):
        features, labels = classed(20, 8, 3, seed)
        expected = criteria.logme(features, labels, standardize=False)
        turned = 100 * features @ rotation(8, seed)
        assert criteria.logme(turned, labels, standardize=False) == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("name", FROM_VIEWS)
    @given(seed=seeds)
    def test_order_of_views(self, name, seed):
        score = judge(name, seed)
        assert score(lambda x: x[:, ::-1]) == pytest.approx(score(lambda x: x), abs=1e-9)

    @pytest.mark.parametrize("name", EVERY)
    def test_numpy_and_torch_in_single_precision(self, name):
        score = judge(name, 3)
        single = score(lambda x: torch.from_numpy(x).float())
        assert isinstance(single, float)
        assert single == pytest.approx(score(lambda x: x), abs=1e-4)

    @pytest.mark.parametrize("name", EVERY)
    def test_dead_channels_change_nothing(self, name):
        """Also a channel that is large and constant except for the rounding of float32."""
        score, rng = judge(name, 4), np.random.default_rng(0)

        def with_dead(x):
            shape = (*x.shape[:-1], 1)
            return np.concatenate([x, np.zeros(shape), 3e3 + 1e-4 * rng.standard_normal(shape)], axis=-1)

        if name in ("lidar", "view_retrieval"):  # shrinkage is by the mean variance, of which they have none
            assert score(with_dead) == pytest.approx(score(lambda x: x), rel=0.05)
        else:
            assert score(with_dead) == pytest.approx(score(lambda x: x), abs=1e-6)


class TestRankMe:
    def test_isotropic_features_have_the_rank_of_their_width(self):
        assert criteria.rankme(draw(20_000, 16)) == pytest.approx(16, rel=1e-3)

    @pytest.mark.parametrize("standardize", [True, False])
    @pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
    def test_one_direction_has_rank_one(self, shape, standardize):
        features = np.outer(draw(shape[0]), draw(shape[1], seed=1))
        assert criteria.rankme(features, standardize=standardize) == pytest.approx(1, abs=1e-4)

    @pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
    def test_is_the_papers_formula(self, shape):
        features = draw(*shape) + 1
        shares = np.linalg.svd(features, compute_uv=False)
        shares = shares / shares.sum() + 1e-7
        expected = np.exp(-(shares * np.log(shares)).sum())
        assert criteria.rankme(features, standardize=False) == pytest.approx(expected, rel=1e-4)

    def test_a_massive_channel_does_not_hide_the_others(self):
        features = draw(500, 16)
        features[:, 3] = 1e4 + 1e3 * features[:, 3]
        assert criteria.rankme(features) > 15
        assert criteria.rankme(features, standardize=False) < 2


class TestAlphaReQ:
    @staticmethod
    def of_decay(alpha: float, samples: int, width: int) -> np.ndarray:
        """Centered features whose covariance has the eigenvalues `i ** -alpha`."""
        rank = min(samples - 1, width)
        centered = draw(samples, rank)
        left = np.linalg.qr(centered - centered.mean(axis=0))[0]
        return left * np.arange(1, rank + 1) ** (-alpha / 2) @ rotation(width, 1)[:rank]

    @pytest.mark.parametrize("shape", [(400, 120), (60, 120)])
    @pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 1.5, 4.0])
    def test_exponent_of_a_power_law(self, shape, alpha):
        score = criteria.alpha_req(7 * self.of_decay(alpha, *shape), standardize=False)
        assert score == pytest.approx(-abs(alpha - 1), abs=1e-3)

    def test_the_first_directions_do_not_count(self):
        features = self.of_decay(0.7, 400, 100)
        massive = 100 * np.outer(features @ rotation(100, 1)[0], rotation(100, 1)[0])
        assert criteria.alpha_req(features + massive, standardize=False) == pytest.approx(-0.3, abs=1e-2)

    def test_low_ranks_and_steep_spectra_are_the_worst(self):
        assert criteria.alpha_req(np.outer(draw(30), draw(8))) == -9
        assert criteria.alpha_req(np.ones((30, 8))) == -9
        assert criteria.alpha_req(self.of_decay(14, 30, 8), standardize=False) == -9


class TestICR:
    @pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
    def test_is_the_closed_form_of_isotropic_views(self, noise):
        """Every eigenvalue is the variance between images over that within one."""
        views = viewed(4000, 2, 4, noise) @ draw(4, 4)
        assert criteria.icr(views, shrinkage=0) == pytest.approx(1 / (1 + 1 / noise**2), abs=0.02)

    def test_is_the_papers_formula_without_shrinkage(self):
        """Up to the part of the residuals that remains in the means of views, which lowers every eigenvalue."""
        views = viewed(200, 5, 6, 0.7) @ draw(6, 6)
        means = views.mean(axis=1)
        residual = np.mean([np.cov(image.T) for image in views], axis=0)
        invariant = np.cov(means.T, bias=True) - residual / 5
        eigenvalues = np.linalg.eigvals(np.linalg.solve(residual, invariant)).real
        assert criteria.icr(views, shrinkage=0) == pytest.approx(1 / (1 + eigenvalues.mean()), rel=1e-6)

    @pytest.mark.parametrize("width", [5, 200])
    def test_ends_of_the_range(self, width):
        assert criteria.icr(viewed(30, 2, width, 0.0)) == pytest.approx(0, abs=1e-6)
        assert criteria.icr(draw(1000, 2, width)) > 0.9
        assert criteria.icr(np.ones((30, 2, width))) == 1

    @given(seed=seeds)
    def test_grows_with_the_noise_between_views(self, seed):
        found = [criteria.icr(viewed(60, 2, 8, noise, seed)) for noise in (0.2, 0.6, 1.5)]
        assert found == sorted(found)


class TestLiDAR:
    def test_is_the_papers_formula_without_shrinkage(self):
        views = viewed(200, 5, 6, 0.7) @ draw(6, 6)
        means = views.mean(axis=1)
        within = np.mean([np.cov(image.T) for image in views], axis=0)
        between = np.cov(means.T)
        eigenvalues = np.linalg.eigvals(np.linalg.solve(within, between)).real
        shares = eigenvalues / eigenvalues.sum()
        expected = np.exp(-(shares * np.log(shares)).sum())
        assert criteria.lidar(views, shrinkage=0) == pytest.approx(expected, rel=1e-6)

    def test_counts_the_directions_that_tell_images_apart(self):
        views = draw(400, 4, 12)
        views[:, :, :5] += 30 * draw(400, 1, 5, seed=1)
        assert criteria.lidar(views, shrinkage=0) == pytest.approx(5, abs=0.1)

    @pytest.mark.parametrize("width", [5, 200])
    def test_views_without_noise(self, width):
        assert 1 <= criteria.lidar(viewed(30, 2, width, 0.0)) <= min(29, width) + 1e-6


class TestRetrieval:
    @pytest.mark.parametrize("width", [5, 200])
    def test_equal_views_are_all_found(self, width):
        assert criteria.view_retrieval(viewed(50, 2, width, 0.0)) == 1.0

    @pytest.mark.parametrize("width", [16, 300])
    def test_independent_views_are_found_by_chance(self, width):
        found = [criteria.view_retrieval(draw(50, 2, width, seed=seed)) for seed in range(40)]
        assert np.mean(found) == pytest.approx(1 / 50, abs=3 * 0.02 / 4000**0.5 * 50**0.5)

    def test_falls_with_the_noise_between_views(self):
        scores = [criteria.view_retrieval(viewed(100, 2, 16, noise)) for noise in (0.1, 0.7, 1.0, 2.0)]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] - scores[-1] > 0.5

    def test_is_nearest_by_mahalanobis_cosine(self):
        views = viewed(30, 2, 5, 0.8) @ draw(5, 5)
        rows = views.reshape(60, 5)
        rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
        covariance = rows.T @ rows / 60
        covariance = 0.9 * covariance + 0.1 * np.trace(covariance) / 5 * np.eye(5)
        products = rows @ np.linalg.inv(covariance) @ rows.T
        cosines = products / np.sqrt(np.outer(np.diag(products), np.diag(products)))
        first, second = np.arange(0, 60, 2), np.arange(1, 60, 2)
        forth = cosines[np.ix_(first, second)].argmax(axis=1) == np.arange(30)
        back = cosines[np.ix_(second, first)].argmax(axis=1) == np.arange(30)
        np.testing.assert_array_equal(criteria.retrieved(views), (forth.astype(float) + back) / 2)
        assert 0 < criteria.view_retrieval(views) < 1

    def test_copies_and_constant_features_are_not_found(self):
        views = viewed(10, 2, 6, 0.0)
        views[3] = views[7]
        np.testing.assert_array_equal(np.flatnonzero(criteria.retrieved(views) < 1), [3, 7])
        assert criteria.view_retrieval(np.ones((10, 2, 6))) == 0


class TestSignalToNoise:
    @pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 3.0])
    def test_is_the_share_of_the_variance(self, noise):
        views = viewed(20_000, 3, 4, noise) * np.array([1.0, 10.0, 0.1, 3.0])
        assert criteria.signal_to_noise(views) == pytest.approx(1 / (1 + noise**2), abs=0.01)

    def test_nothing_but_noise_or_nothing_at_all(self):
        assert criteria.signal_to_noise(draw(5000, 2, 4)) < 0.05
        assert criteria.signal_to_noise(np.ones((10, 2, 4))) == 0


class TestRidge:
    @staticmethod
    def refitted(features, labels, groups, penalty) -> np.ndarray:
        """Scikit-learn's ridge, fitted anew without each group."""
        rows = StandardScaler().fit_transform(features)
        classes = np.unique(labels)
        predictions = np.empty_like(labels)
        for group in np.unique(groups):
            rest = groups != group
            fitted = Ridge(penalty).fit(rows[rest], (labels[rest, None] == classes).astype(float))
            predictions[~rest] = classes[fitted.predict(rows[~rest]).reshape(-1, len(classes)).argmax(axis=1)]
        return predictions

    @pytest.mark.parametrize("share", [1e-5, 1e-2, 1.0])
    @pytest.mark.parametrize("width", [4, 60])
    def test_equals_refitting_without_each_sample(self, width, share):
        features, labels = classed(40, width, 3, distance=0.4)
        found = criteria.ridge_predictions(features, labels, penalties=np.array([share]))
        assert found.penalty == pytest.approx(share * 40 * width)
        expected = self.refitted(features, labels, np.arange(40), found.penalty)
        np.testing.assert_array_equal(found.classes, expected)
        assert 0.2 < np.mean(found.classes == labels) < 1

    @pytest.mark.parametrize("width", [4, 60])
    def test_equals_refitting_without_each_group(self, width):
        features, labels = classed(60, width, 3, distance=0.4)
        groups = np.random.default_rng(1).integers(0, 9, 60) * 5
        for share in (1e-4, 1e-1):
            found = criteria.ridge_predictions(features, labels, groups=groups, penalties=np.array([share]))
            np.testing.assert_array_equal(found.classes, self.refitted(features, labels, groups, found.penalty))

    @pytest.mark.parametrize("width", [4, 60])
    def test_the_penalty_is_the_one_with_the_least_left_out_error(self, width):
        features, labels = classed(40, width, 3, distance=0.4)
        one_hot = (labels[:, None] == np.unique(labels)).astype(float)
        best = RidgeCV(criteria.PENALTIES * 40 * width).fit(StandardScaler().fit_transform(features), one_hot)
        assert criteria.ridge_predictions(features, labels).penalty == pytest.approx(best.alpha_)

    def test_separable_classes_are_all_right_and_noise_is_not(self):
        features, labels = classed(90, 12, 3, distance=20)
        assert ridge_loo(features, labels) == 1.0
        assert ridge_loo(draw(300, 12), np.arange(300) % 3) < 0.45
        assert ridge_loo(np.ones((30, 4)), np.arange(30) % 3) < 0.4


class TestNearestNeighbours:
    @pytest.mark.parametrize("k", [1, 5, 17])
    def test_equals_scikit_learn_without_each_sample(self, k):
        features, labels = classed(60, 8, 3, distance=0.7)
        rows = StandardScaler().fit_transform(features)
        expected = []
        for left in range(60):
            rest = np.arange(60) != left
            fitted = KNeighborsClassifier(k, metric="cosine").fit(rows[rest], labels[rest])
            expected.append(fitted.predict(rows[[left]])[0])
        np.testing.assert_array_equal(criteria.knn_predictions(features, labels, k), expected)
        assert knn_loo(features, labels, k) == np.mean(np.array(expected) == labels)

    def test_groups_do_not_vote_for_themselves(self):
        features, labels = classed(20, 8, 2)
        groups = np.repeat(np.arange(20), 3)
        copies = np.repeat(features, 3, axis=0) + 1e-6 * draw(60, 8)
        once = criteria.knn_predictions(features, labels, 1)
        np.testing.assert_array_equal(
            criteria.knn_predictions(copies, np.repeat(labels, 3), 3, groups=groups), np.repeat(once, 3)
        )

    def test_many_samples_go_through_chunks(self, monkeypatch):
        features, labels = classed(50, 4, 3)
        expected = criteria.knn_predictions(features, labels, 3)
        monkeypatch.setattr(criteria, "CHUNK", 7)
        np.testing.assert_array_equal(criteria.knn_predictions(features, labels, 3), expected)

    @pytest.mark.parametrize(("k", "groups"), [(0, None), (20, None), (18, [0] * 3 + list(range(1, 18)))])
    def test_k_must_leave_enough_others(self, k, groups):
        features, labels = classed(20, 4, 2)
        with pytest.raises(ValueError, match=rf"k must be in 1\.\.1[79] .* got {k}"):
            knn_loo(features, labels, k, groups=groups)


class TestLogME:
    @pytest.mark.parametrize("shape", [(40, 6), (20, 50)])
    def test_is_the_highest_evidence(self, shape):
        """Against the density of the targets, maximized over a fine grid of both precisions."""
        features, labels = classed(*shape, 2, distance=0.5)
        gram, evidences = features @ features.T, []
        eigenvalues, vectors = np.linalg.eigh(gram)
        for label in np.unique(labels):
            squares = (vectors.T @ (labels == label)) ** 2
            noise, signal = np.meshgrid(np.logspace(-5, 1, 600), np.logspace(-9, 1, 600))
            variances = noise[..., None] + signal[..., None] * np.maximum(eigenvalues, 0)
            values = -0.5 * (np.log(2 * np.pi * variances) + squares / variances).sum(axis=-1)
            evidences.append(values.max() / len(labels))
        assert criteria.logme(features, labels, standardize=False) == pytest.approx(np.mean(evidences), abs=1e-3)

    def test_is_the_papers_fixed_point(self):
        features, labels = classed(80, 6, 3, distance=0.5)
        left, scales, _ = np.linalg.svd(features, full_matrices=False)
        evidences = []
        for label in np.unique(labels):
            target = (labels == label).astype(float)
            z, rest = (left.T @ target) ** 2, np.sum(target) - np.sum((left.T @ target) ** 2)
            alpha = beta = 1.0
            for _ in range(500):
                known = (beta * scales**2 / (alpha + beta * scales**2)).sum()
                weights = (beta**2 * scales**2 * z / (alpha + beta * scales**2) ** 2).sum()
                error = (z / (1 + beta * scales**2 / alpha) ** 2).sum() + rest
                alpha, beta = known / weights, (80 - known) / error
            evidence = 3 * np.log(alpha) + 40 * np.log(beta) - 0.5 * np.log(alpha + beta * scales**2).sum()
            evidences.append((evidence - beta / 2 * error - alpha / 2 * weights - 40 * np.log(2 * np.pi)) / 80)
        assert criteria.logme(features, labels, standardize=False) == pytest.approx(np.mean(evidences), abs=1e-5)

    def test_grows_with_what_the_features_tell(self):
        scores = [criteria.logme(*classed(100, 8, 2, distance=distance)) for distance in (0.0, 0.5, 2.0)]
        assert scores == sorted(scores)
        labels = np.arange(100) % 2
        assert criteria.logme(draw(100, 8), labels) == pytest.approx(
            criteria.logme(np.ones((100, 8)), labels), abs=0.05
        )


class TestBadInput:
    @pytest.mark.parametrize("name", [*LABEL_FREE, *LABELED])
    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (np.ones((1, 4)), "at least 2 images, got 1"),
            (np.ones(4), r"features must be \(samples, width\), got \(4,\)"),
            (np.ones((4, 0)), r"features must be \(samples, width\)"),
            (np.array([[1.0, np.nan], [1.0, 2.0]]), "NaN or infinite"),
            (torch.tensor([[1.0, torch.inf], [1.0, 2.0]]), "NaN or infinite"),
        ],
        ids=["one", "flat", "empty", "nan", "inf"],
    )
    def test_features(self, name, features, message):
        labels = () if name in LABEL_FREE else (np.arange(len(features)),)
        with pytest.raises(ValueError, match=message):
            (LABEL_FREE | LABELED)[name](features, *labels)

    @pytest.mark.parametrize("criterion", FROM_VIEWS.values())
    @pytest.mark.parametrize(
        ("views", "message"),
        [
            (draw(1, 2, 4), "at least 2 images, got 1"),
            (draw(4, 1, 4), "at least 2 views of every image, got 1"),
            (draw(4, 4), r"views must be \(images, views, width\), got \(4, 4\)"),
            (np.full((4, 2, 4), np.nan), "NaN or infinite"),
        ],
        ids=["one image", "one view", "flat", "nan"],
    )
    def test_views(self, criterion, views, message):
        with pytest.raises(ValueError, match=message):
            criterion(views)

    @pytest.mark.parametrize("criterion", LABELED.values())
    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (None, "labels are missing"),
            ([1] * 6, "at least 2 classes; all are 1"),
            ([0, 1], "labels must be 6 integers"),
        ],
        ids=["none", "one class", "too few"],
    )
    def test_labels(self, criterion, labels, message):
        with pytest.raises(ValueError, match=message):
            criterion(draw(6, 4), labels)

    @pytest.mark.parametrize("criterion", [ridge_loo, knn_loo])
    @pytest.mark.parametrize(
        ("groups", "message"),
        [([0] * 6, "groups must name at least 2 images, got 1"), ([0, 1], "groups must be 6 integers")],
    )
    def test_groups(self, criterion, groups, message):
        with pytest.raises(ValueError, match=message):
            criterion(draw(6, 4), np.arange(6) % 2, groups=groups)


class TestConsensus:
    """Candidates, some of which show the same groups of samples more or less clearly."""

    @staticmethod
    def candidates(seed: int = 0, noises: tuple = (6.0, 1.0, 0.2, 1.0, 6.0)) -> tuple[list[np.ndarray], np.ndarray]:
        groups = np.random.default_rng(seed).integers(0, 4, 80)
        centres = draw(4, 12, seed=seed + 1)
        return [centres[groups] + noise * draw(80, 12, seed=seed + 2 + i) for i, noise in enumerate(noises)], groups

    @given(seed=seeds)
    def test_the_clearest_candidate_is_best(self, seed):
        scores = criteria.consensus(self.candidates(seed)[0]).scores
        assert scores.argmax() == 2
        assert min(scores[1], scores[3]) > max(scores[0], scores[4])

    def test_clusters_are_the_groups(self):
        cells, groups = self.candidates()
        for clusters in criteria.consensus(cells).clusters:
            table = np.zeros((clusters.max() + 1, 4))
            np.add.at(table, (clusters, groups), 1)
            assert table.max(axis=1).sum() / 80 > (0.95 if len(table) > 5 else 0.75)

    def test_groups_that_only_one_candidate_has_do_not_count(self):
        cells, _ = self.candidates(noises=(0.6, 0.6, 0.6, 0.6, 0.6, 0.6))
        loner = 3 * draw(5, 12, seed=99)[np.random.default_rng(98).integers(0, 5, 80)] + 0.05 * draw(80, 12, seed=97)
        assert criteria.consensus([*cells, loner]).scores.argmin() == 6

    @settings(max_examples=8)
    @given(seed=seeds, scale=st.sampled_from([1e-3, 1e4]))
    def test_scale_and_offset_of_every_channel(self, seed, scale):
        cells, _ = self.candidates(seed)
        changed = [x * scale * np.exp(draw(12, seed=seed)) + scale for x in cells]
        np.testing.assert_allclose(criteria.consensus(changed).scores, criteria.consensus(cells).scores, atol=1e-5)

    def test_scores_are_those_of_the_clusters(self):
        cells, _ = self.candidates()
        found = criteria.consensus(cells)
        np.testing.assert_allclose(found.scores, [criteria.clusters_logme(x, found.clusters) for x in cells])
        expected = np.mean([criteria.logme(cells[1], clusters) for clusters in found.clusters])
        assert found.scores[1] == pytest.approx(expected)

    @pytest.mark.parametrize("count", [3, 5, 12])
    def test_few_samples_and_constant_features(self, count):
        cells = [draw(count, 4), np.zeros((count, 4)), draw(count, 4, seed=1)]
        assert np.isfinite(criteria.consensus(cells).scores).all()
        assert criteria.consensus([np.ones((count, 4))] * 2).scores.tolist() == [0, 0]

    def test_other_samples_are_refused(self):
        with pytest.raises(ValueError, match="candidates must be of the same samples"):
            criteria.consensus([draw(5, 2), draw(6, 2)])
