"""A pair with a planted optimum: textures, and a DiT whose weights are set so that they can be told around one t only.

    python -m benchmarks.selection.planted ROOT/planted ROOT/planted-dit

Images (32 x 32, gray). The class is the orientation of a texture of random phase, frequency and strength: upright,
lying, or either diagonal, so that mirrors and crops keep it. No mean of a linear map of the pixels tells classes apart;
energies in frequency bands do. Everything else is nuisance: a second texture of another class, finer textures that no
class has, a background gradient, pixel noise.

Network (`blocks.1` carries the plant, the other blocks are the identity). The patch embedding projects 4 x 4 patches
on their 16 Fourier filters, in channels where positions hardly vary, beside two large constants that make every
LayerNorm nearly linear. Hidden units of block 1's MLP rectify filters: `gelu(x) + gelu(-x)`. Its output channels hold
the energy of a band that tells classes apart plus that of a fine one that does not, and adaLN scales the former's
filters by a bump over t, least squares on the random timestep embedding. (A gate alone would hide nothing: probes
standardize.) So the class drowns in nuisance away from `TIMESTEP` in `mlp`, in `hidden`, and in all that later blocks
read; what precedes that MLP knows only linear maps. Towards large t the noise does the rest. The bump is symmetric in
the square root of t, in which the candidates are evenly spaced.

Accuracy of a ridge probe on 1,000 images, 1,000 validate (chance: 33 %): 34 % at t = 0, 70 % at 42, 88 % at 129, 86 %
at 168, 69 % at 318, 37 % at 515. Without the fine bands it would be 99 % at t = 0 and fall from there.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from aselect_hf import ASelectDiTConfig, ASelectDiTModel
from aselect_hf.conversion import save_model
from aselect_hf.files import atomic_directory
from aselect_hf.modeling.blocks import FREQUENCY_CHANNELS, MAX_PERIOD

CLASSES = ("upright", "lying", "diagonal")
SIZES = {"train": 2000, "validation": 1000, "test": 1000}
SIDE, PATCH = 32, 4
TIMESTEP = 150
BUMP_WIDTH = 5.0  # standard deviation, of sqrt(t)
FASTEST = 0.05  # radians per timestep, of the sinusoids that the timestep embedding reads
CONSTANT = 20.0
SHARPNESS = 2.0  # of the rectifier: energies below 1 / SHARPNESS, magnitudes above
COARSE_BANDS = ((0, 1), (1, 0), (1, 1), (1, -1))  # cycles per patch, vertically and horizontally
FINE_BANDS = ((2, 1), (1, 2), (2, 2), (2, 0))
FINE_WEIGHT = 0.35
SECOND = 0.5  # strength of the second texture, at most, over that of the first
CONFIG = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2, "patch_size": PATCH,
    "sample_size": SIDE, "num_channels": 1, "num_condition_classes": 0, "learned_sigma": False,
    "feature": "blocks.1.hidden",
}  # fmt: skip


def textures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `(count, 32, 32)` uint8, and as many labels, as even as can be."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.arange(count) % len(CLASSES))
    others = (labels + draw.integers(1, len(CLASSES), count)) % len(CLASSES)
    strength = draw.uniform(0.12, 0.3, count)
    images = _gradient(draw, count)
    images += strength[:, None, None] * _texture(draw, labels)
    images += (strength * draw.uniform(0, SECOND, count))[:, None, None] * _texture(draw, others)
    for rows, columns in FINE_BANDS:
        amplitude = 0.12 * draw.lognormal(0, 0.5, (count, 1, 1))
        images += amplitude * _wave(draw, np.full(count, rows / PATCH), np.full(count, columns / PATCH))
    images += draw.normal(0, 0.08, images.shape)
    return (127.5 + 127.5 * images).clip(0, 255).round().astype(np.uint8), labels


def _texture(draw: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """A wave of about a cycle per patch, `(images, height, width)`, in the orientation of its class."""
    angles = np.array([0, math.pi / 2, math.pi / 4])[labels] * np.where(draw.random(len(labels)) < 0.5, 1, -1)
    angles = angles + draw.normal(0, 0.12, len(labels))
    lengths = np.where(labels == CLASSES.index("diagonal"), math.sqrt(2), 1)  # a cycle along both sides
    frequencies = lengths / PATCH * np.exp(draw.normal(0, 0.08, len(labels)))
    return _wave(draw, frequencies * np.sin(angles), frequencies * np.cos(angles))


def _wave(draw: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Waves of these frequencies (cycles per pixel) and random phase, stronger on one side of the image."""
    y, x = np.mgrid[:SIDE, :SIDE]
    phase = draw.uniform(0, 2 * math.pi, (len(rows), 1, 1))
    return (1 + _gradient(draw, len(rows))) * np.cos(
        2 * math.pi * (rows[:, None, None] * y + columns[:, None, None] * x) + phase
    )


def _gradient(draw: np.random.Generator, count: int) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE] / (SIDE - 1) - 0.5
    offset, vertical, horizontal = draw.normal(0, 0.2, (3, count, 1, 1))
    return offset + vertical * y + horizontal * x


