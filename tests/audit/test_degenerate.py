"""Inputs that can tell nothing are named, and no verdict on them is "trust"."""

import numpy as np
import pytest
import torch

from aselect_hf.audit import DO_NOT_TRUST, TRUST, UNCERTAIN, audit_timestep
from aselect_hf.audit.degenerate import Degenerate, find_degenerate
from aselect_hf.audit.massive import find_upstream_channels
from aselect_hf.data.image_data import ImageData

STEPS = [0, 100, 300, 500, 900]


@pytest.fixture
def images(normal) -> ImageData:
    labels = np.arange(40) % 2
    signs = torch.from_numpy(2.0 * labels - 1).float().view(-1, 1, 1, 1)
    return ImageData(0.3 * normal(40, 2, 8, 8) + signs, labels)


@pytest.fixture
def dead(model):
    """Queries of block 1 are the bias, whatever the image shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1." in name and "attention" in name and name.endswith("weight"):
                parameter.zero_()
    return model


@pytest.mark.parametrize("labeled", [True, False])
def test_a_dead_feature_is_named_and_not_trusted(dead, images, labeled):
    data = images if labeled else images.items
    options = {"feature": "blocks.1.query", "timesteps": STEPS, "progress": False}
    audit = audit_timestep(dead, data, method="fixed", timestep=100, **options)
    assert audit.verdict == DO_NOT_TRUST
    assert audit.sentence == "blocks.1.query is the same for all images at t = 100: choose another feature"
    assert audit.sentence in audit.warnings


def test_labels_of_one_class_are_named_and_not_trusted(model, images):
    data = ImageData(images.items, np.full(40, 7))
    audit = audit_timestep(model, data, method="hfr", timesteps=STEPS, progress=False)
    assert audit.verdict in (UNCERTAIN, DO_NOT_TRUST)
    assert "all labels are of one class (7), so they cannot check the pick" in audit.warnings


def test_copies_are_counted_and_many_are_not_trusted(model, images):
    found = find_degenerate(model, ImageData(images.items[[*range(30), *range(10)]]), None, "blocks.1.query", 0, 0)
    assert (found.doubts, found.warnings) == ([], ["10 of 40 images are copies of others"])
    found = find_degenerate(model, ImageData(images.items[[*range(15)] * 3]), None, "blocks.1.query", 0, 0)
    assert found.capped(TRUST, "fine") == (UNCERTAIN, "30 of 45 images are copies of others; fine")
    assert found.capped(DO_NOT_TRUST, "bad") == (DO_NOT_TRUST, "bad")
    with pytest.raises(ValueError, match=r"all 5 images of .* are the same"):
        audit_timestep(model, images.items[[0] * 5], timesteps=STEPS, progress=False)


def test_ordinary_inputs_raise_no_doubt(model, images):
    found = find_degenerate(model, images, np.asarray(images.labels), "blocks.1.query", 100, 0)
    assert found == Degenerate()


@pytest.fixture
def massive(model):
    """Two channels of all block outputs are far larger than the others on every token."""
    with torch.no_grad():
        model.patch_embedding.bias[[3, 9]] += torch.tensor([3000.0, -1000.0])
    return model


def test_massive_channels_before_the_feature_are_named(massive, images):
    found = find_upstream_channels(massive, images, feature="blocks.2.query", timestep=100)
    assert (found.blocks, found.channels) == (["blocks.0.hidden", "blocks.1.hidden"], [3, 9])
    assert found.share > 0.9
    assert "massive activations before blocks.2.query: channels 3, 9 in blocks.0.hidden to blocks.1.hidden (" in (
        found.sentence()
    )
    assert find_upstream_channels(massive, images, feature="blocks.0.query", timestep=100).sentence() == ""


def test_the_audit_names_them_where_the_pick_is_not_trusted(massive, images):
    options = {"feature": "blocks.2.query", "timesteps": STEPS, "progress": False}
    audit = audit_timestep(massive, images.items, method="hfr", **options)
    named = any("massive activations before blocks.2.query" in warning for warning in audit.warnings)
    assert named == (audit.verdict != TRUST)
    assert audit.verdict != TRUST


def test_the_shipped_model_has_none(sample):
    model, images = sample
    assert find_upstream_channels(model, images, timestep=100).blocks == []


@pytest.fixture
def sample():
    from aselect_hf.conversion import load_model
    from aselect_hf.data.sources import load_images

    return load_model("sample"), load_images("sample", "train")
