"""Shared builders: tiny networks with random weights (a fresh adaLN-Zero DiT is the identity) and a reference DiT."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from aselect_hf import ASelectDiTConfig, ASelectDiTModel

settings.register_profile("tests", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("tests")

State = dict[str, torch.Tensor]

TINY: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "patch_size": 2,
    "sample_size": 8,
    "num_channels": 2,
    "num_condition_classes": 5,
    "timestep": 100,
}

TINY_KL: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    """Let every test see the warnings that are given only once."""
    transformers_logging.warning_once.cache_clear()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(num_bytes)`: a folder on a file system of its own; skips where mounting is refused."""
    mounted: list[Path] = []

    def mount(num_bytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs the right to mount a small file system ({error})")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def train_dir(tmp_path: Path) -> Path:
    """A folder of dark images `a` and light images `b`."""
    generator = np.random.default_rng(0)
    for index in range(24):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.clip(generator.normal(60 + 120 * (index % 2), 20, (8, 8)), 0, 255)
        Image.fromarray(values.astype(np.uint8)).save(path)
    return tmp_path / "images"


@torch.no_grad()
def _randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module.eval()


@pytest.fixture(scope="session")
def randomize() -> Callable[..., Any]:
    """`randomize(module, seed=0)`: every parameter drawn anew, so that no gate is zero; in evaluation mode."""
    return _randomize


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ASelectDiTConfig]:
    """`make_config(**overrides)`: a 3-block, 2-channel, 4 x 4 patch configuration."""
    return lambda **overrides: ASelectDiTConfig(**(TINY | overrides))


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., ASelectDiTConfig]) -> Callable[..., ASelectDiTModel]:
    """`make_model(seed=0, **overrides)`: a network of `make_config` with random weights."""

    def build(seed: int = 0, **overrides: Any) -> ASelectDiTModel:
        return _randomize(ASelectDiTModel(make_config(**overrides)), seed)

    return build


@pytest.fixture
def model(make_model: Callable[..., ASelectDiTModel]) -> ASelectDiTModel:
    return make_model()


@pytest.fixture(scope="session")
def normal() -> Callable[..., torch.Tensor]:
    """`normal(*shape, seed=0)`: standard normal numbers from their own generator."""
    return lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny_kl() -> Any:
    """A tiny `AutoencoderKL` (downsampling 2) with both a scale and a shift factor."""
    from diffusers import AutoencoderKL

    return _randomize(AutoencoderKL(**TINY_KL, scaling_factor=0.2, shift_factor=0.1), seed=7)


@pytest.fixture
def tiny_taesd() -> Any:
    """A tiny `AutoencoderTiny` (downsampling 2) with both a scale and a shift factor."""
    from diffusers import AutoencoderTiny

    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return _randomize(AutoencoderTiny(**channels, **blocks, scaling_factor=1.5, shift_factor=0.25), seed=7)


def _positions(width: int, grid_size: tuple[int, int], trained: tuple[int, int] | None = None) -> torch.Tensor:
    """The original DiT's `get_2d_sincos_pos_embed` in numpy, on any grid stretched over the trained one."""
    trained = trained or grid_size

    def encode(position: np.ndarray) -> np.ndarray:
        omega = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
        angles = position.reshape(-1)[:, None] * omega[None]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows = np.arange(grid_size[0]) * trained[0] / grid_size[0]
    columns = np.arange(grid_size[1]) * trained[1] / grid_size[1]
    grid = np.meshgrid(columns, rows)
    return torch.from_numpy(np.concatenate([encode(grid[0]), encode(grid[1])], axis=1))[None].float()


@pytest.fixture(scope="session")
def reference_positions() -> Callable[..., torch.Tensor]:
    return _positions


def _dit(
    state: State, noisy: torch.Tensor, time: torch.Tensor, labels: torch.Tensor, heads: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The original DiT's forward pass on its own state dict: every named feature, and the whole output."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()

    def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * (1 + scale[:, None]) + shift[:, None]

    weight = state["x_embedder.proj.weight"]
    patch, (batch, _, height, width) = weight.shape[-1], noisy.shape
    x = F.conv2d(noisy, weight, state["x_embedder.proj.bias"], stride=patch).flatten(2).mT + state["pos_embed"]
    angles = time.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    embedded = linear(
        "t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1)))
    )
    condition = F.silu(embedded + state["y_embedder.embedding_table.weight"][labels])

    features, block = {}, 0
    while f"blocks.{block}.attn.qkv.weight" in state:
        name = f"blocks.{block}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", condition).chunk(6, 1)
        attention_norm = modulate(norm(x), shift1, scale1)
        query, key, value = linear(f"{name}.attn.qkv", attention_norm).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        attention = linear(f"{name}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        attention_gated = gate1[:, None] * attention
        x = x + attention_gated
        mlp_norm = modulate(norm(x), shift2, scale2)
        mlp = linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", mlp_norm), approximate="tanh"))
        mlp_gated = gate2[:, None] * mlp
        x = x + mlp_gated
        found = {"attention_norm": attention_norm, "query": query, "key": key, "value": value, "attention": attention}
        found |= {"attention_gated": attention_gated, "mlp_norm": mlp_norm, "mlp": mlp, "mlp_gated": mlp_gated}
        features |= {f"{name}.{kind}": feature for kind, feature in (found | {"hidden": x}).items()}
        block += 1
    shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2, 1)
    patches = linear("final_layer.linear", modulate(norm(x), shift, scale))
    patches = patches.reshape(batch, height // patch, width // patch, patch, patch, -1)
    return features, torch.einsum("nhwpqc->nchpwq", patches).reshape(batch, -1, height, width)


@pytest.fixture(scope="session")
def reference_dit() -> Callable[..., tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """`reference_dit(state, noisy, time, labels, heads)`: features by name and the whole output of an original DiT."""
    return _dit


@pytest.fixture(scope="session")
def original_state() -> Callable[[ASelectDiTModel], State]:
    """`original_state(model)`: the weights of one of our networks, under the original DiT's names."""

    def rename(model: ASelectDiTModel) -> State:
        condition = model.condition_embeddings[0]
        modules = {
            "x_embedder.proj": model.patch_embedding,
            "t_embedder.mlp.0": condition.fc1,
            "t_embedder.mlp.2": condition.fc2,
            "y_embedder.embedding_table": condition.class_embedding,
            "final_layer.adaLN_modulation.1": model.final_layer.modulation,
            "final_layer.linear": model.final_layer.proj,
        }
        state = {"pos_embed": _positions(model.config.hidden_size, model.config.grid_size)}
        for index, layer in enumerate(model.layers):
            name, attention = f"blocks.{index}", layer.attention
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            state[f"{name}.attn.qkv.weight"] = torch.cat([projection.weight for projection in projections])
            state[f"{name}.attn.qkv.bias"] = torch.cat([projection.bias for projection in projections])
            modules |= {
                f"{name}.attn.proj": attention.o_proj,
                f"{name}.mlp.fc1": layer.mlp.fc1,
                f"{name}.mlp.fc2": layer.mlp.fc2,
                f"{name}.adaLN_modulation.1": layer.modulation,
            }
        for name, module in modules.items():
            state |= {f"{name}.{leaf}": tensor for leaf, tensor in module.named_parameters()}
        return {name: tensor.detach() for name, tensor in state.items()}

    return rename
