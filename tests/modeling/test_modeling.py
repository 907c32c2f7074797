"""The model: features against an independent forward pass, early exit, noise, checkpoints, resolutions, VAE, errors."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from aselect_hf import ASelectDiTConfig, ASelectDiTForImageClassification, ASelectDiTModel, make_image_processor
from aselect_hf.modeling.features import FEATURE_KINDS, list_features
from aselect_hf.modeling.modeling_aselect_dit import sincos_positions

LOGGER = "aselect_hf.modeling.modeling_aselect_dit"
SIT = {"type": "flow_matching", "model_time": "data_fraction"}
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "given": {"trained_betas": np.linspace(1e-3, 0.02, 1000).tolist()},
    "flow": {"type": "flow_matching"},
    "sit": SIT,
}


def vae_fields(vae: Any) -> dict[str, Any]:
    """The config of a diffusers autoencoder as it stands in a `config.json`."""
    fields = {key: value for key, value in dict(vae.config).items() if not key.startswith("_")}
    return {"_class_name": type(vae).__name__} | json.loads(json.dumps(fields))


def count_calls(module: torch.nn.Module) -> Counter[str]:
    """A counter, filled from now on, of forward calls of `module`'s parts by their names."""
    calls: Counter[str] = Counter()
    for name, part in module.named_modules():
        part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


# ---------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("noise_schedule", [{}, SIT], ids=["ddpm", "sit"])
@pytest.mark.parametrize("labeled", [False, True], ids=["null-class", "classes"])
def test_every_feature_of_every_block_equals_the_reference(
    make_model: Any,
    normal: Any,
    reference_dit: Any,
    original_state: Any,
    noise_schedule: dict[str, Any],
    labeled: bool,
) -> None:
    model = make_model(noise_schedule=noise_schedule)
    clean, noise = normal(4, 2, 8, 8), normal(4, 2, 8, 8, seed=1)
    labels = torch.tensor([0, 4, 5, 2]) if labeled else None
    timesteps = [700, 0, 999, 30]
    found = model.extract_features(
        latents=clean, noise=noise, features=list_features(3), timesteps=timesteps, class_labels=labels
    )
    assert list(found) == list_features(3)
    for position, t in enumerate(timesteps):
        alpha, sigma = model.noise_schedule.alpha(t), model.noise_schedule.sigma(t)
        time = torch.full((4,), 1 - t / 1000 if noise_schedule else t)
        expected, _ = reference_dit(
            original_state(model),
            alpha * clean + sigma * noise,
            time,
            torch.full((4,), 5) if labels is None else labels,
            3,
        )
        for name, feature in found.items():
            assert feature.shape == (4, len(timesteps), 16, 24)
            torch.testing.assert_close(feature[:, position], expected[name], rtol=1e-5, atol=1e-5, msg=f"{name}, t={t}")


