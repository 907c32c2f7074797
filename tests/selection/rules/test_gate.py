"""The gate as a rule: what it learns, what it runs, and its candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from aselect_hf import TimestepSelection, select_timestep
from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from aselect_hf.modeling.noise_schedule import NoiseSchedule
from aselect_hf.selection import gate_timesteps
from aselect_hf.selection.timestep_gate import TimestepGate
from tests.selection.conftest import TIMESTEPS


class TestGate:
    def test_noise_is_avoided(self, run):
        """The labels are in the mean of the image, of which t = 900 leaves 2 %."""
        selection = run("gate", num_epochs=None, timesteps=[0, 900, 950, 999])
        assert selection.timestep == 0
        assert selection.scores[0] > 0.9
        assert selection.options["num_epochs"] == 100

    def test_cost_counts_the_passes_that_were_run(self, make_model, labeled):
        model, passes = make_model(num_noise_draws=2), []
        model.patch_embedding.register_forward_hook(lambda module, args, output: passes.append(len(output)))
        model.layers[2].register_forward_hook(lambda *_: pytest.fail("the block after the feature was run"))
        options = {"timesteps": TIMESTEPS, "feature": "blocks.1.query", "progress": False, "batch_size": 7}
        selection = select_timestep(
            model, labeled, method="gate", num_images=8, num_visited_timesteps=3, num_epochs=2, **options
        )
        assert selection.cost.forward_passes == 40 * 3 * 2 * 2
        assert sum(passes) == selection.cost.forward_passes + 1  # the pass that counts the FLOPs
        assert max(passes) == 7
        assert selection.num_images == 40

    @pytest.mark.parametrize("progress", [False, True])
    def test_batching_and_the_bar_change_nothing(self, run, progress):
        other = run("gate", batch_size=5, progress=progress)
        np.testing.assert_allclose(other.scores, run("gate").scores, atol=1e-3)

    def test_seeds_differ_and_leave_the_callers_alone(self, run):
        state = torch.get_rng_state()
        assert run("gate", seed=1).scores != run("gate").scores
        assert torch.equal(torch.get_rng_state(), state)

    def test_labels_may_be_any_integers(self, run, labeled):
        renamed = ImageData(labeled.items, 7 - 10 * labeled.labels)
        assert run("gate", images=renamed).timestep in TIMESTEPS

    @pytest.mark.parametrize(("labels", "message"), [(None, "needs labels; images has none"), ([1] * 40, "2 classes")])
    def test_needs_labels_of_two_classes(self, run, labeled, labels, message):
        with pytest.raises(ValueError, match=message):
            run("gate", images=ImageData(labeled.items, labels))

    def test_noise_is_that_of_inference(self, run, model, labeled, monkeypatch):
        """The features it reads are those that the model gives at the timestep by itself."""
        seen = []
        monkeypatch.setattr(TimestepGate, "observe", lambda self, pooled, losses, visits: seen.append((pooled, visits)))
        images = labeled.subset([0, 1])
        run("gate", images=images, num_visited_timesteps=4)
        (pooled, visits), *_ = seen
        expected = model.extract_features(torch.stack(images.items), timesteps=TIMESTEPS, output_format="pooled")
        (features,) = (F.layer_norm(value, value.shape[-1:]) for value in expected.values())
        for rows in ([0, 1], [1, 0]):
            if torch.allclose(
                pooled, features[rows].gather(1, visits.indices[..., None].expand_as(features)), atol=1e-5
            ):
                return
        pytest.fail("other features than the model's own")

    def test_on_the_sample(self, tmp_path):
        model, images = load_model("sample"), load_images("sample", "train").select(range(100))
        options = {"method": "gate", "num_epochs": 1, "progress": False}
        first, second = (select_timestep(model, images, **options) for _ in range(2))
        assert (first.timestep, first.scores) == (second.timestep, second.scores)
        assert first.timesteps == gate_timesteps(model.noise_schedule)
        assert TimestepSelection.load(first.save(tmp_path / "selection.json")) == first


@pytest.mark.parametrize("schedule", [{}, {"type": "flow_matching"}, {"num_train_timesteps": 40}], ids=str)
@pytest.mark.parametrize("num", [1, 2, 16, 38])
def test_gate_timesteps_are_even_in_log_snr(schedule, num):
    schedule = NoiseSchedule(**schedule)
    steps = gate_timesteps(schedule, num)
    last = round(0.95 * (schedule.num_train_timesteps - 1))
    assert len(set(steps)) == num
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert num == 1 or steps[-1] == last
    if schedule.num_train_timesteps == 1000 and num == 16:
        gaps = -np.diff([schedule.log_snr(t) for t in steps[3:]])
        np.testing.assert_allclose(gaps, gaps.mean(), rtol=0.1)
