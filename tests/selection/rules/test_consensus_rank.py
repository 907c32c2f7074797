"""`consensus_rank`: consensus and RankMe, each scaled to 0..1, from one sweep."""

import numpy as np
import pytest

from aselect_hf.selection import select_timestep
from aselect_hf.selection.rules.consensus_rank import sum_of_scaled


def test_both_curves_count_alike_whatever_their_units():
    found = sum_of_scaled(np.array([-3.0, -1.0, -2.0]), np.array([10.0, 20.0, 30.0]))
    np.testing.assert_allclose(found, [0, 1.5, 1.5])


def test_a_curve_that_differs_by_rounding_only_does_not_count():
    found = sum_of_scaled(np.array([1.0, 1.0 + 1e-7, 1.0]), np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(found, [0, 0.5, 1], atol=1e-9)
    np.testing.assert_array_equal(sum_of_scaled(np.zeros(3), np.zeros(3)), [0, 0, 0])


@pytest.fixture
def run(make_config, randomize, normal):
    from aselect_hf import ASelectDiTModel

    model, images = randomize(ASelectDiTModel(make_config())), normal(40, 2, 8, 8)

    def choose(method):
        return select_timestep(model, images, method=method, timesteps=[0, 100, 300, 600], progress=False)

    return choose


def test_the_scores_are_those_of_its_parts(run):
    both, clusters, ranks = (run(name) for name in ("consensus_rank", "consensus", "rankme"))
    np.testing.assert_allclose(both.scores, sum_of_scaled(np.array(clusters.scores), np.array(ranks.scores)), atol=1e-6)
    assert both.timestep == both.timesteps[int(np.argmax(both.scores))]
    assert both.cost.forward_passes == clusters.cost.forward_passes
    assert all(error > 0 for error in both.standard_errors)