def test_denoise_equals_the_reference(model: Any, normal: Any, reference_dit: Any, original_state: Any) -> None:
    noisy, time, labels = normal(3, 2, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([5, 0, 3])
    _, expected = reference_dit(original_state(model), noisy, time, labels, 3)
    with torch.no_grad():
        found = model.denoise(noisy, time, labels)
    assert found.shape == noisy.shape
    torch.testing.assert_close(found, expected[:, :2], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.denoise(noisy[:1], 0, labels[:1]), found[:1])


def test_forward_is_the_configured_feature_and_its_mean(make_model: Any, normal: Any) -> None:
    model = make_model(feature="blocks.-2.mlp", timestep=321)
    images = normal(2, 2, 8, 8)
    with torch.no_grad():
        output = model(images)
    expected = model.extract_features(images, features=["blocks.1.mlp"], timesteps=[321])["blocks.1.mlp"][:, 0]
    assert torch.equal(output.last_hidden_state, expected)
    torch.testing.assert_close(output.pooler_output, expected.mean(1))
    with torch.no_grad():
        as_tuple = model(images, return_dict=False)
        other = model(latents=images, timestep=7, feature="blocks.0.key").last_hidden_state
    assert torch.equal(as_tuple[0], expected)
    found = model.extract_features(latents=images, features=["blocks.0.key"], timesteps=[7])["blocks.0.key"]
    assert torch.equal(other, found[:, 0])


def test_names_are_kept_as_asked_and_negative_blocks_count_from_the_end(model: Any, normal: Any) -> None:
    names = ["blocks.-1.hidden", "blocks.0.query", "blocks.2.hidden", "blocks.-3.query"]
    found = model.extract_features(normal(1, 2, 8, 8), features=names)
    assert list(found) == names
    assert torch.equal(found["blocks.-1.hidden"], found["blocks.2.hidden"])
    assert torch.equal(found["blocks.0.query"], found["blocks.-3.query"])


def test_timesteps_come_in_the_order_asked(model: Any, normal: Any) -> None:
    images, name = normal(2, 2, 8, 8), "blocks.1.query"
    together = model.extract_features(images, features=[name], timesteps=[900, 3, 900, 450])[name]
    for position, t in enumerate([900, 3, 900, 450]):
        alone = model.extract_features(images, features=[name], timesteps=[t])[name][:, 0]
        torch.testing.assert_close(together[:, position], alone)
    assert not torch.allclose(together[:, 0], together[:, 1], atol=1e-2)


def test_output_formats_agree(model: Any, normal: Any) -> None:
    images = normal(2, 2, 8, 12)
    options: dict[str, Any] = {"features": ["blocks.0.value"], "timesteps": [5, 50, 500]}
    tokens, maps, pooled = (
        model.extract_features(images, **options, output_format=output_format)["blocks.0.value"]
        for output_format in ("tokens", "map", "pooled")
    )
    assert tokens.shape == (2, 3, 24, 24)
    assert maps.shape == (2, 3, 24, 4, 6)
    assert torch.equal(maps[1, 2, :, 3, 1], tokens[1, 2, 3 * 6 + 1])
    torch.testing.assert_close(pooled, tokens.mean(2))


def test_features_carry_no_gradient_and_forward_does(model: Any, normal: Any) -> None:
    images = normal(1, 2, 8, 8)
    assert not model.extract_features(images)["blocks.1.query"].requires_grad
    model(images).last_hidden_state.sum().backward()
    assert model.layers[1].attention.q_proj.weight.grad.abs().sum() > 0


RUN_BEFORE = {
    "attention_norm": [],
    "query": ["attention.q_proj"],
    "key": ["attention.q_proj", "attention.k_proj"],
    "value": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "attention": ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention", "attention.o_proj"],
}
RUN_BEFORE["attention_gated"] = RUN_BEFORE["mlp_norm"] = RUN_BEFORE["attention"]
RUN_BEFORE["mlp"] = [*RUN_BEFORE["attention"], "mlp", "mlp.fc1", "mlp.fc2"]
RUN_BEFORE["mlp_gated"] = RUN_BEFORE["hidden"] = RUN_BEFORE["mlp"]
PARTS = RUN_BEFORE["hidden"]


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_nothing_after_the_deepest_feature_is_run(make_model: Any, normal: Any, kind: str) -> None:
    """Block 1 of 4 asked for, at two timesteps: block 0 whole, block 1 in part, blocks 2 and 3 not at all."""
    model = make_model(num_hidden_layers=4)
    calls = count_calls(model)
    names = ["blocks.0.query", f"blocks.1.{kind}", "blocks.1.attention_norm"]
    model.extract_features(normal(2, 2, 8, 8), features=names, timesteps=[10, 20])
    assert [calls[f"layers.{index}"] for index in range(4)] == [2, 2, 0, 0]
    assert all(calls[f"layers.0.{part}"] == 2 for part in PARTS)
    ran = {part for part in PARTS if calls[f"layers.1.{part}"]}
    assert ran == set(RUN_BEFORE[kind])
    assert calls["final_layer"] == 0


def test_forward_stops_early_too(model: Any, normal: Any) -> None:
    calls = count_calls(model)
    model(normal(1, 2, 8, 8), feature="blocks.0.query")
    assert [calls[f"layers.{index}"] for index in range(3)] == [1, 0, 0]
    assert calls["layers.0.attention"] == calls["layers.0.mlp"] == 0


# ------------------------------------------------------------------------------------------------------------- noise


def test_stored_noise_is_used_unless_noise_is_given(model: Any, normal: Any) -> None:
    images, options = normal(3, 2, 8, 8), {"features": ["blocks.2.hidden"], "timesteps": [600]}
    stored = model.extract_features(images, **options)["blocks.2.hidden"]
    for noise in (model.evaluation_noise[0], model.evaluation_noise, model.evaluation_noise.expand(3, -1, -1, -1)):
        torch.testing.assert_close(model.extract_features(images, noise=noise, **options)["blocks.2.hidden"], stored)
    other = model.extract_features(images, noise=normal(3, 2, 8, 8, seed=9), **options)["blocks.2.hidden"]
    assert (other - stored).abs().max() > 0.1


@pytest.mark.parametrize("labeled", [False, True])
def test_features_average_over_noise_draws(make_model: Any, normal: Any, labeled: bool) -> None:
    model = make_model(num_noise_draws=3)
    images, labels = normal(2, 2, 8, 8), torch.tensor([1, 4]) if labeled else None
    names = ["blocks.0.key", "blocks.2.hidden"]
    options: dict[str, Any] = {"features": names, "timesteps": [600, 20], "class_labels": labels}
    assert model.evaluation_noise.shape == (3, 2, 8, 8)
    draws = [model.extract_features(images, noise=noise, **options) for noise in model.evaluation_noise]
    averaged = model.extract_features(images, **options)
    for name in names:
        expected = torch.stack([draw[name] for draw in draws]).mean(0)
        torch.testing.assert_close(averaged[name], expected, rtol=1e-5, atol=1e-5)


def test_evaluation_noise_is_standard_normal_and_depends_on_its_seed_alone(make_model: Any) -> None:
    torch.manual_seed(1)
    noise = make_model(num_noise_draws=50).evaluation_noise
    torch.manual_seed(2)
    assert torch.equal(make_model(num_noise_draws=50).evaluation_noise, noise)
    assert not torch.equal(make_model(num_noise_draws=50, noise_seed=1).evaluation_noise, noise)
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_features_do_not_touch_or_read_the_global_generator(model: Any, normal: Any) -> None:
    images = normal(2, 2, 8, 12)
    torch.manual_seed(1)
    first, state = model.extract_features(images)["blocks.1.query"], torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(model.extract_features(images)["blocks.1.query"], first)


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def images(normal: Any) -> torch.Tensor:
    return normal(2, 2, 8, 8)


def all_features(model: Any, images: torch.Tensor) -> torch.Tensor:
    found = model.extract_features(images, features=list_features(3), timesteps=[30, 700])
    return torch.stack(list(found.values()))


@pytest.mark.parametrize("noise_schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("auto", [False, True], ids=["class", "AutoModel"])
def test_a_loaded_checkpoint_gives_the_same_numbers(
    make_model: Any, images: torch.Tensor, tmp_path: Path, noise_schedule: dict[str, Any], auto: bool
) -> None:
    model = make_model(noise_schedule=noise_schedule, num_noise_draws=2, noise_seed=3, feature="blocks.0.key")
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = (AutoModel if auto else ASelectDiTModel).from_pretrained(tmp_path)
    assert isinstance(loaded, ASelectDiTModel)
    assert not loaded.training
    assert torch.equal(all_features(loaded, images), all_features(model, images))
    assert torch.equal(loaded(images).pooler_output, model(images).pooler_output)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ASelectDiTConfig)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict() | {
        "architectures": ["ASelectDiTModel"],
        "dtype": "float32",
    }


def test_buffers_are_right_after_a_load_even_if_the_file_lacks_them(
    make_model: Any, reference_positions: Any, tmp_path: Path
) -> None:
    model = make_model(num_noise_draws=2, noise_seed=3)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {"position_embedding", "evaluation_noise"} <= set(weights)
    expected = dict(model.named_buffers())
    for stripped in (False, True):
        if stripped:
            weights.pop("position_embedding"), weights.pop("evaluation_noise")
            save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded = ASelectDiTModel.from_pretrained(tmp_path)
        assert set(dict(loaded.named_buffers())) == set(expected)
        for name, buffer in loaded.named_buffers():
            assert torch.equal(buffer, expected[name]), name
    torch.testing.assert_close(loaded.position_embedding, reference_positions(24, (4, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(make_model: Any, images: torch.Tensor, tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model(num_noise_draws=2)
    model.save_pretrained(tmp_path)
    loaded = ASelectDiTModel.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    expected, found = all_features(model, images), all_features(loaded, images.to(dtype))
    assert found.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.05
    assert (found.float() - expected).square().mean().sqrt() < tolerance * expected.square().mean().sqrt()
    assert all_features(loaded, images).dtype == dtype


def test_a_half_precision_checkpoint_keeps_exact_positions_and_noise(make_model: Any, tmp_path: Path) -> None:
    """What is derived from the config must not be rounded by a stay in bfloat16."""
    model = make_model()
    positions, noise = model.position_embedding.clone(), model.evaluation_noise.clone()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = ASelectDiTModel.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(loaded.position_embedding, positions, atol=4e-3, rtol=0)
    torch.testing.assert_close(loaded.evaluation_noise, noise, atol=2e-2, rtol=0)


@pytest.mark.parametrize("override", [{"num_noise_draws": 2}, {"noise_seed": 2}], ids=repr)
def test_noise_can_be_changed_at_load(make_model: Any, images: torch.Tensor, tmp_path: Path, override: Any) -> None:
    """The stored noise must never contradict the config that describes it."""
    make_model().save_pretrained(tmp_path)
    loaded = ASelectDiTModel.from_pretrained(tmp_path, **override)
    assert torch.equal(loaded.evaluation_noise, make_model(**override).evaluation_noise)
    assert torch.equal(all_features(loaded, images), all_features(make_model(**override), images))


def test_two_fresh_instances_with_one_seed_are_equal(make_config: Any) -> None:
    instances = []
    for _ in range(2):
        torch.manual_seed(5)
        instances.append(ASelectDiTModel(make_config()).state_dict())
    assert all(torch.equal(tensor, instances[1][name]) for name, tensor in instances[0].items())
    torch.manual_seed(6)
    assert not torch.equal(
        ASelectDiTModel(make_config()).patch_embedding.weight, instances[0]["patch_embedding.weight"]
    )


def test_a_fresh_network_is_adaln_zero(make_config: Any, images: torch.Tensor) -> None:
    """Every block is the identity, the prediction is zero, the timestep embedder is small: DiT's initialization."""
    model = ASelectDiTModel(make_config()).eval()
    assert all(not layer.modulation.weight.any() for layer in [*model.layers, model.final_layer])
    assert not model.final_layer.proj.weight.any()
    assert model.condition_embeddings[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)
    found = model.extract_features(images, features=["blocks.0.hidden", "blocks.2.hidden"])
    assert torch.equal(found["blocks.0.hidden"], found["blocks.2.hidden"])
    assert found["blocks.0.hidden"].abs().max() > 0.1
    assert not model.denoise(images, 50).any()


@pytest.mark.parametrize(("preset", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_presets_have_the_published_parameter_counts(preset: str, millions: int) -> None:
    with torch.device("meta"):
        model = ASelectDiTModel(ASelectDiTConfig.from_preset(f"DiT-{preset}/2"))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_presets_come_with_three_patch_sizes(patch: int) -> None:
    config = ASelectDiTConfig.from_preset(f"DiT-S/{patch}", num_condition_classes=10)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (384, 12, 6)
    assert (config.patch_size, config.num_condition_classes, config.num_patches) == (patch, 10, (32 // patch) ** 2)


# ------------------------------------------------------------------------------------------------ transformers' ways


@pytest.mark.parametrize("feature", ["blocks.2.hidden", "blocks.2.query", "blocks.1.mlp"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model: Any, images: torch.Tensor, feature: str) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        counter = count_calls(model)
        output = model(images, feature=feature)
        (output.last_hidden_state.square().mean() + model.denoise(images, 40).square().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        calls.append(counter["layers.0.mlp.fc1"])
    assert calls[1] > calls[0], "nothing was recomputed"
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_sdpa_equals_eager(make_model: Any, images: torch.Tensor) -> None:
    sdpa, eager = make_model(), make_model()
    eager.set_attn_implementation("eager")
    assert sdpa.config._attn_implementation == "sdpa"
    torch.testing.assert_close(all_features(sdpa, images), all_features(eager, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("by_config", [False, True], ids=["argument", "config"])
def test_hidden_states_are_recorded(make_model: Any, images: torch.Tensor, draws: int, by_config: bool) -> None:
    """The embedding and every block's output, one row per image, however early the chosen feature is."""
    model = make_model(num_noise_draws=draws, feature="blocks.0.query")
    expected = model.extract_features(images, features=[f"blocks.{index}.hidden" for index in range(3)])
    model.config.output_hidden_states = by_config
    with torch.no_grad():
        output = model(images) if by_config else model(images, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for recorded, feature in zip(output.hidden_states[1:], expected.values(), strict=True):
        torch.testing.assert_close(recorded, feature[:, 0], rtol=1e-5, atol=1e-5)
    query = model.extract_features(images, features=["blocks.0.query"])["blocks.0.query"][:, 0]
    torch.testing.assert_close(output.last_hidden_state, query)


def test_attentions_are_recorded(make_model: Any, images: torch.Tensor) -> None:
    model = make_model(feature="blocks.0.query")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(images, output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(2, 3, 16, 16)] * 3
    names = ["blocks.2.query", "blocks.2.key"]
    query, key = (
        x[:, 0].unflatten(-1, (3, 8)).transpose(1, 2) for x in model.extract_features(images, features=names).values()
    )
    torch.testing.assert_close(attentions[2], (query @ key.mT / 8**0.5).softmax(-1), rtol=1e-4, atol=1e-5)


def test_input_embeddings(model: Any) -> None:
    assert model.get_input_embeddings() is model.patch_embedding
    assert model.main_input_name == "pixel_values"


# ------------------------------------------------------------------------------------------------------- resolutions


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (4, 8), (6, 2)], ids=str)
def test_other_resolutions_interpolate_positions_and_say_so(
    model: Any,
    normal: Any,
    reference_dit: Any,
    original_state: Any,
    reference_positions: Any,
    caplog: pytest.LogCaptureFixture,
    size: tuple[int, int],
) -> None:
    clean, noise = normal(2, 2, *size), normal(2, 2, *size, seed=1)
    grid = (size[0] // 2, size[1] // 2)
    state = original_state(model) | {"pos_embed": reference_positions(24, grid, trained=(4, 4))}
    noisy = model.noise_schedule.alpha(100) * clean + model.noise_schedule.sigma(100) * noise
    expected, prediction = reference_dit(state, noisy, torch.full((2,), 100), torch.full((2,), 5), 3)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        found = model.extract_features(clean, noise=noise, features=["blocks.2.hidden"])["blocks.2.hidden"]
    assert f"{grid[0]}x{grid[1]}" in caplog.text
    assert "interpolated" in caplog.text
    torch.testing.assert_close(found[:, 0], expected["blocks.2.hidden"], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.denoise(noisy, 100), prediction[:, :2], rtol=1e-5, atol=1e-5)


def test_the_trained_resolution_does_not_warn(
    model: Any, images: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        model.extract_features(images)
    assert not caplog.records


def test_noise_of_another_resolution_is_stored_in_effect(make_model: Any, normal: Any) -> None:
    """Drawn from the model's seed: the same for every image and call, another for another seed."""
    image = normal(1, 2, 12, 8)
    found = make_model().extract_features(image.expand(2, -1, -1, -1))["blocks.1.query"]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(make_model().extract_features(image)["blocks.1.query"][0], found[0])
    assert not torch.allclose(
        make_model(noise_seed=1).extract_features(image)["blocks.1.query"][0], found[0], atol=1e-2
    )


def test_positions_are_those_of_the_original_dit(reference_positions: Any) -> None:
    for grid, trained in (((3, 3), (3, 3)), ((4, 7), (4, 7)), ((5, 2), (4, 4))):
        found = sincos_positions(24, grid, trained)
        torch.testing.assert_close(found, reference_positions(24, grid, trained), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- VAE


@pytest.fixture(params=["tiny_kl", "tiny_taesd"])
def vae(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def make_latent_model(make_model: Any, vae: Any) -> Any:
    """A network on 4 x 8 x 8 latents with the weights of `vae` inside."""

    def build(**overrides: Any) -> ASelectDiTModel:
        model = make_model(vae_config=vae_fields(vae), num_channels=4, **overrides)
        model.vae.load_state_dict(vae.state_dict(), strict=model.config.vae_decoder)
        return model

    return build


def encode_by_hand(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior mean, shifted and scaled, from the autoencoder's own layers."""
    hidden = vae.encoder(pixels)
    mean = vae.quant_conv(hidden).chunk(2, dim=1)[0] if hasattr(vae, "quant_conv") else hidden
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


def test_pixels_are_encoded_to_the_scaled_posterior_mean(make_latent_model: Any, vae: Any, normal: Any) -> None:
    model, pixels = make_latent_model(), normal(2, 3, 16, 16).clamp(-1, 1)
    assert model.config.image_size == 16
    with torch.no_grad():
        latents = encode_by_hand(vae, pixels)
        torch.testing.assert_close(model.encode(pixels), latents)
    assert latents.shape == (2, 4, 8, 8)
    from_pixels, from_latents = model.extract_features(pixels), model.extract_features(latents=latents)
    torch.testing.assert_close(from_pixels["blocks.1.query"], from_latents["blocks.1.query"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [False, True])
def test_the_vae_may_have_a_dtype_and_memory_format_of_its_own(
    make_latent_model: Any, vae: Any, normal: Any, head: bool
) -> None:
    model, pixels = make_latent_model(), normal(2, 3, 16, 16).clamp(-1, 1)
    if head:
        owner = ASelectDiTForImageClassification(model.config).eval()
        owner.dit.load_state_dict(model.state_dict())
        model = owner.dit
    with torch.no_grad():
        precise, tokens = model.encode(pixels), model(pixels).last_hidden_state
        model.vae.to(torch.bfloat16, memory_format=torch.channels_last)
        fast, log_variance = model.encode_posterior(pixels)
        assert fast.dtype == torch.float32
        assert log_variance is None or log_variance.dtype == torch.float32
        assert 0 < (fast - precise).abs().max() < 0.05 * precise.abs().max()
        found = model(pixels).last_hidden_state
        assert found.dtype == torch.float32
        assert 0 < (found - tokens).abs().max() < 0.05 * tokens.abs().max()
        by_hand = model.vae.encode(pixels.bfloat16())
        mean = by_hand.latents if hasattr(by_hand, "latents") else by_hand.latent_dist.mean
        expected = (mean.float() - vae.config.shift_factor) * vae.config.scaling_factor
        assert torch.equal(fast, expected), "shifted and scaled in float32"


def test_latents_skip_the_vae(make_latent_model: Any, normal: Any) -> None:
    model = make_latent_model()
    calls = count_calls(model)
    model.extract_features(latents=normal(1, 4, 8, 8))
    assert not any(name.startswith("vae") for name in calls)
    model.extract_features(normal(1, 3, 16, 16), timesteps=[1, 2, 3])
    assert calls["vae.encoder"] == 1, "pixels are encoded once, whatever the number of timesteps"


def test_only_the_encoder_is_kept_unless_asked(make_latent_model: Any, vae: Any, normal: Any, tmp_path: Path) -> None:
    latents = normal(1, 4, 8, 8)
    encoder_only, whole = make_latent_model(), make_latent_model(vae_decoder=True)
    assert not any(".decoder." in name or "post_quant" in name for name in encoder_only.state_dict())
    with pytest.raises(ValueError, match="vae_decoder"):
        encoder_only.decode(latents)
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        torch.testing.assert_close(whole.decode(latents), expected)
    for name, model in (("encoder", encoder_only), ("whole", whole)):
        model.save_pretrained(tmp_path / name)
        loaded = ASelectDiTModel.from_pretrained(tmp_path / name)
        assert set(loaded.state_dict()) == set(model.state_dict())
        pixels = normal(1, 3, 16, 16)
        assert torch.equal(loaded.encode(pixels), model.encode(pixels))


def test_a_vae_that_was_trained_is_not_initialized_again(make_latent_model: Any, vae: Any, tmp_path: Path) -> None:
    make_latent_model().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).vae.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in vae.state_dict().items() if name in loaded)


def test_a_model_with_a_vae_in_half_precision(make_latent_model: Any, normal: Any) -> None:
    model = make_latent_model().to(torch.bfloat16)
    assert torch.isfinite(model.extract_features(normal(1, 3, 16, 16))["blocks.1.query"]).all()


def test_pixels_of_a_latent_model_are_checked(make_latent_model: Any, normal: Any) -> None:
    model = make_latent_model()
    with pytest.raises(ValueError, match=r"pixel_values must be \(batch, 3"):
        model(normal(1, 4, 16, 16))
    with pytest.raises(ValueError, match=r"latents must be \(batch, 4"):
        model(latents=normal(1, 3, 8, 8))
    with pytest.raises(ValueError, match="multiples of 4"):
        model(normal(1, 3, 16, 18))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"pixel_values": torch.zeros(1, 2, 8, 8), "latents": torch.zeros(1, 2, 8, 8)}, "exactly one"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, r"pixel_values must be \(batch, 2.*\(1, 3, 8, 8\)"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"latents must be \(batch, 2"),
        ({"pixel_values": torch.zeros(2, 8, 8)}, "pixel_values must be"),
        ({"pixel_values": torch.zeros(1, 2, 8, 9)}, "multiples of 2"),
        ({"pixel_values": torch.zeros(1, 2, 8, 8).fill_(torch.nan)}, "NaN"),
        ({"latents": torch.zeros(1, 2, 8, 8).fill_(torch.inf)}, "NaN or infinite"),
        ({"pixel_values": torch.zeros(1, 2, 8, 8, dtype=torch.uint8)}, "pixel_values must be floats, got torch.uint8"),
        ({"latents": torch.zeros(1, 2, 8, 8, dtype=torch.int64)}, "latents must be floats, got torch.int64"),
        ({"class_labels": torch.tensor([6, 0])}, r"class_labels.*0\.\.5"),
        ({"class_labels": torch.tensor([-1, 0])}, "class_labels"),
        ({"class_labels": torch.tensor([1])}, r"class_labels must be 2 integers"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
@pytest.mark.parametrize("method", ["forward", "extract_features"])
def test_bad_inputs_are_named(make_model: Any, method: str, arguments: dict[str, Any], message: str) -> None:
    if "class_labels" in arguments:
        arguments = arguments | {"pixel_values": torch.zeros(2, 2, 8, 8)}
    for draws in (1, 2):
        with pytest.raises(ValueError, match=message):
            getattr(make_model(num_noise_draws=draws), method)(**arguments)


@pytest.mark.parametrize("feature", ["blocks.3.query", "blocks.-4.query", "blocks.0.queries", "query"])
def test_unknown_features_are_refused(model: Any, images: torch.Tensor, feature: str) -> None:
    for call in (
        lambda: model(images, feature=feature),
        lambda: model.extract_features(images, features=["blocks.0.query", feature]),
        lambda: ASelectDiTConfig(num_hidden_layers=3, feature=feature),
    ):
        with pytest.raises(ValueError, match=feature):
            call()


@pytest.mark.parametrize("features", ["blocks.0.query", []])
def test_features_must_be_a_list(model: Any, images: torch.Tensor, features: Any) -> None:
    with pytest.raises(ValueError, match="non-empty list"):
        model.extract_features(images, features=features)


@pytest.mark.parametrize("timestep", [-1, 1000, 0.5, 1.0, 50.5])
def test_timesteps_off_the_axis_are_refused(model: Any, images: torch.Tensor, timestep: Any) -> None:
    for call in (
        lambda: model(images, timestep=timestep),
        lambda: model.extract_features(images, timesteps=[5, timestep]),
        lambda: model.denoise(images, timestep),
    ):
        with pytest.raises(ValueError, match=r"timestep.*0\.\.999"):
            call()


def test_timesteps_and_formats_are_checked(model: Any, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        model.extract_features(images, timesteps=[])
    with pytest.raises(ValueError, match="output_format"):
        model.extract_features(images, output_format="cls")


def test_denoise_checks_its_input(model: Any) -> None:
    with pytest.raises(ValueError, match="noisy_latents"):
        model.denoise(torch.zeros(1, 3, 8, 8), 50)
    with pytest.raises(ValueError, match="NaN"):
        model.denoise(torch.full((1, 2, 8, 8), torch.nan), 50)
    with pytest.raises(ValueError, match="class_labels"):
        model.denoise(torch.zeros(1, 2, 8, 8), 50, torch.tensor([6]))


def test_a_model_without_a_timestep_says_which_it_uses(
    make_model: Any, images: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(timestep=None)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        found = model(images).last_hidden_state
    assert "t=100" in caplog.text
    assert torch.equal(found, model(images, timestep=100).last_hidden_state)


KL = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "latent_channels": 2}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": 28}, ["hidden_size", "num_attention_heads"]),
        ({"hidden_size": 18}, ["hidden_size"]),
        ({"hidden_size": 0}, ["hidden_size"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"num_attention_heads": -3}, ["num_attention_heads"]),
        ({"sample_size": 9}, ["sample_size", "patch_size"]),
        ({"sample_size": 8.5}, ["sample_size"]),
        ({"patch_size": 3}, ["sample_size", "patch_size"]),
        ({"num_channels": 2**20}, ["num_channels"]),
        ({"image_size": 9}, ["image_size", "sample_size"]),
        ({"mlp_ratio": 0}, ["mlp_ratio"]),
        ({"mlp_ratio": -2.0}, ["mlp_ratio"]),
        ({"hidden_act": "no-such-activation"}, ["hidden_act"]),
        ({"num_condition_classes": -1}, ["num_condition_classes"]),
        ({"num_noise_draws": 0}, ["num_noise_draws"]),
        ({"timestep": 1000}, ["timestep"]),
        ({"timestep": -1}, ["timestep"]),
        ({"timestep": 300, "noise_schedule": {"num_train_timesteps": 250}}, ["timestep", "249"]),
        ({"feature": "blocks.3.query"}, ["blocks.3.query"]),
        ({"noise_schedule": {"type": "edm"}}, ["noise_schedule"]),
        ({"noise_schedule": {"betas": 3}}, ["betas"]),
        ({"vae_config": KL | {"latent_channels": 4}}, ["num_channels", "latent_channels"]),
        ({"vae_config": KL, "image_size": 8}, ["image_size", "sample_size"]),
        ({"vae_config": KL | {"_class_name": "VQModel"}}, ["vae_config", "VQModel"]),
        ({"vae_config": {"_class_name": "VQModel", "latent_channels": 2}}, ["vae_config", "VQModel"]),
        ({"vae_config": {"_class_name": "AutoencoderKL", "latent_channels": 2}}, ["vae_config", "block_out_channels"]),
    ],
    ids=repr,
)
def test_contradicting_config_fields_are_named(make_config: Any, fields: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make_config(**fields)
    assert all(name in str(caught.value) for name in named)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"DiT-XL/3.*DiT-XL/2"):
        ASelectDiTConfig.from_preset("DiT-XL/3")


def test_config_round_trip(make_config: Any, tmp_path: Path) -> None:
    config = make_config(vae_config=KL, timestep=7, feature="blocks.-1.hidden", selection={"method": "hfr"})
    config.save_pretrained(tmp_path)
    loaded = ASelectDiTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() | {"transformers_version": loaded.transformers_version}
    assert loaded.model_type == "aselect_dit"
    assert copy.deepcopy(config).to_dict() == config.to_dict()


# --------------------------------------------------------------------------------------------------- image processor


def picture(mode: str, size: tuple[int, int] = (23, 17)) -> Image.Image:
    """A color gradient in any PIL mode."""
    width, height = size
    red = np.tile(np.linspace(0, 255, width), (height, 1))
    green = np.tile(np.linspace(255, 0, height)[:, None], (1, width))
    image = Image.fromarray(np.stack([red, green, np.full_like(red, 128)], -1).astype(np.uint8))
    return image.quantize(64) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "YCbCr", "HSV"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_become_pixel_values(make_config: Any, mode: str, channels: int) -> None:
    processor = make_image_processor(make_config(num_channels=channels))
    pixels = processor([picture(mode), picture(mode, (9, 30)).convert(mode)], return_tensors="pt").pixel_values
    assert pixels.shape == (2, channels, 8, 8)
    assert pixels.dtype == torch.float32
    assert bool(((pixels >= -1) & (pixels <= 1)).all())
    assert pixels.std() > 0.1
    same = processor(picture(mode).convert("RGB").convert("L" if channels == 1 else "RGB"), return_tensors="pt")
    torch.testing.assert_close(pixels[:1], same.pixel_values, atol=0.03, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_black_and_white_span_minus_one_to_one(make_config: Any, channels: int) -> None:
    processor = make_image_processor(make_config(num_channels=channels))
    for color, value in ((0, -1.0), (255, 1.0)):
        pixels = processor(Image.new("RGB", (10, 8), (color,) * 3), return_tensors="pt").pixel_values
        assert pixels.unique().tolist() == pytest.approx([value])


def test_color_becomes_luminance(make_config: Any) -> None:
    processor = make_image_processor(make_config(num_channels=1))
    for color, luminance in (((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29)):
        expected = pytest.approx(luminance / 127.5 - 1, abs=0.01)
        assert processor(Image.new("RGB", (8, 8), color), return_tensors="pt").pixel_values.mean() == expected
        array = np.full((8, 8, 3), color, dtype=np.uint8)
        assert processor(array, return_tensors="pt").pixel_values.mean() == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_the_shortest_edge_is_resized_and_the_centre_cropped(make_config: Any, channels: int) -> None:
    """A wide image whose outer thirds are white and whose center is black: only the center is seen, undistorted."""
    image = Image.new("RGB", (48, 16), (255, 255, 255))
    image.paste((0, 0, 0), (16, 0, 32, 16))
    processor = make_image_processor(make_config(num_channels=channels))
    for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
        pixels = processor(turned, return_tensors="pt").pixel_values
        assert bool((pixels[..., 1:-1, 1:-1] < -0.9).all())


def test_the_processor_follows_the_model(make_config: Any, make_model: Any, tiny_kl: Any) -> None:
    config = make_config(vae_config=vae_fields(tiny_kl), num_channels=4)
    pixels = make_image_processor(config)(picture("RGB"), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 16, 16)
    model = make_model(vae_config=vae_fields(tiny_kl), num_channels=4)
    assert model(pixels).last_hidden_state.shape == (1, 16, 24)
    with pytest.raises(ValueError, match="4 channels"):
        make_image_processor(make_config(num_channels=4))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_saved_processor_loads_through_auto(make_config: Any, tmp_path: Path, channels: int) -> None:
    processor = make_image_processor(make_config(num_channels=channels))
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    image = picture("RGB")
    expected = processor(image, return_tensors="pt").pixel_values
    assert torch.equal(loaded(image, return_tensors="pt").pixel_values, expected)


def test_a_checkpoint_of_another_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit", "hidden_size": 16}')
    with pytest.raises(ValueError, match="model of type 'vit', not 'aselect_dit'"):
        ASelectDiTModel.from_pretrained(tmp_path)
