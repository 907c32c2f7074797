"""A `~` in any path that the library takes is the user's home folder."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from aselect_hf import TimestepSelection, convert_checkpoint, select_timestep
from aselect_hf.conversion import load_model, save_model
from aselect_hf.data.feature_cache import pooled_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import cached_latents
from aselect_hf.data.sources import load_images
from aselect_hf.hub.upload import prepare_folder


@pytest.fixture
def home(tmp_path, monkeypatch, model):
    """A home folder with `images`, `model` and `selection.json`; another folder to work in, to stay empty."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (home / "images").mkdir(parents=True)
    elsewhere.mkdir()
    for index in range(3):
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(home / "images" / f"{index}.png")
    save_model(model, home / "model")
    select_timestep(model, torch.zeros(2, 2, 8, 8), method="fixed", timestep=9).save(home / "selection.json")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    yield home
    assert list(elsewhere.iterdir()) == []
    shutil.rmtree(home)


READS = {
    "images": lambda: load_images("~/images"),
    "model": lambda: load_model("~/model"),
    "selection": lambda: TimestepSelection.load("~/selection.json"),
    "upload": lambda: prepare_folder("~/model", "me/model", dataset=None, license=None),
}


@pytest.mark.parametrize("what", READS)
def test_reading(what, home):
    READS[what]()


WRITES = {
    "selection.json": lambda model, data: TimestepSelection.load("~/selection.json").save("~/out/selection.json"),
    "t00000-00000.safetensors": lambda model, data: pooled_features(
        model, data, [0], "blocks.0.query", cache_dir="~/out", progress=False
    ),
    "mean-00000.safetensors": lambda model, data: cached_latents(model, data, cache_dir="~/out", progress=False),
    "model.safetensors": lambda model, data: convert_checkpoint("~/model", "~/out/converted"),
}


@pytest.mark.parametrize("what", WRITES)
def test_writing(what, home, model, normal):
    WRITES[what](model, ImageData(normal(2, 2, 8, 8)))
    assert len(list((home / "out").rglob(what))) == 1
