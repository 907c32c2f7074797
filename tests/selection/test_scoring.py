"""The criteria as strategies: what was planted is found, what was run is counted, and nothing else decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aselect_hf import ASelectDiTModel, TimestepSelection, select_timestep
from aselect_hf.data.image_data import ImageData
from aselect_hf.selection import RULES, criteria
from aselect_hf.selection.feature_sweep import SMALLEST_CROP, augmented_views, random_resized_crop
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.scoring import KINDS
from tests.selection.test_criteria import knn_loo, ridge_loo

TIMESTEPS = [10, 20, 30, 40]
METHODS = [name for name, rule in RULES.items() if rule.criterion is not None and name[:3] != "hfr"]
CHOOSING = [name for name in METHODS if RULES[name].chooses_feature]
FEW_LABELS = [name for name in METHODS if RULES[name].labels == "few" and not RULES[name].parts]
VIEWS = {"icr": 2, "lidar": 4, "retrieval": 2, "snr": 2}


class PlantedModel(ASelectDiTModel):
    """Tells images apart in one feature at one timestep; elsewhere it gives one direction, of a chaotic length."""

    planted = ("blocks.1.value", 30)

    def features_of_noisy(self, noisy_latents, timesteps, features, class_labels=None):
        found = super().features_of_noisy(noisy_latents, timesteps, features, class_labels)
        told = self.patch_embedding(noisy_latents).flatten(2).mT
        chaotic = torch.sin(1e4 * told.double().mean(dim=(1, 2), keepdim=True)).float() * torch.ones_like(told)
        feature, timestep = self.planted
        return {
            name: torch.where((timesteps == timestep).view(-1, 1, 1), told, chaotic) if name == feature else chaotic
            for name in found
        }


class VeiledModel(PlantedModel):
    """Tells images apart everywhere, but behind noise of their own unless in the planted feature at its timestep."""

    def features_of_noisy(self, noisy_latents, timesteps, features, class_labels=None):
        told = self.patch_embedding(noisy_latents).flatten(2).mT
        found = {}
        for name in features:
            chaos = torch.sin(sum(map(ord, name)) ** 2 * told.double()).float()
            found[name] = told + 30 * told.std() * chaos.mean(dim=1, keepdim=True)
        feature, timestep = self.planted
        if feature in found:
            found[feature] = torch.where((timesteps == timestep).view(-1, 1, 1), told, found[feature])
        return found


class NarrowedModel(PlantedModel):
    """Elsewhere than planted, one direction of what it tells, behind noise: a lower rank, and worse clusters."""

    def features_of_noisy(self, noisy_latents, timesteps, features, class_labels=None):
        told = self.patch_embedding(noisy_latents).flatten(2).mT
        told_mean = told.mean(dim=(1, 2), keepdim=True)
        chaos = torch.sin(1e4 * told_mean.double() * (1 + timesteps.view(-1, 1, 1))).float()
        narrow = (told_mean + 0.3 * told_mean.std() * chaos) * torch.ones_like(told)
        feature, timestep = self.planted
        return {
            name: torch.where((timesteps == timestep).view(-1, 1, 1), told, narrow) if name == feature else narrow
            for name in features
        }


@pytest.fixture
def planted(make_config, randomize, request) -> PlantedModel:
    """With the information where the method can find it: rules by clusters need some of it in other candidates."""
    method = request.getfixturevalue("method") if "method" in request.fixturenames else ""
    models = {"consensus": VeiledModel, "consensus_rank": NarrowedModel}
    return randomize(models.get(method, PlantedModel)(make_config()))


@pytest.fixture
def labeled(normal) -> ImageData:
    """Images of one color each with a little texture; the class is in the first channel."""
    labels = np.arange(36) % 2
    colors = normal(36, 2, 1, 1, seed=1)
    colors[:, 0] += torch.from_numpy(4.0 * labels - 2).float()[:, None, None]
    return ImageData(colors + 0.05 * normal(36, 2, 8, 8), labels)


@pytest.fixture
def blocks(normal) -> ImageData:
    """4 x 4 patches of 2 x 2 pixels, each bright, dark or neither, and a mask that says which."""
    classes = np.random.default_rng(0).integers(0, 3, (30, 4, 4)).repeat(2, axis=1).repeat(2, axis=2)
    pixels = 0.1 * normal(30, 2, 8, 8) + torch.from_numpy(classes - 1.0)[:, None].float()
    return ImageData(pixels, np.arange(30) % 2, masks=classes)


def run(model, images, method: str, **options) -> TimestepSelection:
    options = {"timesteps": TIMESTEPS, "feature": "blocks.1.value", "progress": False} | options
    return select_timestep(model, images, method=method, **options)


@pytest.mark.parametrize("method", METHODS)
class TestEveryCriterion:
    def test_the_planted_timestep_is_found(self, planted, labeled, method):
        selection = run(planted, labeled, method)
        assert selection.timestep == 30
        others = [score for t, score in zip(selection.timesteps, selection.scores, strict=True) if t != 30]
        assert max(selection.scores) > max(others)
        assert selection.feature == "blocks.1.value"
        assert selection.feature_scores is None

    def test_batching_changes_nothing(self, model, labeled, method):
        expected = run(model, labeled, method)
        selection = run(model, labeled, method, batch_size=7)
        np.testing.assert_allclose(selection.scores, expected.scores, atol=1e-3)

    def test_cost_counts_the_passes_that_were_run(self, make_model, labeled, method):
        model, passes = make_model(num_noise_draws=3), []
        model.patch_embedding.register_forward_hook(lambda module, args, output: passes.append(len(output)))
        model.layers[2].register_forward_hook(lambda *_: pytest.fail("the block after the feature was run"))
        selection = run(model, labeled, method)
        counting = 2 if method == "shortlist" else 1
        expected = {"shortlist": 36 * 4 * 2 + 36 * 4 * 3}.get(method, 36 * 4 * VIEWS.get(method, 3))
        assert sum(passes) - counting == selection.cost.forward_passes == expected
        assert selection.cost.flops > 0


def test_seeds_differ_and_leave_the_callers_alone(model, labeled):
    state = torch.get_rng_state()
    for method in VIEWS:
        assert run(model, labeled, method, seed=1).scores != run(model, labeled, method).scores
    assert torch.equal(torch.get_rng_state(), state)
    first, other = (run(model, labeled, "rankme", seed=seed).scores for seed in (0, 1))
    np.testing.assert_allclose(first, other, atol=1e-6)  # all images are used: no draw is left


@pytest.mark.parametrize("method", ["rankme", "ridge", "knn", "logme"])
def test_scores_are_the_criterions_of_the_models_own_features(model, labeled, method):
    """Unaugmented images with the stored noise: what a probe at the chosen timestep will see."""
    scores = run(model, labeled, method, pool_size=2).scores
    found = model.extract_features(
        torch.stack([*labeled.items]), features=["blocks.1.value"], timesteps=TIMESTEPS, output_format="map"
    )["blocks.1.value"]
    pooled = torch.nn.functional.adaptive_avg_pool2d(found.flatten(0, 1), 2).flatten(1).unflatten(0, (36, 4))
    judge = {
        "rankme": criteria.rankme,
        "ridge": lambda x: ridge_loo(x, labeled.labels),
        "knn": lambda x: knn_loo(x, labeled.labels, 5),
        "logme": lambda x: criteria.logme(x, labeled.labels),
    }[method]
    np.testing.assert_allclose(scores, [judge(pooled[:, column]) for column in range(4)], atol=1e-4)


@pytest.mark.parametrize("method", ["ridge", "knn", "retrieval"])
def test_right_and_wrong_images_allow_paired_comparisons(model, labeled, method):
    selection = run(model, labeled, method)
    outcomes = np.array(selection.per_image_scores)
    assert outcomes.shape == (36, 4)
    np.testing.assert_allclose(outcomes.mean(axis=0), selection.scores)
    np.testing.assert_allclose(outcomes.std(axis=0, ddof=1) / 6, selection.standard_errors)


@pytest.mark.parametrize("method", ["rankme", "alpha_req", "lidar", "snr", "logme"])
def test_standard_error_is_about_the_spread_over_other_images(model, normal, method):
    spread, errors = [], []
    for seed in range(12):
        labels = np.arange(40) % 2
        offset = torch.from_numpy(0.3 * (2.0 * labels - 1)).float().view(-1, 1, 1, 1)
        selection = run(model, ImageData(0.5 * normal(40, 2, 8, 8, seed=seed) + offset, labels), method, timesteps=[50])
        spread.append(selection.scores[0])
        errors.append(selection.standard_errors[0])
    assert 0.4 < np.mean(errors) / np.std(spread) < 2.5


class TestViews:
    def test_a_crop_is_a_part_of_the_image_at_its_size(self):
        image = torch.arange(64.0).view(1, 8, 8).expand(3, 8, 8)
        whole = torch.tensor([1 - 1e-7, 0.5, 0.0, 0.0, 0.9])
        torch.testing.assert_close(random_resized_crop(image, whole), image)
        mirrored = torch.tensor([1 - 1e-7, 0.5, 0.0, 0.0, 0.1])
        torch.testing.assert_close(random_resized_crop(image, mirrored), image.flip(-1))
        corner = random_resized_crop(image, torch.tensor([0.0, 0.5, 0.999, 0.999, 0.9]))
        assert corner.shape == image.shape
        side = round(8 * SMALLEST_CROP**0.5)
        assert corner.min() >= image[:, -side:, -side:].min()
        assert corner.max() == 63

    def test_every_view_and_image_has_its_own_crop_and_noise(self, model, normal):
        data = ImageData(normal(1, 2, 32, 32).repeat(3, 1, 1, 1))
        views = augmented_views(SelectionInputs(model, data, None, "blocks.0.query", [0], batch_size=2), 2)
        assert views.latents.shape == (2, 3, 2, 32, 32)
        assert views.noise.shape == (2, 1, 3, 2, 32, 32)
        assert len({float(image.sum()) for image in views.latents.flatten(0, 1)}) == 6
        assert len({float(image.sum()) for image in views.noise.flatten(0, 2)}) == 6
        again = augmented_views(SelectionInputs(model, data, None, "blocks.0.query", [0], batch_size=3), 2)
        assert torch.equal(views.latents, again.latents)
        assert torch.equal(views.noise, again.noise)


class TestSegmentation:
    @pytest.mark.parametrize("method", FEW_LABELS)
    def test_tokens_are_judged_by_their_classes(self, model, blocks, method):
        options = {"feature": "blocks.0.query", "timesteps": [0, 500, 999]}
        selection = run(model, blocks, method, **options)
        assert selection.timestep == 0
        assert selection.options["task"] == "segmentation"
        assert selection.options["tokens"] == 30 * 16
        if method == "logme":
            assert selection.per_image_scores is None
        else:
            parts = np.array(selection.per_image_scores)
            assert parts.shape == (30, 3)
            np.testing.assert_allclose(parts.mean(axis=0), selection.scores, atol=1e-12)
        if method != "knn":  # with one noise for all, tokens of a place have the right neighbors at any timestep
            assert min(selection.standard_errors[1:]) > 0
        if method != "logme":
            assert selection.scores[0] > 0.9
        turned = ImageData(blocks.items, masks=blocks.masks.swapaxes(1, 2))
        assert run(model, turned, method, **options).scores[0] < selection.scores[0] - 0.2

    def test_some_tokens_of_some_images(self, model, blocks):
        selection = run(model, blocks, "ridge", max_tokens=25)
        assert selection.options["tokens"] == 25
        assert selection.cost.forward_passes < 30 * 4

    def test_labels_decide_where_the_task_says_so(self, model, blocks):
        assert run(model, blocks, "ridge", task="classification").options["task"] == "classification"
        with pytest.raises(ValueError, match="ridge needs a few masks; images has none"):
            run(model, ImageData(blocks.items, blocks.labels), "ridge", task="segmentation")


@pytest.mark.parametrize("method", CHOOSING)
class TestChoiceOfTheFeature:
    def test_the_planted_feature_is_found(self, planted, labeled, method, tmp_path):
        selection = run(planted, labeled, method, feature="auto")
        assert (selection.feature, selection.timestep) == PlantedModel.planted
        assert list(selection.feature_scores) == [f"blocks.{block}.{kind}" for block in range(3) for kind in KINDS]
        curve = selection.feature_scores["blocks.1.value"]
        assert curve == selection.scores
        assert TimestepSelection.load(selection.save(tmp_path / "selection.json")) == selection
        selection.apply(planted).save_pretrained(tmp_path / "model")
        config = ASelectDiTModel.from_pretrained(tmp_path / "model").config
        assert (config.feature, config.timestep) == PlantedModel.planted
        assert config.selection["method"] == method

    def test_all_features_cost_one_sweep(self, planted, labeled, method):
        one, every = (run(planted, labeled, method, feature=feature).cost for feature in ("blocks.2.hidden", "auto"))
        assert one.forward_passes == every.forward_passes
        assert every.flops < 1.2 * one.flops


class TestShortlist:
    def test_the_second_confirms_the_firsts_best(self, planted, labeled):
        selection = run(planted, labeled, "shortlist", first="snr", second="knn", num_candidates=2)
        first = run(planted, labeled, "snr")
        assert selection.options["first_scores"] == first.scores
        assert selection.timesteps == sorted(np.array(TIMESTEPS)[np.argsort(first.scores)[-2:]])
        assert selection.score_name == "leave-one-out accuracy (knn)"
        alone = run(planted, labeled, "knn", timesteps=selection.timesteps)
        assert selection.scores == alone.scores
        assert selection.cost.forward_passes == first.cost.forward_passes + alone.cost.forward_passes


def test_default_numbers_of_images(model, normal):
    data = ImageData(normal(600, 2, 8, 8), np.arange(600) % 2)
    for method, expected in (("rankme", 256), ("ridge", 500), ("hfr", 64)):
        assert run(model, data, method, timesteps=[50]).num_images == expected
    assert run(model, data, "rankme", timesteps=[50], num_images=20).num_images == 20


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "hfr",
            {"feature": "auto"},
            f"not those of 'hfr'; give a feature by name, or one of the methods {', '.join(CHOOSING)}$",
        ),
        ("consensus", {"feature": "auto"}, "feature='auto' needs labels"),
        ("ridge", {"feature": "auto", "kinds": ["output"]}, "kinds must be a list of names out of attention_norm"),
        ("ridge", {"feature": "auto", "kinds": []}, "kinds must be a list of names"),
        ("rankme", {"num_views": 2}, "no option num_views; accepted are pool_size"),
        ("rankme", {"pool_size": 5}, r"pool_size must be in 1\.\.4"),
        ("lidar", {"num_views": 1}, "num_views must be at least 2, got 1"),
        ("snr", {"num_images": 2}, "snr needs at least 3 images for its standard errors, got 2"),
        ("knn", {"neighbors": 0}, "neighbors must be at least 1, got 0"),
        ("ridge", {"task": "depth"}, "task must be one of classification, segmentation; got 'depth'"),
        ("shortlist", {"first": "grid"}, "first must be one of consensus, .*, hfr, .*; got 'grid'"),
        ("shortlist", {"num_candidates": 1}, "num_candidates must be at least 2, got 1"),
    ],
    ids=str,
)
def test_bad_requests(model, labeled, method, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, labeled, method, **options)


@pytest.mark.parametrize("method", [*FEW_LABELS, "shortlist"])
def test_labels_of_two_classes_are_needed(model, labeled, normal, method):
    with pytest.raises(ValueError, match=r"needs (a few )?labels( or masks)?; images has none"):
        run(model, ImageData(labeled.items), method)
    with pytest.raises(ValueError, match="at least 2 classes with 2 images each"):
        run(model, ImageData(labeled.items, np.arange(36)), method)


def test_nan_is_refused(model):
    with pytest.raises(ValueError, match="NaN"):
        run(model, torch.full((4, 2, 8, 8), float("nan")), "rankme")
