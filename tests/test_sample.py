"""The model and images that ship with the package are worth their megabytes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from aselect_hf import select_timestep
from aselect_hf.compare.run import compare_strategies, raw_pixels
from aselect_hf.conversion import load_model
from aselect_hf.data.feature_cache import pooled_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import SAMPLE_MODEL
from aselect_hf.selection.probe import fit_probe

MAX_MEGABYTES = 12


@pytest.fixture(scope="module")
def sample_model():
    return load_model("sample").eval()


def test_it_is_small_and_has_a_card():
    assert (SAMPLE_MODEL / "model.safetensors").stat().st_size < MAX_MEGABYTES * 2**20
    card = (SAMPLE_MODEL / "README.md").read_text()
    assert card.startswith("---\n")
    assert "license: mit" in card


def test_auto_model_loads_it(sample_model):
    loaded = AutoModel.from_pretrained(SAMPLE_MODEL)
    assert type(loaded) is type(sample_model)
    assert loaded.config.timestep is not None


def test_it_denoises(sample_model, normal):
    """Its estimate of the noise beats the best constant (0) at every noise level."""
    images = torch.cat(list(ImageData.of("sample", split="test").subset(range(32)).batches(sample_model.config, 32)))
    schedule, noise = sample_model.noise_schedule, normal(*images.shape)
    errors = []
    for t in (100, 300, 600, 900):
        noisy = schedule.add_noise(images, noise, t)
        with torch.no_grad():
            prediction = sample_model.denoise(noisy, t)
        errors.append((schedule.predicted_noise(prediction, noisy, torch.tensor(t)) - noise).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.4
    assert errors[-1] < 0.02


def test_any_script_can_feed_it_rgb(sample_model):
    """As transformers' example scripts do, through the Auto classes."""
    processor = AutoImageProcessor.from_pretrained(SAMPLE_MODEL)
    picture = ImageData.of("sample", split="test").decode(0)
    gray, rgb = (
        processor(images=each, return_tensors="pt")["pixel_values"] for each in (picture, picture.convert("RGB"))
    )
    assert gray.shape == (1, 3, 28, 28)
    assert torch.equal(gray, rgb)
    assert sample_model(rgb).pooler_output.shape == (1, sample_model.config.hidden_size)


def test_the_shipped_timestep_is_the_one_its_rule_chooses(sample_model):
    saved = sample_model.config.selection
    picked = saved["timesteps"][int(np.argmax(saved["scores"]))]
    assert picked == sample_model.config.timestep
    some = sorted({*saved["timesteps"][::5], picked})
    request = {"method": saved["method"], "num_images": saved["num_images"], "seed": saved["seed"], **saved["options"]}
    found = select_timestep(sample_model, ImageData.of("sample"), timesteps=some, progress=False, **request)
    expected = dict(zip(saved["timesteps"], saved["scores"], strict=True))
    assert found.timestep == picked
    np.testing.assert_allclose(found.scores, [expected[t] for t in some], atol=1e-4)


def test_its_features_beat_raw_pixels(sample_model, tmp_path):
    """For ridge regression, on validation images; the whole comparison is in the slow suite."""
    splits = {name: ImageData.of("sample", split=name) for name in ("train", "validation")}
    labels = {name: data.labels for name, data in splits.items()}
    pixels = {name: raw_pixels(data, sample_model.config) for name, data in splits.items()}
    step, feature = sample_model.config.timestep, sample_model.config.feature
    with torch.inference_mode():
        features = {
            name: pooled_features(
                sample_model, data, [step], feature, pool_size=2, cache_dir=tmp_path, progress=False
            ).values[0]
            for name, data in splits.items()
        }
    accuracy = {
        name: fit_probe(x["train"], labels["train"], x["validation"], labels["validation"], kind="ridge")
        for name, x in {"pixels": pixels, "features": features}.items()
    }
    assert accuracy["features"].validation_score > accuracy["pixels"].validation_score + 0.02


@pytest.mark.slow
def test_the_comparison_of_the_readme(sample_model, tmp_path):
    splits = {name: ImageData.of("sample", split=name) for name in ("train", "validation", "test")}
    comparison = compare_strategies(sample_model, splits, timesteps=10, pool_size=2, cache_dir=tmp_path)
    comparison.save(tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    hfr, grid = comparison.row("hfr"), comparison.row("grid")
    assert [row["strategy"] for row in rows] == ["hfr", "grid", "fixed"]
    assert hfr.test_accuracy_mean > np.mean(comparison.raw_pixel_accuracies)
    assert grid.selection.cost.flops > 20 * hfr.selection.cost.flops
