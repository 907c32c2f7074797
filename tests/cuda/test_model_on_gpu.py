"""The same numbers on a GPU as on the CPU: features, fixed models, caches, and what half precision may change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close as close

from aselect_hf import ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation, ASelectDiTModel
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import cached_latents

NAMES = ["blocks.0.query", "blocks.1.attention", "blocks.-1.hidden"]
STEPS = [0, 100, 900]
EXACT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "check_device": False}


def twin(model: Any, device: torch.device) -> Any:
    return copy.deepcopy(model).to(device)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", [{}, {"type": "flow_matching", "model_time": "data_fraction"}])
def test_features_are_those_of_the_cpu(
    make_model: Any, normal: Any, device: torch.device, attention: str, schedule: dict[str, Any]
) -> None:
    model = make_model(num_noise_draws=2, noise_schedule=schedule)
    model.set_attn_implementation(attention)
    moved, images = twin(model, device), normal(3, 2, 8, 8)
    assert torch.equal(moved.evaluation_noise.cpu(), model.evaluation_noise)
    expected = model.extract_features(images, features=NAMES, timesteps=STEPS)
    found = moved.extract_features(images.to(device), features=NAMES, timesteps=STEPS)
    for name in NAMES:
        assert found[name].device.type == device.type
        close(found[name], expected[name], **EXACT)


def test_another_resolution_draws_the_same_noise(make_model: Any, normal: Any, device: torch.device) -> None:
    model, images = make_model(), normal(2, 2, 12, 12)
    with torch.no_grad():
        close(twin(model, device)(images.to(device)).last_hidden_state, model(images).last_hidden_state, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(make_model: Any, normal: Any, device: torch.device, dtype: torch.dtype) -> None:
    model, images = make_model(), normal(3, 2, 8, 8)
    near: dict[str, Any] = {"rtol": 0.05, "atol": 0.05, "check_device": False, "check_dtype": False}
    with torch.no_grad():
        expected = model(images).last_hidden_state
        close(twin(model, device).to(dtype)(images.to(device)).last_hidden_state, expected, **near)
        with torch.autocast(device.type, dtype=dtype):
            close(twin(model, device)(images.to(device)).last_hidden_state, expected, **near)


def test_denoises_as_on_the_cpu(make_model: Any, normal: Any, device: torch.device) -> None:
    model, images, steps = make_model(), normal(3, 2, 8, 8), torch.tensor([1, 400, 999])
    labels = torch.tensor([0, 4, 5])
    with torch.no_grad():
        found = twin(model, device).denoise(images.to(device), steps.to(device), labels.to(device))
        close(found, model.denoise(images, steps, labels), **EXACT)
        close(twin(model, device).denoise(images.to(device), 400), model.denoise(images, 400), **EXACT)


@pytest.mark.parametrize("kind", ["query", "attention", "hidden"])
def test_a_model_is_fixed_on_the_gpu(make_model: Any, normal: Any, device: torch.device, kind: str) -> None:
    model, images, feature = make_model(num_noise_draws=2), normal(3, 2, 8, 8), f"blocks.1.{kind}"
    with torch.no_grad():
        expected = model(images, timestep=50, feature=feature).last_hidden_state
        fixed = twin(model, device).fix_timestep(50, feature, class_label=None)
        assert fixed.device.type == device.type
        close(fixed(images.to(device)).last_hidden_state, expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_onto_the_gpu(
    make_model: Any, normal: Any, device: torch.device, tmp_path: Path, dtype: torch.dtype
) -> None:
    model, images = make_model(), normal(2, 2, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = ASelectDiTModel.from_pretrained(tmp_path, device_map=device.type, dtype=dtype)
    assert {x.device.type for x in (*loaded.parameters(), *loaded.buffers())} == {device.type}
    near = EXACT if dtype == torch.float32 else EXACT | {"rtol": 0.05, "atol": 0.05, "check_dtype": False}
    with torch.no_grad():
        close(loaded(images.to(device)).last_hidden_state, model(images).last_hidden_state, **near)
    other = ASelectDiTModel.from_pretrained(tmp_path, device_map=device.type, noise_seed=3, num_noise_draws=2)
    assert other.evaluation_noise.device.type == device.type


def test_latents_are_cached_from_the_gpu(
    make_model: Any, tiny_kl: Any, normal: Any, device: torch.device, tmp_path: Path
) -> None:
    config = {name: x for name, x in dict(tiny_kl.config).items() if x is not None}
    model = make_model(num_channels=4, vae_config=config | {"_class_name": "AutoencoderKL"})
    model.vae.load_state_dict(tiny_kl.state_dict(), strict=False)
    moved, pixels = twin(model, device), normal(5, 3, 16, 16).clamp(-1, 1)
    cache = cached_latents(
        moved, ImageData.of(pixels), flipped=True, log_variance=True, cache_dir=tmp_path, batch_size=2, progress=False
    )
    with torch.no_grad():
        mean, log_variance = model.encode_posterior(pixels)
        close(cache.gather(range(5)), mean, **EXACT)
        close(cache.log_variance(range(5)), log_variance, **EXACT)
        close(cache.gather([1], flipped=[True]), model.encode(pixels[1:2].flip(-1)), **EXACT)
        found = moved(latents=cache.gather(range(5)).to(device)).last_hidden_state
        close(found, model(pixels).last_hidden_state, **EXACT)


@pytest.mark.parametrize("head", ["linear", "upernet", "mean", "attentive"])
def test_heads_give_the_same_loss_and_gradients(
    make_config: Any, randomize: Any, normal: Any, device: torch.device, head: str
) -> None:
    masks = head in ("linear", "upernet")
    options: dict[str, Any] = {"segmentation_head": head} if masks else {"pooling": head}
    kind: Any = ASelectDiTForSemanticSegmentation if masks else ASelectDiTForImageClassification
    model = randomize(kind(make_config(num_labels=3, segmentation_head_channels=16, **options)))
    moved, images = twin(model, device), normal(2, 2, 8, 8)
    labels = torch.arange(2 * 64).view(2, 8, 8) % 3 if masks else torch.tensor([0, 2])
    expected, found = model(images, labels=labels), moved(images.to(device), labels=labels.to(device))
    close(found.logits, expected.logits, **EXACT)
    expected.loss.backward()
    found.loss.backward()
    for (name, one), other in zip(model.named_parameters(), moved.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            close(other.grad, one.grad, **(EXACT | {"rtol": 1e-3}))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(
    make_model: Any, normal: Any, device: torch.device, reentrant: bool
) -> None:
    model, images = make_model().to(device).train(), normal(2, 2, 8, 8).to(device).requires_grad_()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            model(images, feature="blocks.-1.hidden").last_hidden_state.float().square().mean().backward()
        return [x.grad.clone() for x in model.parameters() if x.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one, other in zip(plain, gradients(), strict=True):
        close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
def test_compiles_without_a_graph_break(make_model: Any, normal: Any, device: torch.device, fixed: bool) -> None:
    model, images = make_model().to(device), normal(3, 2, 8, 8).to(device)
    model = model.fix_timestep(feature="blocks.1.mlp") if fixed else model
    torch.compiler.reset()
    backend = "inductor" if device.type == "cuda" else "eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    with torch.no_grad():
        close(compiled(images).last_hidden_state, model(images).last_hidden_state, rtol=1e-3, atol=1e-3)
