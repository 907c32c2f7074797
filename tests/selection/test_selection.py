"""Every strategy behind the one interface, and what is special about each."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from aselect_hf import TimestepSelection, high_frequency_ratio, select_timestep
from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from aselect_hf.modeling.noise_schedule import NoiseSchedule
from aselect_hf.selection import RULES, default_timesteps, gate_timesteps
from aselect_hf.selection.timestep_gate import TimestepGate

TIMESTEPS = [0, 100, 500, 900]


@pytest.fixture
def labelled(normal) -> ImageData:
    """Two classes that differ in the sign of their mean."""
    labels = np.arange(40) % 2
    signs = torch.from_numpy(2.0 * labels - 1).float().view(-1, 1, 1, 1)
    return ImageData(0.3 * normal(40, 2, 8, 8) + signs, labels)


@pytest.fixture
def run(model, labelled, tmp_path):
    def run(method: str, **options) -> TimestepSelection:
        options = {"timesteps": TIMESTEPS, "cache_dir": tmp_path, "progress": False, "num_images": 8} | options
        if method == "gate":
            options = {"num_epochs": 1} | options
        return select_timestep(model, options.pop("images", labelled), method=method, **options)

    return run


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


class TestHFR:
    def test_scores_are_hfr_of_images_minus_hfr_of_the_same_noise(self, run, model, normal):
        """Against a computation from the definition, one image and timestep at a time."""
        images = normal(3, 2, 8, 8, seed=5)
        selection = run("hfr", images=images, seed=4, feature="blocks.1.key")
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(4))
        for column, t in enumerate(TIMESTEPS):
            alpha, sigma = model.noise_schedule.alpha(t), model.noise_schedule.sigma(t)
            for row in range(3):
                ratios = [
                    high_frequency_ratio(
                        model.extract_features(
                            latents=z[None], noise=e[None], features=["blocks.1.key"], timesteps=[t]
                        )["blocks.1.key"][:, 0],
                        (4, 4),
                    ).item()
                    for z, e in (
                        (images[row], noise[row]),
                        (torch.zeros_like(images[row]), noise[row]),
                    )
                ]
                assert selection.per_image_scores[row][column] == pytest.approx(ratios[0] - ratios[1], abs=1e-5)
            assert 0 < alpha <= 1
            assert 0 < sigma < 1
        np.testing.assert_allclose(selection.scores, np.mean(selection.per_image_scores, axis=0), atol=1e-9)
        deviation = np.std(selection.per_image_scores, axis=0, ddof=1) / 3**0.5
        np.testing.assert_allclose(selection.standard_errors, deviation, atol=1e-9)

    def test_raw_scores_are_kept_and_selectable(self, run):
        corrected, raw = run("hfr"), run("hfr", noise_correction=False)
        assert raw.scores == raw.raw_scores == corrected.raw_scores
        np.testing.assert_allclose(
            corrected.scores, np.subtract(corrected.raw_scores, corrected.control_scores), atol=1e-12
        )

    @pytest.mark.parametrize("batch_size", [1, 3, 8, 1000])
    def test_batching_changes_nothing(self, run, batch_size):
        np.testing.assert_allclose(run("hfr", batch_size=batch_size).scores, run("hfr").scores, atol=1e-6)

    @pytest.mark.parametrize("batch_size", [1, 7, 1000])
    @pytest.mark.parametrize("options", [{"standardize": True}, {"search": "coarse_to_fine", "early_stopping": 0.05}])
    def test_batching_changes_no_variant(self, run, options, batch_size):
        other, selection = (run("hfr", num_images=20, batch_size=size, **options) for size in (batch_size, None))
        assert (other.timestep, other.timesteps) == (selection.timestep, selection.timesteps)
        np.testing.assert_allclose(other.scores, selection.scores, atol=1e-6)

    def test_the_batch_size_is_found_by_trying(self, run, model):
        """The network runs out of memory above 5 samples; nothing is run twice."""
        expected, passes = run("hfr"), []

        def limit(module, args):
            if len(args[0]) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
            passes.append(len(args[0]))

        model.patch_embedding.register_forward_pre_hook(limit)
        selection = run("hfr")
        assert max(passes) == 4
        assert sum(passes) - 1 == selection.cost.forward_passes == expected.cost.forward_passes
        assert selection.timestep == expected.timestep
        np.testing.assert_allclose(selection.scores, expected.scores, atol=1e-6)
        with pytest.raises(torch.OutOfMemoryError):
            run("hfr", batch_size=8)

    @pytest.mark.parametrize("method", ["hfr", "consensus", "snr", "logme"])
    def test_a_vae_encodes_every_image_once(self, make_model, tiny_kl, normal, tmp_path, method):
        vae_config = dict(tiny_kl.config) | {"_class_name": "AutoencoderKL"}
        model, encoded = make_model(num_channels=4, vae_config=vae_config), []
        model.vae.encoder.register_forward_hook(lambda module, args, output: encoded.append(len(args[0])))
        pixels, labels = normal(20, 3, 16, 16), np.arange(20) % 2
        images = ImageData(pixels, labels=labels)
        options = {"method": method, "timesteps": TIMESTEPS, "cache_dir": tmp_path, "progress": False}
        first = select_timestep(model, images, **options)
        assert sum(encoded) == 20 + 1  # the one that counts the FLOPs
        encoded.clear()
        second = select_timestep(model, images, **options)
        assert sum(encoded) == 1
        assert (second.scores, second.cost.flops) == (first.scores, first.cost.flops)
        with torch.no_grad():
            latents = model.encode(pixels)
        pixel_space = make_model(num_channels=4)
        pixel_space.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("vae.")})
        direct = select_timestep(pixel_space, ImageData(latents, labels=labels), **options)
        np.testing.assert_allclose(first.scores, direct.scores, rtol=1e-4, atol=1e-6)

    def test_cost_counts_the_passes_that_were_run(self, run, model):
        passes = []
        model.patch_embedding.register_forward_hook(lambda module, args, output: passes.append(len(output)))
        selection = run("hfr")
        counted = 1  # the pass that counts the FLOPs
        assert sum(passes) - counted == selection.cost.forward_passes == 2 * 8 * len(TIMESTEPS)
        assert selection.cost.flops > 0

    def test_no_block_after_the_feature_runs(self, run, model):
        model.layers[1].register_forward_hook(lambda *_: pytest.fail("block 1 was run"))
        run("hfr", feature="blocks.0.query")

    @pytest.mark.parametrize(
        "options",
        [
            {"dims": 1},
            {"spectrum": "amplitude"},
            {"remove_mean": True, "cutoff": 0.3},
            {"standardize": True},
            {"cutoff": 0.3},
        ],
        ids=str,
    )
    def test_variants_change_the_curve_and_are_recorded(self, run, options):
        selection = run("hfr", **options)
        assert selection.scores != run("hfr").scores
        assert selection.options.items() >= options.items()


FEATURES = ["blocks.4.mlp", "blocks.4.query"]


@pytest.fixture(scope="module")
def sample() -> tuple:
    """The sample model, 32 images, and the selection by all of them at all timesteps for each of two features."""
    model, images = load_model("sample"), load_images("sample", "train").select(range(32))
    run = partial(select_timestep, model, images, method="hfr", timesteps=9, progress=False)
    return model, images, run, {feature: run(feature=feature) for feature in FEATURES}


class TestCheaperHFR:
    """On the sample: searches that skip work choose what the full one chooses, and say what they did not run."""

    @pytest.mark.parametrize("feature", FEATURES)
    @pytest.mark.parametrize(
        "options",
        [
            {"search": "coarse_to_fine"},
            {"early_stopping": 0.05},
            {"search": "coarse_to_fine", "early_stopping": 0.05},
        ],
        ids=str,
    )
    def test_same_choice_with_fewer_passes(self, sample, options, feature, tmp_path):
        model, _, run, selections = sample
        full, passes = selections[feature], []
        hook = model.patch_embedding.register_forward_hook(lambda module, args, output: passes.append(len(output)))
        selection = run(feature=feature, **options)
        hook.remove()
        assert selection.timestep == full.timestep
        assert sum(passes) - 1 == selection.cost.forward_passes < 0.8 * full.cost.forward_passes
        assert selection.options.items() >= {"candidates": 9, **options}.items()
        columns = [full.timesteps.index(timestep) for timestep in selection.timesteps]
        assert len(columns) < 9 or options == {"early_stopping": 0.05}
        scores = np.array(selection.per_image_scores, dtype=float)
        assert scores.shape == (selection.num_images, len(columns))
        assert np.isfinite(scores).sum() * 2 == selection.cost.forward_passes
        expected = np.array(full.per_image_scores)[: selection.num_images, columns]
        np.testing.assert_allclose(scores, np.where(np.isnan(scores), np.nan, expected), atol=1e-6)
        np.testing.assert_allclose(selection.scores, np.nanmean(scores, axis=0), atol=1e-12)
        assert TimestepSelection.load(selection.save(tmp_path / "selection.json")) == selection
        json.loads((tmp_path / "selection.json").read_text(), parse_constant=pytest.fail)
        assert selection.plot(tmp_path / "selection.png").stat().st_size > 10_000

    def test_images_that_are_not_needed_are_not_read(self, sample):
        model, images, *_ = sample
        opened = []

        class Watched(ImageData):
            def decode(self, index):
                opened.append(index)
                return super().decode(index)

            def subset(self, indices):
                return Watched(super().subset(indices).items)

        selection = select_timestep(
            model, Watched(list(images["image"])), method="hfr", timesteps=[0, 900], early_stopping=0.05, progress=False
        )
        assert selection.num_images == 16
        assert len(opened) == 16 + 1 + 2  # the first also tells the size; the second, that images differ


class TestGrid:
    def test_scores_are_accuracies_of_probes_that_learn(self, run, labelled):
        selection = run("grid")
        assert selection.scores[0] > 0.9
        assert selection.cost.forward_passes == 40 * len(TIMESTEPS)
        shuffled = np.random.default_rng(0).permutation(labelled.labels)
        assert max(run("grid", images=ImageData(labelled.items, shuffled)).scores) < 0.9

    def test_validation_images_are_the_ones_given(self, run, labelled):
        selection = run("grid", validation=labelled.subset(range(10)))
        assert selection.options["validation_images"] == 10
        assert selection.num_images == 40

    def test_needs_labels(self, run, normal):
        with pytest.raises(ValueError, match="needs labels"):
            run("grid", images=normal(4, 2, 8, 8))


class TestGate:
    def test_noise_is_avoided(self, run):
        """The labels are in the mean of the image, of which t = 900 leaves 2 %."""
        selection = run("gate", num_epochs=None, timesteps=[0, 900, 950, 999])
        assert selection.timestep == 0
        assert selection.scores[0] > 0.9
        assert selection.options["num_epochs"] == 100

    def test_cost_counts_the_passes_that_were_run(self, make_model, labelled):
        model, passes = make_model(num_noise_draws=2), []
        model.patch_embedding.register_forward_hook(lambda module, args, output: passes.append(len(output)))
        model.layers[2].register_forward_hook(lambda *_: pytest.fail("the block after the feature was run"))
        options = {"timesteps": TIMESTEPS, "feature": "blocks.1.query", "progress": False, "batch_size": 7}
        selection = select_timestep(
            model, labelled, method="gate", num_images=8, num_visited_timesteps=3, num_epochs=2, **options
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

    def test_labels_may_be_any_integers(self, run, labelled):
        renamed = ImageData(labelled.items, 7 - 10 * labelled.labels)
        assert run("gate", images=renamed).timestep in TIMESTEPS

    @pytest.mark.parametrize(("labels", "message"), [(None, "needs labels; images has none"), ([1] * 40, "2 classes")])
    def test_needs_labels_of_two_classes(self, run, labelled, labels, message):
        with pytest.raises(ValueError, match=message):
            run("gate", images=ImageData(labelled.items, labels))

    def test_noise_is_that_of_inference(self, run, model, labelled, monkeypatch):
        """The features it reads are those that the model gives at the timestep by itself."""
        seen = []
        monkeypatch.setattr(TimestepGate, "observe", lambda self, pooled, losses, visits: seen.append((pooled, visits)))
        images = labelled.subset([0, 1])
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


def test_fixed_defaults_to_a_tenth_of_the_schedule(run):
    assert run("fixed").timestep == 100
    assert run("fixed", timestep=7).timestep == 7


def test_auto_reads_labels_where_there_are_any(run, labelled):
    assert run("auto").method == "logme"
    with pytest.raises(ValueError, match=r"method 'auto' has no option cutoff; .*; cutoff is an option of hfr"):
        run("auto", cutoff=0.2)
    one_class = ImageData(labelled.items, np.zeros(len(labelled), dtype=int))
    for images in (one_class, ImageData(labelled.items), torch.stack([*labelled.items])):
        assert run("auto", images=images).method == "consensus"
        assert run("auto", images=images, pool_size=2).method == "consensus"
        with pytest.raises(ValueError, match=r"method 'consensus' has no option task; .*; task is an option of"):
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
