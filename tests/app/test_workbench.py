"""What the page computes is what the model computes, once, for whoever asks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_pipelines import PIPELINES

from aselect_hf import from_diffusers, high_frequency_ratio
from aselect_hf.app import Checkpoint, Workbench, load_shown, workbench
from aselect_hf.app.cache import BoundedCache
from aselect_hf.conversion import save_model
from aselect_hf.pictures.sweep import picture_latents

FEATURE = "blocks.1.key"


def test_a_sweep_is_computed_once_and_holds_every_feature(bench, shown, upload, monkeypatch):
    progress = []
    sweep = bench.sweep(shown, upload, FEATURE, progress.append)
    monkeypatch.setattr(bench, "_run", None)
    assert bench.sweep(shown, upload, "blocks.0.hidden") is sweep
    assert set(sweep.features) == set(shown.backbone.config.list_features())
    assert (sweep.timesteps, progress[-1]) == (list(range(0, 1000, 25)), 1)


def test_a_large_model_sweeps_one_kind_or_one_feature(shown, monkeypatch):
    width, steps = 24 * 4 * 16, 40
    monkeypatch.setattr(workbench, "MAX_SWEEP_BYTES", 3 * width * steps)
    assert workbench.features_together(shown, FEATURE) == [f"blocks.{block}.key" for block in range(3)]
    monkeypatch.setattr(workbench, "MAX_SWEEP_BYTES", 1)
    assert workbench.features_together(shown, FEATURE) == [FEATURE]


def test_ratios_are_those_of_the_features(bench, shown, upload):
    latents = picture_latents(shown.backbone, upload.picture)
    tokens = shown.backbone.extract_features(latents=latents, feature=FEATURE, timestep=[0, 500])[FEATURE][0]
    found = bench.ratios(shown, upload, FEATURE)
    assert [found[0], found[20]] == pytest.approx(high_frequency_ratio(tokens, (4, 4)).tolist(), rel=1e-4)


def test_classes_are_the_softmax_of_the_head(classifier, upload):
    found = Workbench([classifier]).classes(classifier, upload)
    with torch.no_grad():
        latents = picture_latents(classifier.backbone, upload.picture)
        expected = classifier.model(latents=latents).logits[0].softmax(-1).tolist()
    assert found == pytest.approx(dict(zip(("cat", "dog", "<b>owl</b>"), expected, strict=True)))


def test_confidence_at_the_own_timestep_is_that_of_the_head(classifier, upload):
    bench = Workbench([classifier])
    found = bench.confidences(classifier, upload)
    own = classifier.timesteps.index(classifier.model.config.timestep)
    for name, share in bench.classes(classifier, upload).items():
        assert found[name][own] == pytest.approx(share, abs=1e-5)


def test_confidence_of_a_segmenter_and_of_none(segmenter, bench, shown, upload):
    found = Workbench([segmenter]).confidences(segmenter, upload)
    assert {name: len(values) for name, values in found.items()} == {"mean over pixels": 40}
    assert 0.5 <= min(found["mean over pixels"]) <= 1
    assert bench.confidences(shown, upload) is None


def test_segments_have_the_size_of_the_picture(segmenter, upload):
    classes = Workbench([segmenter]).segments(segmenter, upload)
    assert classes.shape == (24, 32)
    assert set(np.unique(classes)) <= {0, 1}


def test_a_picture_of_the_gallery_is_its_own_neighbor(bench, shown, write):
    from aselect_hf.app.uploads import read_upload
    from tests.app.conftest import encoded

    upload = read_upload(write("own.png", encoded(bench.gallery_picture(40), "PNG")))
    rows, similarities = bench.neighbors(shown, upload, FEATURE, 100)
    assert (rows[0], len(rows)) == (40, 10)
    assert similarities == sorted(similarities, reverse=True)
    assert similarities[0] == pytest.approx(1, abs=1e-5)


def test_a_plain_backbone_answers_with_its_neighbors(bench, shown, upload):
    found = bench.classes(shown, upload)
    assert sum(found.values()) == pytest.approx(1)
    assert set(found) <= set(bench.gallery.label_names)


def test_a_fixed_timestep_has_nothing_to_walk_over(make_model, upload):
    fixed = Checkpoint("fixed", make_model(num_channels=1).fix_timestep(70))
    bench = Workbench([fixed])
    with pytest.raises(ValueError, match="fixed to 70"):
        bench.sweep(fixed, upload, FEATURE)
    assert not fixed.can_walk


def test_unknown_features_and_models_are_refused(bench, shown):
    with pytest.raises(ValueError, match="there is no block 9"):
        shown.feature(9, "key")
    with pytest.raises(ValueError, match="model must be one of plain"):
        bench.checkpoint("other")
    with pytest.raises(ValueError, match="different names"):
        Workbench([shown, shown])


def test_a_saved_model_is_shown_with_its_card(make_model, tmp_path):
    save_model(make_model(num_channels=1), tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: mit\n---\n")
    found = load_shown(str(tmp_path / "mine"))
    assert found.name == "mine"
    assert "| license | mit |" in found.facts()
    assert "| timestep | t = 100 of 0..999" in found.facts()


@pytest.mark.parametrize("family", ["SD3", "FLUX", "PixArt"])
def test_every_family_is_shown(family, randomize, upload, tmp_path):
    (tmp_path / "words").mkdir()
    pipeline = PIPELINES[family](tmp_path / "words", randomize)
    save_model(from_diffusers(pipeline, prompt="a", image_size=16), tmp_path / "model")
    found = load_shown(str(tmp_path / "model"))
    bench, (block, kind) = Workbench([found]), found.own_feature
    feature = found.feature(block, kind)
    sweep = bench.sweep(found, upload, feature)
    assert (sweep.grid_size, sweep.noisy_picture(500).size) == ((4, 4), (8, 8))
    assert len(bench.ratios(found, upload, feature)) == len(found.timesteps)
    assert bench.attention(found, upload, 500, block).shape == (2, 16, 16)
    assert len(bench.neighbors(found, upload, feature, 500)[0]) == 10
    assert sum(bench.classes(found, upload).values()) == pytest.approx(1)


def test_a_model_without_pictures_is_refused(make_model, tmp_path):
    save_model(make_model(), tmp_path / "latents")
    with pytest.raises(ValueError, match="takes 2 channels, not pictures"):
        load_shown(str(tmp_path / "latents"))


def test_the_cache_is_bounded():
    cache = BoundedCache(10)
    for key in "abc":
        cache.get(key, lambda key=key: key, lambda result: 4)
    assert cache.get("c", lambda: "new") == "c"
    assert cache.get("a", lambda: "new") == "new"


def test_models_run_on_a_borrowed_gpu(shown, upload):
    """Only what a process can hand to another one goes there and comes back."""
    import pickle

    calls = []

    def lend(function):
        def lent(*inputs):
            calls.append(inputs[0])
            return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(inputs)))))

        return lent

    bench, lent = Workbench([shown]), Workbench([shown])
    lent.borrow(lend)
    assert lent.ratios(shown, upload, FEATURE) == bench.ratios(shown, upload, FEATURE)
    assert lent.neighbors(shown, upload, FEATURE, 100) == bench.neighbors(shown, upload, FEATURE, 100)
    assert torch.equal(lent.attention(shown, upload, 100, 1), bench.attention(shown, upload, 100, 1))
    assert calls == ["sweep", "pooled", "pooled", "attention"]
