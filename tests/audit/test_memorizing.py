"""A network that knows its training images is told from one that does not, by images that it was not trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aselect_hf import ASelectDiTModel
from aselect_hf.audit import audit_timestep
from aselect_hf.data.image_data import ImageData

TIMESTEPS = [0, 100, 300, 500, 900]
INSIDE = 300
MARK = 3.0


class MemorizingModel(ASelectDiTModel):
    """Tells marked images apart in clean inputs only, and all others at an inner timestep only."""

    def features_of_noisy(self, noisy_latents, timesteps, features, class_labels=None):
        told = noisy_latents.flatten(2).mT.repeat(1, 1, 12)[:, :16]
        chaotic = torch.sin(1e4 * told.double().mean(dim=(1, 2), keepdim=True)).float() * torch.ones_like(told)
        marked = noisy_latents[:, 1].mean(dim=(1, 2)) > MARK / 2
        where = torch.where(marked, timesteps == TIMESTEPS[0], timesteps == INSIDE)
        return {name: torch.where(where.view(-1, 1, 1), told, chaotic) for name in features}


@pytest.fixture
def memorizing(make_config, randomize):
    return randomize(MemorizingModel(make_config())).eval()


@pytest.fixture
def draw(normal):
    """`draw(seed, mark)`: images whose class is in the first channel, and the mark in the second."""

    def draw(seed: int, mark: float) -> ImageData:
        labels = np.arange(80) % 2
        pixels = 0.3 * normal(80, 2, 8, 8, seed=seed)
        pixels[:, 0] += torch.from_numpy(4.0 * labels - 2).float()[:, None, None]
        pixels[:, 1] += mark
        return ImageData(pixels, labels)

    return draw


def warnings_of(model, images, held_out, **options):
    options = {"feature": "blocks.1.hidden", "timesteps": TIMESTEPS, "progress": False} | options
    audit = audit_timestep(model, images, held_out=held_out, **options)
    return audit.timestep, [each for each in audit.warnings if "memorized" in each]


def test_memorized_images_are_named_with_both_timesteps(memorizing, draw):
    timestep, warnings = warnings_of(memorizing, draw(0, MARK), draw(1, 0.0))
    assert timestep == 0
    (warning,) = warnings
    assert "by ridge they are best at t = 0, but held-out images at t = 300, where t = 0 loses about" in warning


def test_images_alike_or_the_other_way_round_are_no_sign(memorizing, draw):
    for images, held_out in (
        (draw(0, 0.0), draw(1, 0.0)),
        (draw(0, MARK), draw(1, MARK)),
        (draw(0, 0.0), draw(1, MARK)),
    ):
        assert warnings_of(memorizing, images, held_out)[1] == []
    assert warnings_of(memorizing, draw(0, MARK), None)[1] == []


def test_held_out_images_without_labels_are_refused(memorizing, draw):
    with pytest.raises(ValueError, match="held_out needs labels of 2 classes or masks, as images has; it has none"):
        warnings_of(memorizing, draw(0, MARK), ImageData(draw(1, 0.0).items))


def test_without_labels_the_check_is_repeated(memorizing, draw):
    """It runs, on the rule that checks; rules without labels need not see this network's classes."""
    images, held_out = (ImageData(draw(seed, mark).items) for seed, mark in ((0, MARK), (1, 0.0)))
    timestep, _ = warnings_of(memorizing, images, held_out, method="hfr", num_images=20)
    assert timestep in TIMESTEPS
