"""Pictures show what the model computes, and a color or a brightness means the same wherever it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from aselect_hf.pictures import (
    FeatureColors,
    attention_maps,
    attention_picture,
    cosine_similarities,
    curve,
    noise_strip,
    pca_map,
    similarity_map,
    sweep_picture,
)
from aselect_hf.pictures.sweep import dense_timesteps, even_timesteps, picture_latents
from tests.modeling.tiny_transformers import tiny_model

GRID = (4, 4)


@pytest.fixture
def gray_model(make_model):
    return make_model(num_channels=1)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8))


def test_colors_are_the_principal_components(normal):
    tokens = normal(50, 6) * torch.tensor([9.0, 1, 5, 1, 1, 3])
    expected = np.linalg.svd((tokens - tokens.mean(0)).numpy())[2][:3]
    found = FeatureColors.fit(tokens).directions.numpy().T
    np.testing.assert_allclose(np.abs((found * expected).sum(1)), 1, rtol=1e-5)


def test_one_projection_gives_one_color_to_one_feature(normal):
    tokens = normal(3, 16, 5)
    tokens[2] = tokens[0] + 7.0  # the same deviations from another mean
    colors = FeatureColors.fit(tokens)
    values = colors(tokens)
    assert values.shape == (3, 16, 3)
    np.testing.assert_array_equal(values[0], values[2])
    assert (values[0] != values[1]).any()
    assert np.ptp(values.reshape(-1, 3), axis=0).tolist() == [255, 255, 255]


def test_colors_of_features_with_one_channel(normal):
    values = FeatureColors.fit(normal(9, 1))(normal(9, 1))
    assert (np.ptp(values[:, 0]) > 200, np.ptp(values[:, 1:])) == (True, 0)


def test_a_pca_map_keeps_every_patch(normal):
    tokens = normal(6, 5)
    image = pca_map(tokens, (2, 3), side=30)
    assert (image.size, image.mode) == ((30, 20), "RGB")
    np.testing.assert_array_equal(np.asarray(image)[5::10, 5::10].reshape(6, 3), FeatureColors.fit(tokens)(tokens))


def test_similarities_are_cosines(normal):
    tokens, others = normal(6, 5), normal(6, 5, seed=1)
    found = cosine_similarities(tokens, (2, 3), (1, 0), reference=others)
    one = others[3].numpy()
    expected = tokens.numpy() @ one / np.linalg.norm(tokens.numpy(), axis=1) / np.linalg.norm(one)
    np.testing.assert_allclose(found, expected.reshape(2, 3), rtol=1e-5)
    assert cosine_similarities(tokens, (2, 3), (0, 2))[0, 2] == pytest.approx(1)


def test_the_clicked_patch_is_the_brightest(normal):
    values = np.asarray(similarity_map(normal(16, 5), GRID, (2, 1), side=80)).sum(-1)[10::20, 10::20]
    assert np.unravel_index(values.argmax(), GRID) == (2, 1)


@pytest.mark.parametrize("patch", [(4, 0), (0, -1)])
def test_a_patch_outside_of_the_grid_is_refused(normal, patch):
    with pytest.raises(ValueError, match=r"patch must be \(row, column\) within 4 x 4"):
        similarity_map(normal(16, 5), GRID, patch)


def test_features_of_another_grid_are_refused(normal):
    with pytest.raises(ValueError, match=r"features must be \(4 \* 4, channels\)"):
        pca_map(normal(15, 5), GRID)
    with pytest.raises(ValueError, match="NaN"):
        pca_map(normal(16, 5) * torch.nan, GRID)


@pytest.mark.parametrize("draws", [1, 2])
def test_a_sweep_gives_the_features_of_the_model(make_model, picture, draws):
    model = make_model(num_channels=1, num_noise_draws=draws)
    names, done = ["blocks.0.key", "blocks.2.hidden"], []
    sweep = sweep_picture(model, picture, [0, 100, 900], names, batch_size=2, progress=done.append)
    expected = model.extract_features(latents=picture_latents(model, picture), features=names, timesteps=[0, 100, 900])
    for name in names:
        torch.testing.assert_close(sweep.features[name], expected[name][0], atol=1e-5, rtol=1e-4)
    assert (done[-1], len(done), sweep.grid_size) == (1, draws + 1, GRID)
    clean = np.asarray(sweep.noisy_picture(0).convert("L"), dtype=float)
    seen = (picture_latents(model, picture)[0, 0].numpy() + 1) * 127.5
    assert np.abs(clean - seen).mean() < 5
    assert np.abs(np.asarray(sweep.noisy_picture(900).convert("L")) - seen).mean() > 20


def test_a_sweep_refuses_what_cannot_be_read(gray_model, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png cannot be read as an image"):
        sweep_picture(gray_model, tmp_path / "text.png", [0], ["blocks.0.key"])
    with pytest.raises(ValueError, match="must not be empty"):
        sweep_picture(gray_model, tmp_path / "text.png", [], ["blocks.0.key"])


def test_a_strip_has_a_column_per_timestep(gray_model, picture):
    strip = noise_strip(gray_model, picture, [0, 500, 999], side=40)
    assert strip.size == (3 * 46 - 6, 36 + 2 * 40 + 6)
    assert noise_strip(gray_model, picture, side=20).width == 8 * 26 - 6


def test_timesteps_of_pictures():
    assert even_timesteps(1000, 40) == list(range(0, 1000, 25))
    assert even_timesteps(7, 40) == list(range(7))
    assert dense_timesteps(1000, 3) == [0, 175, 699]
    assert dense_timesteps(2, 8) == [0, 1]


def test_attention_of_a_dit_is_what_transformers_records(gray_model, picture):
    latents = picture_latents(gray_model, picture)
    found = attention_maps(gray_model, picture, 300, 1)
    gray_model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = gray_model(latents=latents, timestep=300, output_attentions=True).attentions[1][0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(attention_maps(gray_model, picture, 300, 1), expected)
    assert gray_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["SD3", "FLUX", "Chroma", "PixArt-Sigma"])
def test_attention_of_other_families(family, normal):
    model = tiny_model(family).eval()
    latents = normal(1, model.config.num_channels, 8, 8)
    patches = model.config.num_patches
    for block in (0, -1):
        found = attention_maps(model, latents, 300, block)
        rows = found.sum(-1)
        assert found.shape == (2, patches, patches)
        assert rows.max() <= 1 + 1e-5
        assert (rows.min() > 0.999) == family.startswith("PixArt")  # there the text has an attention of its own
    if family in ("SD3", "PixArt-Sigma"):  # without norms and rotations, logits are products of the features
        query, key = (
            model.extract_features(latents=latents, feature=f"blocks.0.{kind}", timestep=300)[f"blocks.0.{kind}"][0, 0]
            for kind in ("query", "key")
        )
        heads = [each.view(patches, 2, 8).transpose(0, 1) for each in (query, key)]
        logits, logs = heads[0] @ heads[1].mT * 8**-0.5, attention_maps(model, latents, 300, 0).log()
        torch.testing.assert_close(logs - logs[..., :1], logits - logits[..., :1], atol=1e-4, rtol=1e-3)


def test_linear_attention_has_no_maps(normal):
    with pytest.raises(ValueError, match="no softmax attention among patches in block 1"):
        attention_maps(tiny_model("Sana").eval(), normal(1, 4, 8, 8), 300, 1)


def test_a_picture_of_attention(gray_model, picture):
    maps = attention_maps(gray_model, picture)
    image = attention_picture(maps, GRID, (1, 2), side=80)
    values = np.asarray(image).astype(int).sum(-1)[10::20, 10::20]
    assert values.argmax() == maps[:, 6].mean(0).argmax()
    with pytest.raises(ValueError, match="maps must be"):
        attention_picture(maps[:, :3], GRID, (1, 2))
    with pytest.raises(ValueError, match="patch must be"):
        attention_picture(maps, GRID, (1, 4))


def test_a_curve_lies_before_that_of_the_data_set(gray_model):
    figure = curve(gray_model.noise_schedule, picture=([0, 500], {"this picture": [0.2, 0.4]}), timestep=500)
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert labels[0] == "this picture"
    assert figure.axes[1].get_xlabel() == "sigma"
