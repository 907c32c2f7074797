"""Many features of several views of images at candidate timesteps, from one run per image, view, noise and timestep."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from aselect_hf.cost import encode_flops, feature_flops
from aselect_hf.data.feature_cache import KeptRows
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection.inputs import SelectionInputs

SMALLEST_CROP = 0.2
LOG_ASPECT = math.log(4 / 3)


@dataclass
class Views:
    """Clean inputs and noise for all views of all images.

    Args:
        latents: `(views, images, channels, height, width)`, clean.
        noise: `(views, draws, images or 1, channels, height, width)`; features are averaged over the draws.
        encoded: number of images that were encoded.
        seconds: time that encoding them takes without a cache.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    encoded: int
    seconds: float


@dataclass
class FeatureSweep:
    """Features by name, each `(timesteps, rows, views, columns)` float32, and their cost."""

    values: dict[str, np.ndarray]
    forward_passes: int
    flops: float


def stored_noise_view(inputs: SelectionInputs, data: ImageData, *, whole_image: bool = False) -> Views:
    """One view per image of `data`, as the model itself sees it: whole or center, with the stored evaluation noise."""
    latents, seconds = inputs.latents(data, whole_image=whole_image)
    latents = latents.to(inputs.model.device)
    return Views(latents[None], inputs.model.stored_noise(latents).float()[None], len(data), seconds)


def noise_views(inputs: SelectionInputs, num_views: int) -> Views:
    """The same image under different noise: each image has `num_views` draws of its own."""
    latents, seconds = inputs.latents(inputs.images)
    noise = _noise((num_views, 1, *latents.shape), torch.Generator().manual_seed(inputs.seed), inputs.model)
    return Views(latents.to(inputs.model.device).expand(num_views, *latents.shape), noise, len(latents), seconds)


def augmented_views(inputs: SelectionInputs, num_views: int) -> Views:
    """Random crops (a fifth to all of the area, aspect 3:4 to 4:3, resized back) and flips, each with its own noise."""
    count, generator, started = len(inputs.images), torch.Generator().manual_seed(inputs.seed), time.perf_counter()
    latents = torch.stack(
        [_encode_crops(inputs, crops) for crops in torch.rand(num_views, count, 5, generator=generator)]
    )
    seconds = time.perf_counter() - started
    noise = _noise((num_views, 1, *latents.shape[1:]), generator, inputs.model)
    return Views(latents, noise, num_views * count, seconds)


VIEWS = {"noise views": noise_views, "augmented views": augmented_views}
"""By `Criterion.sees`."""


def random_resized_crop(image: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """A random crop of `image` `(channels, height, width)`, resized back and mirrored half of the time.

    Args:
        draws: 5 uniform numbers in [0, 1): area, aspect ratio, top, left, mirror.
    """
    area, aspect, top, left, mirror = draws.tolist()
    height, width = image.shape[-2:]
    share = math.sqrt(SMALLEST_CROP + (1 - SMALLEST_CROP) * area)
    stretch = math.exp(LOG_ASPECT * (aspect - 0.5))  # its square is the aspect ratio
    rows = min(height, max(1, round(height * share / stretch)))
    columns = min(width, max(1, round(width * share * stretch)))
    y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
    crop = image[:, y : y + rows, x : x + columns]
    crop = crop.flip(-1) if mirror < 0.5 else crop
    return interpolate(crop[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def sweep_features(
    model: NoisyBackbone,
    views: Views,
    timesteps: list[int],
    features: list[str],
    rows: KeptRows,
    *,
    batch_size: int,
    progress: bool = False,
    name: str = "features",
) -> FeatureSweep:
    """Run every view at every timestep up to the deepest feature and keep the rows of all features.

    `rows` come from `pooled_rows` or `token_rows`. All features stay in memory, as
    `features * timesteps * rows * views * columns * 4` bytes. With two views of 256 images at 20 timesteps, one feature
    of DiT-XL/2 takes 47 MB, and all 168 candidates of `"auto"` (six kinds of all blocks) take 8 GB.
    """
    num_views, count = views.latents.shape[:2]
    shape = (len(timesteps), int(rows.first_rows[-1]), num_views)
    columns = {feature: rows.cells * model.config.feature_width(feature) for feature in features}
    values = {feature: np.empty((*shape, columns[feature]), dtype=np.float32) for feature in features}
    draws = views.noise.shape[1]
    passes = len(timesteps) * num_views * draws * count
    grid_size = model.grid_size(views.latents)
    with tqdm(total=passes, desc=name, unit="pass", disable=not progress) as bar:
        for column, t in enumerate(timesteps):
            for view, (latents, noises) in enumerate(zip(views.latents, views.noise, strict=True)):
                for first in range(0, count, batch_size):
                    clean = latents[first : first + batch_size]
                    kept = slice(rows.first_rows[first], rows.first_rows[first + len(clean)])
                    steps = torch.full((len(clean),), t, device=clean.device)
                    sums: dict[str, torch.Tensor] = {}
                    for noise in noises:
                        own = noise if len(noise) == 1 else noise[first : first + batch_size]
                        noisy = model.noise_schedule.add_noise(clean, own.expand_as(clean), t)
                        for feature, tokens in model.features_of_noisy(noisy, steps, features).items():
                            found = rows.rows_of(tokens.float(), grid_size, first)
                            sums[feature] = sums[feature] + found if feature in sums else found
                        bar.update(len(clean))
                    for feature, total in sums.items():
                        values[feature][column, kept, view] = (total / draws).cpu().numpy()
    flops = views.encoded * encode_flops(model) + passes * feature_flops(model, *features)
    return FeatureSweep(values, passes, flops)


def _encode_crops(inputs: SelectionInputs, crops: torch.Tensor) -> torch.Tensor:
    """Latents `(images, channels, height, width)` float32 of one crop `(5,)` of every image."""
    model, parts, first = inputs.model, [], 0
    for pixels in inputs.images.batches(model.config, inputs.fixed_batch_size):
        own = crops[first : first + len(pixels)]
        cropped = torch.stack([random_resized_crop(*each) for each in zip(pixels.float(), own, strict=True)])
        parts.append(model.prepare_latents(cropped.to(model.device)).float())
        first += len(pixels)
    return torch.cat(parts)


def _noise(shape: tuple[int, ...], generator: torch.Generator, model: NoisyBackbone) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(model.device)
