"""Every rule behind the one interface."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from aselect_hf import TimestepSelection
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.noise_schedule import NoiseSchedule
from aselect_hf.selection import RULES, default_timesteps
from tests.selection.conftest import TIMESTEPS


@pytest.mark.parametrize("method", RULES)
class TestEveryStrategy:
    def test_choice_and_evidence(self, run, method):
        selection = run(method)
        assert selection.method == method
        assert selection.timestep in selection.timesteps
        if selection.scores:
            assert selection.timesteps == TIMESTEPS
            assert selection.timestep == TIMESTEPS[int(np.argmax(selection.scores))]
            assert len(selection.standard_errors) == len(TIMESTEPS)
        assert selection.cost.forward_passes >= 0
        assert selection.versions["torch"] == torch.__version__

    def test_is_deterministic(self, run, method):
        first, second = run(method), run(method)
        assert (first.timestep, first.scores) == (second.timestep, second.scores)

    def test_save_load_round_trip(self, run, method, tmp_path):
        selection = run(method)
        selection.save(tmp_path / "selection.json")
        assert TimestepSelection.load(tmp_path / "selection.json") == selection
        json.loads((tmp_path / "selection.json").read_text(), parse_constant=pytest.fail)

    def test_plot_is_a_picture(self, run, method, tmp_path):
        run(method).plot(tmp_path / "selection.png")
        assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")

    def test_apply_travels_with_the_checkpoint(self, run, method, model, tmp_path):
        selection = run(method, feature="blocks.-1.hidden")
        selection.apply(model).save_pretrained(tmp_path / "model")
        loaded = type(model).from_pretrained(tmp_path / "model")
        assert (loaded.config.timestep, loaded.config.feature) == (selection.timestep, "blocks.2.hidden")
        assert loaded.config.selection["method"] == method
        assert loaded.config.selection["options"] == selection.options

    def test_model_is_left_as_it_was(self, run, method, model):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.train()
        run(method)
        assert model.training
        assert model.config.selection is None
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_fixed_defaults_to_a_tenth_of_the_schedule(run):
    assert run("fixed").timestep == 100
    assert run("fixed", timestep=7).timestep == 7


def test_auto_reads_labels_where_there_are_any(run, labeled):
    assert run("auto").method == "logme"
    with pytest.raises(ValueError, match=r"method 'auto' has no option cutoff; .*; cutoff is an option of hfr"):
        run("auto", cutoff=0.2)
    one_class = ImageData(labeled.items, np.zeros(len(labeled), dtype=int))
    for images in (one_class, ImageData(labeled.items), torch.stack([*labeled.items])):
        assert run("auto", images=images).method == "consensus_rank"
        assert run("auto", images=images, pool_size=2).method == "consensus_rank"
        with pytest.raises(ValueError, match=r"method 'consensus_rank' has no option task; .*; task is an option of"):
            run("auto", images=images, task="classification")


@pytest.mark.parametrize("num", [1, 2, 20])
def test_default_timesteps_are_dense_at_low_noise(num):
    steps = default_timesteps(NoiseSchedule(), num)
    assert len(steps) == num
    assert steps[0] == 0
    assert np.all(np.diff(np.diff(steps)) >= -1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, f"method 'magic' is unknown; accepted are auto, {', '.join(RULES)}$"),
        ({"method": "hfr", "timestep": 50}, "no option timestep; .*; timestep is an option of fixed$"),
        ({"method": "fixed", "cutoff": 0.3}, "no option cutoff; accepted are timestep; cutoff is an option of hfr$"),
        ({"method": "hfr", "cutof": 0.2}, "no option cutof; accepted are .*cutoff"),
        ({"method": "hfr", "cutoff": 0.9}, "leaves no bins"),
        ({"method": "hfr", "timesteps": []}, "timesteps must not be empty"),
        ({"method": "hfr", "timesteps": [0.5]}, "float in \\[0, 1\\]"),
        ({"method": "hfr", "timesteps": [1000]}, "0..999"),
        ({"method": "hfr", "feature": "blocks.9.query"}, "no block 9"),
        ({"method": "hfr", "num_images": 1}, "at least 2 images"),
        ({"method": "hfr", "batch_size": 0}, "batch_size must be at least 1"),
        ({"method": "hfr", "search": "binary"}, "search must be one of full, coarse_to_fine; got 'binary'"),
        ({"method": "hfr", "early_stopping": 1.0}, "early_stopping must be a probability between 0 and 1"),
        ({"method": "hfr", "early_stopping": 0.1, "standardize": True}, "give one of the two"),
        ({"method": "hfr", "on_error": "ignore"}, "on_error must be one of stop, skip"),
        ({"method": "hfr", "images": torch.full((2, 2, 8, 8), float("nan"))}, "NaN"),
        (
            {"method": "hfr", "images": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)},
            "must be \\(batch, 2, height, width\\)",
        ),
        ({"method": "fixed", "timestep": 1000}, "0..999"),
        ({"method": "gate", "num_visited_timesteps": 1}, "num_visited_timesteps must be at least 2, got 1"),
        (
            {"method": "gate", "num_visited_timesteps": 5},
            "num_visited must be in 1..4 \\(the number of candidates\\), got 5",
        ),
        ({"method": "gate", "num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"method": "gate", "timesteps": 1000}, "number of timesteps must be in 1..950, got 1000"),
        ({"method": "grid", "probe": "forest"}, "probe must be one of linear, knn"),
    ],
    ids=str,
)
def test_bad_requests(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(options.pop("method"), **options)


def test_selection_of_another_schedule_is_refused(run, make_model):
    other = make_model(noise_schedule={"type": "flow_matching"})
    with pytest.raises(ValueError, match="a noise schedule other than the model's"):
        run("fixed").apply(other)


def test_damaged_selection_file_is_named(tmp_path):
    (tmp_path / "selection.json").write_text("{")
    with pytest.raises(ValueError, match=r"selection.json is not a saved timestep selection"):
        TimestepSelection.load(tmp_path / "selection.json")
