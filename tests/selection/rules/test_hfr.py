"""HFR against its definition, and its cheaper searches against the full one."""

from __future__ import annotations

import json
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from aselect_hf import TimestepSelection, high_frequency_ratio, select_timestep
from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from tests.selection.conftest import TIMESTEPS


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

    def test_the_authors_variant_is_hfr_over_the_sequence_uncorrected(self, run, model, normal):
        images = normal(3, 2, 8, 8, seed=5)
        selection = run("hfr_authors", images=images, seed=4, feature="blocks.1.key")
        ours = run("hfr", images=images, seed=4, feature="blocks.1.key", dims=1, noise_correction=False)
        assert selection.scores == ours.scores
        assert selection.timestep == ours.timestep
        assert 2 * selection.cost.forward_passes == ours.cost.forward_passes

    def test_the_authors_variant_samples_latents(self, make_model, tiny_kl, normal, tmp_path):
        """From the posterior of every image, once, so that all timesteps see the same sample."""
        vae_config = dict(tiny_kl.config) | {"_class_name": "AutoencoderKL"}
        model = make_model(num_channels=tiny_kl.config.latent_channels, vae_config=vae_config, vae_decoder=False)
        model.vae.load_state_dict(tiny_kl.state_dict(), strict=False)
        pixels = normal(3, 3, 16, 16)
        options = {"timesteps": TIMESTEPS, "seed": 4, "cache_dir": tmp_path, "progress": False}
        found = select_timestep(model, pixels, method="hfr_authors", **options)
        mean, log_variance = model.encode_posterior(pixels)
        generator = torch.Generator().manual_seed(4)
        noise, deviations = (torch.randn(mean.shape, generator=generator) for _ in range(2))
        latents = mean + (log_variance / 2).exp() * deviations
        for row, t in product(range(3), TIMESTEPS):
            feature = model.extract_features(latents=latents[row : row + 1], noise=noise[row : row + 1], timestep=t)
            (tokens,) = feature.values()
            ratio = high_frequency_ratio(tokens[:, 0], model.config.grid_size, dims=1).item()
            assert found.per_image_scores[row][TIMESTEPS.index(t)] == pytest.approx(ratio, abs=1e-5)

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
        """Of a network that runs out of memory above 5 samples; nothing that has been run is run again."""
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