def fourier_filters() -> dict[tuple[int, int], np.ndarray]:
    """The real Fourier basis of a patch: `(1 or 2, 4, 4)` orthonormal filters (cosine, sine) by frequency."""
    y, x = np.mgrid[:PATCH, :PATCH]
    filters = {}
    for band in ((0, 0), *COARSE_BANDS, *FINE_BANDS, (0, 2)):
        angles = 2 * math.pi * (band[0] * y + band[1] * x) / PATCH
        waves = np.stack([np.cos(angles), np.sin(angles)][: 1 if set(band) <= {0, 2} else 2])
        filters[band] = waves / np.linalg.norm(waves, axis=(1, 2), keepdims=True)
    return filters


def bump(timesteps: torch.Tensor, centre: float) -> torch.Tensor:
    return torch.exp(-((timesteps.double().sqrt() - math.sqrt(centre)) ** 2) / (2 * BUMP_WIDTH**2))


@torch.no_grad()
def build_model(timestep: int = TIMESTEP, seed: int = 0) -> ASelectDiTModel:
    """The network, its optimum near `timestep`."""
    torch.manual_seed(seed)
    model = ASelectDiTModel(ASelectDiTConfig(**CONFIG)).eval()
    spread = model.position_embedding[0].std(dim=0)
    quiet = spread.argsort().tolist()  # channels, the ones in which positions vary least first
    constants, quiet = quiet[:2], quiet[2:]
    channels: dict[tuple[int, int], list[int]] = {}
    model.patch_embedding.weight.zero_()
    model.patch_embedding.bias.copy_(-model.position_embedding[0].mean(dim=0))
    for band, waves in fourier_filters().items():
        channels[band], quiet = quiet[: len(waves)], quiet[len(waves) :]
        model.patch_embedding.weight[channels[band], 0] = torch.from_numpy(waves).float()
    model.patch_embedding.bias[constants] += torch.tensor([CONSTANT, -CONSTANT])
    for layer in model.layers:
        layer.attention.k_proj.weight.mul_(1e-3)  # attends to all tokens alike, so attention is linear too
        layer.mlp.fc1.bias.fill_(6.0)  # units far up the GELU: linear
    _plant(model, channels, torch.tensor(quiet), timestep)
    return model


def _plant(
    model: ASelectDiTModel, channels: dict[tuple[int, int], list[int]], free: torch.Tensor, timestep: int
) -> None:
    """Set block 1: rectifiers of the filters, energies in the `free` channels, the bump over t."""
    layer, width = model.layers[1], model.config.hidden_size
    fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
    deviation = CONSTANT * math.sqrt(2 / width)  # of a token: what LayerNorm divides by
    mixing = torch.linalg.qr(torch.randn(len(free), len(COARSE_BANDS)))[0]
    fc2.weight.zero_()
    unit = 0
    for output, (coarse, fine) in enumerate(zip(COARSE_BANDS, FINE_BANDS, strict=True)):
        for band, weight in ((coarse, 1.0), (fine, FINE_WEIGHT)):
            for channel in channels[band]:
                for sign in (1, -1):
                    fc1.weight[unit] = 0
                    fc1.weight[unit, channel] = sign * SHARPNESS * deviation
                    fc1.bias[unit] = 0
                    fc2.weight[free, unit] = weight / SHARPNESS * mixing[:, output]
                    unit += 1
    timesteps = torch.arange(model.noise_schedule.num_train_timesteps)
    null_class = torch.zeros_like(timesteps)
    embedding = model.condition_embeddings[0]
    slow = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half := FREQUENCY_CHANNELS // 2) / half) < FASTEST
    embedding.fc1.weight.normal_(std=0.3).mul_(slow.repeat(2))  # fast ones would make the fit ragged
    embedding.fc2.weight.normal_(std=0.3)
    condition = torch.nn.functional.silu(embedding(timesteps, null_class)).double()
    design = torch.cat([condition, torch.ones(len(condition), 1)], dim=1)
    solution = torch.linalg.lstsq(design, bump(timesteps, timestep) - 1).solution.float()
    scaled = 4 * width + torch.tensor([channel for band in COARSE_BANDS for channel in channels[band]])
    layer.modulation.weight[scaled], layer.modulation.bias[scaled] = solution[:-1], solution[-1]
    layer.modulation.bias[5 * width :] = 1  # the MLP's gate


def build_data(output_dir: Path, sizes: dict[str, int] = SIZES, seed: int = 0) -> None:
    """Write a parquet file for every split, seeds `seed`, `seed + 1`, ..."""
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    with atomic_directory(output_dir) as folder:
        for offset, (split, size) in enumerate(sizes.items()):
            images, labels = textures(size, seed + offset)
            rows = {"image": [Image.fromarray(image) for image in images], "label": labels}
            datasets.Dataset.from_dict(rows, datasets.Features(columns)).to_parquet(folder / f"{split}.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder to write the images to; must not exist")
    parser.add_argument("model", type=Path, help="folder to write the checkpoint to; must not exist")
    arguments = parser.parse_args()
    build_data(arguments.data)
    with atomic_directory(arguments.model) as folder:
        save_model(build_model(), folder)


if __name__ == "__main__":
    main()
