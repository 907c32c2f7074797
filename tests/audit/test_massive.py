"""Massive activations are found from statistics, named, and remedied wherever features come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aselect_hf import ASelectDiTModel, find_massive_channels
from aselect_hf.audit import audit_timestep
from aselect_hf.conversion import load_model
from aselect_hf.data.feature_cache import cache_key
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images

FEATURE = "blocks.1.hidden"


@pytest.fixture
def images(normal) -> ImageData:
    """Two classes that differ in the sign of their mean."""
    labels = np.arange(40) % 2
    signs = torch.from_numpy(2.0 * labels - 1).float().view(-1, 1, 1, 1)
    return ImageData(0.3 * normal(40, 2, 8, 8) + signs, labels)


@pytest.fixture
def massive(model) -> ASelectDiTModel:
    """Two channels of the block outputs are far larger than the others on every token."""
    with torch.no_grad():
        model.patch_embedding.bias[[3, 9]] += torch.tensor([3000.0, -1000.0])
    return model


def test_planted_channels_are_named_with_their_ratios(massive, images):
    found = find_massive_channels(massive, images, feature=FEATURE, timestep=50)
    assert found.channels == [3, 9]
    assert found.ratios[0] > 2 * found.ratios[1] > 100
    assert set(found.accuracies) == {
        "as it is", "blocks.1.attention_norm", "blocks.1.mlp_norm", "channels discarded",
    }  # fmt: skip
    assert found.accuracies["channels discarded"] >= found.accuracies["as it is"]
    sentence = found.sentence()
    assert "massive activations in blocks.1.hidden: channel 3 (" in sentence
    assert "config.channel_discard = {'blocks.1.hidden': [3, 9]}" in sentence


def test_few_images_and_images_without_a_label_are_enough(massive, images):
    labels = np.where(np.arange(40) < 4, np.arange(40) % 2, -1)
    found = find_massive_channels(massive, ImageData(images.items, labels), feature=FEATURE, timestep=50)
    assert found.channels == [3, 9]
    assert all(score * 4 == round(score * 4) for score in found.accuracies.values())
    norm = find_massive_channels(massive, images, feature="blocks.1.mlp_norm", timestep=50)
    assert norm.norms == ["blocks.1.attention_norm"]


def test_the_audit_warns_of_them(massive, images):
    options = {"feature": FEATURE, "timesteps": [0, 100, 300, 500, 900], "num_images": 20, "progress": False}
    audit = audit_timestep(massive, images, method="hfr", **options)
    assert any("massive activations in blocks.1.hidden" in warning for warning in audit.warnings)
    massive.config.channel_discard = {FEATURE: [3, 9]}
    audit = audit_timestep(massive, images, method="hfr", **options)
    assert not any("massive" in warning for warning in audit.warnings)


@pytest.mark.parametrize("timestep", [0, 300, 900])
def test_the_sample_has_none_in_its_own_feature(timestep):
    found = find_massive_channels(load_model("sample"), load_images("sample", "train"), timestep=timestep)
    assert (found.channels, found.sentence(), found.accuracies) == ([], "", None)


def test_discarded_channels_are_zero_wherever_features_come_out(make_model, images, normal, tmp_path):
    model = make_model()
    plain = model.extract_features(images.items, feature=[FEATURE, "blocks.1.query"], timestep=50)
    key = cache_key(model, images, FEATURE, "pooled")
    model.config.channel_discard = {FEATURE: [2, 5]}
    assert cache_key(model, images, FEATURE, "pooled") != key
    model.save_pretrained(tmp_path / "model")
    loaded = ASelectDiTModel.from_pretrained(tmp_path / "model").eval()
    assert loaded.config.channel_discard == {FEATURE: [2, 5]}
    expected = plain[FEATURE].clone()
    expected[..., [2, 5]] = 0
    fixed = loaded.fix_timestep(50, [FEATURE, "blocks.1.query"])
    for each in (model, loaded, fixed):
        found = each.extract_features(images.items, feature=[FEATURE, "blocks.1.query"], timestep=50)
        torch.testing.assert_close(found[FEATURE], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["blocks.1.query"], plain["blocks.1.query"], atol=1e-5, rtol=1e-5)
        tokens = each(images.items, feature=FEATURE, timestep=50).last_hidden_state
        assert (tokens[..., [2, 5]] == 0).all()
    noisy, steps = normal(2, 2, 8, 8), torch.tensor([3, 7])
    assert (model.features_of_noisy(noisy, steps, [FEATURE])[FEATURE][..., [2, 5]] == 0).all()


@pytest.mark.parametrize(
    ("discard", "message"),
    [
        ({"blocks.9.hidden": [1]}, "blocks.9.hidden"),
        (
            {FEATURE: [400]},
            "channel_discard of 'blocks.1.hidden' must be a list of channels in 0",
        ),
        ({FEATURE: 3}, "must be a list of channels"),
    ],
)
def test_what_a_feature_does_not_have_is_refused(make_config, discard, message):
    with pytest.raises(ValueError, match=message):
        make_config(channel_discard=discard)
    assert make_config(channel_discard={"blocks.-1.hidden": [4, 1, 4]}).channel_discard == {"blocks.2.hidden": [1, 4]}
