"""Features are computed once, for exactly what they depend on, and an interrupted run goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from aselect_hf.data import feature_cache
from aselect_hf.data.feature_cache import cache_key, pooled_features, token_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.images import image_pixels

FEATURE = "blocks.1.query"


@pytest.fixture
def data(normal) -> ImageData:
    return ImageData(normal(10, 2, 8, 8))


def test_values_are_the_models_own(model, data, tmp_path):
    cached = pooled_features(
        model, data, [0, 300], FEATURE, pool_size=2, batch_size=4, cache_dir=tmp_path, progress=False
    )
    mean = pooled_features(model, data, [0, 300], FEATURE, cache_dir=tmp_path, progress=False)
    options = {"features": [FEATURE], "timesteps": [0, 300]}
    direct = model.extract_features(data.items, **options, output_format="pooled")[FEATURE]
    maps = model.extract_features(data.items, **options, output_format="map")[FEATURE]
    for column in range(2):
        np.testing.assert_allclose(mean.values[column], direct[:, column].numpy(), atol=1e-6)
        quarters = cached.values[column].reshape(10, 24, 2, 2)
        np.testing.assert_allclose(quarters[:, :, 1, 0], maps[:, column, :, 2:, :2].mean((-1, -2)).numpy(), atol=1e-6)


def test_token_rows_are_the_tokens_asked_for(model, data, tmp_path):
    tokens = np.array([0, 5, 15, 16 + 3, 7 * 16, 9 * 16 + 15])  # of images 0, 0, 0, 1, 7, 9, of 16 tokens each
    options = {"tokens": tokens, "cache_dir": tmp_path, "progress": False}
    every = model.extract_features(data.items, features=[FEATURE], timesteps=[0, 300])[FEATURE]
    for batch_size in (3, 10):
        cached = token_features(model, data, [0, 300], FEATURE, batch_size=batch_size, **options)
        assert cached.forward_passes == 2 * 10
        for column in range(2):
            expected = every[:, column].flatten(0, 1)[tokens].numpy()
            np.testing.assert_allclose(cached.values[column], expected, atol=1e-6)
        options["cache_dir"] = tmp_path / "again"


def test_tokens_are_those_of_the_whole_image(make_model, tmp_path):
    """Of a wide picture, not of its center."""
    model = make_model(num_channels=1)
    picture = Image.fromarray(np.arange(8 * 24, dtype=np.uint8).reshape(8, 24))
    cached = token_features(
        model, ImageData([picture]), [0], FEATURE, tokens=np.arange(16), cache_dir=tmp_path, progress=False
    )
    pixels = image_pixels(model.config, whole_image=True)([picture])
    expected = model.extract_features(pixels, features=[FEATURE], timesteps=[0])[FEATURE][0, 0]
    np.testing.assert_allclose(cached.values[0], expected.numpy(), atol=1e-6)


def test_tokens_need_the_trained_resolution(model, normal, tmp_path):
    with pytest.raises(ValueError, match="trained resolution, 8 pixels"):
        token_features(
            model,
            ImageData(normal(2, 2, 12, 12)),
            [0],
            FEATURE,
            tokens=np.arange(3),
            cache_dir=tmp_path,
            progress=False,
        )


@pytest.mark.parametrize("pool_size", [0, 5])
def test_pool_size_must_fit_the_grid(model, data, tmp_path, pool_size):
    with pytest.raises(ValueError, match=r"pool_size must be in 1\.\.4"):
        pooled_features(model, data, [0], FEATURE, pool_size=pool_size, cache_dir=tmp_path)


def test_second_call_runs_nothing_and_new_timesteps_only_themselves(model, data, tmp_path):
    first = pooled_features(model, data, [0, 300], FEATURE, cache_dir=tmp_path, progress=False)
    seen = []
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    again = pooled_features(model, data, [300, 0], FEATURE, cache_dir=tmp_path, progress=False)
    assert sum(seen) == 1  # the pass that counts the FLOPs
    np.testing.assert_array_equal(again.values[0], first.values[1])
    assert again.seconds == pytest.approx(first.seconds)
    pooled_features(model, data, [0, 300, 600], FEATURE, cache_dir=tmp_path, progress=False)
    assert sum(seen) == 1 + len(data) + 1


def test_interrupted_run_goes_on_after_its_finished_files(model, data, tmp_path, monkeypatch):
    expected = pooled_features(model, data, [0, 300], FEATURE, cache_dir=tmp_path / "whole", progress=False)
    monkeypatch.setattr(feature_cache, "SHARD_IMAGES", 4)
    extract, calls = type(model).extract_features, []

    def interrupted(self, *args, **kwargs):
        calls.append(len(kwargs["latents"]))
        if len(calls) == 7:  # the second shard, at the second of two timesteps
            raise KeyboardInterrupt
        return extract(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "extract_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pooled_features(model, data, [0, 300], FEATURE, batch_size=2, cache_dir=tmp_path, progress=False)
    calls.clear()
    resumed = pooled_features(model, data, [0, 300], FEATURE, batch_size=4, cache_dir=tmp_path, progress=False)
    assert sum(calls) == 2 * 10 - 2 * 4 - 4
    for values, whole in zip(resumed.values, expected.values, strict=True):
        np.testing.assert_allclose(values, whole, atol=1e-6)
    assert not list(tmp_path.rglob("*partial*"))


def test_key_follows_weights_data_feature_and_noise(model, make_model, data, normal):
    keys = {
        cache_key(model, data, name, kept) for name in (FEATURE, "blocks.1.key") for kept in ("pooled 1", "pooled 2")
    }
    keys.add(cache_key(make_model(seed=1), data, FEATURE, "pooled 2"))
    keys.add(cache_key(make_model(noise_seed=1), data, FEATURE, "pooled 2"))
    keys.add(cache_key(model.to(torch.bfloat16), data, FEATURE, "pooled 2"))
    keys.add(cache_key(make_model(), ImageData(normal(10, 2, 8, 8, seed=1)), FEATURE, "pooled 2"))
    assert len(keys) == 8
    assert cache_key(make_model(), data, FEATURE, "pooled 2") in keys
