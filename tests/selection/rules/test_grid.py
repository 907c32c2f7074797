"""The grid's probes, and the images that they are compared on."""

from __future__ import annotations

import numpy as np
import pytest

from aselect_hf.data.image_data import ImageData
from tests.selection.conftest import TIMESTEPS


class TestGrid:
    def test_scores_are_accuracies_of_probes_that_learn(self, run, labeled):
        selection = run("grid")
        assert selection.scores[0] > 0.9
        assert selection.cost.forward_passes == 40 * len(TIMESTEPS)
        shuffled = np.random.default_rng(0).permutation(labeled.labels)
        assert max(run("grid", images=ImageData(labeled.items, shuffled)).scores) < 0.9

    def test_validation_images_are_the_ones_given(self, run, labeled):
        selection = run("grid", validation=labeled.subset(range(10)))
        assert selection.options["validation_images"] == 10
        assert selection.num_images == 40

    def test_needs_labels(self, run, normal):
        with pytest.raises(ValueError, match="needs labels"):
            run("grid", images=normal(4, 2, 8, 8))
