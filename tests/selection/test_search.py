"""Searches that skip work find what the full one finds, and err no more often than they say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aselect_hf.selection.search import beaten, coarse_to_fine, looks_at, race

NUM_CANDIDATES = 6


@st.composite
def unimodal(draw) -> list[int]:
    """Up to a peak and down again, in steps of 0 to 3: flat stretches and several equal peaks among them."""
    steps = st.lists(st.integers(0, 3), max_size=30)
    rise = np.cumsum([0, *draw(steps)])
    fall = rise[-1] - np.cumsum(draw(steps))
    return [*rise.tolist(), *fall.astype(int).tolist()]


class TestCoarseToFine:
    @given(unimodal(), st.integers(1, 7))
    def test_finds_the_peak_of_every_unimodal_curve(self, curve, stride):
        asked: set[int] = set()

        def leaders(candidates):
            asked.update(candidates)
            highest = max(curve[candidate] for candidate in candidates)
            return [candidate for candidate in candidates if curve[candidate] == highest]

        assert coarse_to_fine(leaders, len(curve), stride) == int(np.argmax(curve))
        assert asked <= set(range(len(curve)))

    @given(st.integers(0, 99))
    def test_skips_most_candidates_of_a_sharp_peak(self, peak):
        asked: set[int] = set()

        def leaders(candidates):
            asked.update(candidates)
            return sorted(candidates, key=lambda candidate: abs(candidate - peak))[:1]

        assert coarse_to_fine(leaders, 100) == peak
        assert len(asked) <= 26 + 4

    @given(st.integers(0, 2**32 - 1), st.floats(0, 3))
    def test_leaders_that_cannot_be_told_apart_are_all_refined(self, seed, noise):
        """Noisy means have several peaks: all that are not significantly lower are refined."""
        rng = np.random.default_rng(seed)
        values = noise * rng.standard_normal((32, 20)) - 0.3 * np.abs(np.arange(20) - rng.integers(20))
        best = coarse_to_fine(lambda c: race(lambda c, n: values[:n, c], c, [32], 0.05 / 19), 20)
        assert not beaten(values, 0.001)[best]


class TestRace:
    @given(st.integers(1, 10_000))
    def test_looks_double_until_all_images_are_used(self, num_images):
        looks = looks_at(num_images)
        assert looks[-1] == num_images
        assert looks[:-1] == [16 * 2**index for index in range(len(looks) - 1)]
        assert all(look < num_images for look in looks[:-1])

    @given(st.lists(st.integers(-5, 5), min_size=1, max_size=12))
    def test_scores_that_do_not_vary_over_images_are_ranked_at_the_first_look(self, means):
        asked = []

        def scores(candidates, num_images):
            asked.append(num_images)
            return np.tile(np.array(means, dtype=float)[candidates], (num_images, 1))

        leaders = race(scores, list(range(len(means))), looks_at(64), 0.05)
        assert leaders == [index for index, mean in enumerate(means) if mean == max(means)]
        assert asked == ([16] if len(leaders) == 1 else [16, 32, 64])

    def test_what_all_scores_of_an_image_share_does_not_hide_a_lead(self):
        """Images differ a thousand times more than candidates do."""
        rng = np.random.default_rng(0)
        values = 1000 * rng.standard_normal((64, 1)) + rng.standard_normal((64, 3)) + [0.0, 5.0, 0.0]
        seen = []
        assert race(lambda c, n: seen.append(n) or values[:n, c], [0, 1, 2], looks_at(64), 0.01) == [1]
        assert seen == [16]

    @pytest.mark.parametrize("alpha", [0.05, 0.3])
    @pytest.mark.parametrize("shape", ["normal", "correlated", "heavy tails", "one is noisier", "uniform"])
    def test_the_best_is_dropped_no_more_often_than_alpha(self, alpha, shape):
        """The hardest case: all others are as good as the best, so that every one of them may beat it by chance.

        2,000 races at a time; the limit allows for their number (three standard errors).
        """
        rng = np.random.default_rng(7)
        sizes = (2000, 64, NUM_CANDIDATES)
        values = rng.standard_t(3, sizes) if shape == "heavy tails" else rng.standard_normal(sizes)
        if shape == "correlated":
            values += 3 * rng.standard_normal((*sizes[:2], 1))
        elif shape == "one is noisier":
            values[..., 0] *= 5
        elif shape == "uniform":
            values = rng.random(sizes)
        looks = looks_at(64)
        level = alpha / ((NUM_CANDIDATES - 1) * len(looks))
        candidates = list(range(NUM_CANDIDATES))
        dropped = [0 not in race(lambda c, n, each=each: each[:n, c], candidates, looks, level) for each in values]
        assert np.mean(dropped) <= alpha + 3 * (alpha * (1 - alpha) / len(values)) ** 0.5
        assert np.any(dropped)  # the test of the test: there is something to err about

    def test_a_clear_lead_stops_it_early(self):
        rng = np.random.default_rng(1)
        values = rng.standard_normal((1024, 20)) + np.linspace(6, 0, 20)
        runs = []
        leaders = race(lambda c, n: runs.append(len(c)) or values[:n, c], list(range(20)), looks_at(1024), 1e-4)
        assert leaders == [0]
        assert runs == sorted(runs, reverse=True)
        assert runs[-1] < 5
