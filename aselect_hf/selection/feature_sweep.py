"""Many features of several views of images at candidate timesteps, from one run per image, view, noise and timestep."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from aselect_hf.cost import sweep_flops
from aselect_hf.data.feature_cache import KeptRows
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import latent_shape
from aselect_hf.data.processes import Processes, processes
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.selection.inputs import SelectionInputs

SMALLEST_CROP = 0.2
LOG_ASPECT = math.log(4 / 3)


@dataclass
class Views:
    """Clean inputs and noise for all views of this process's images: of all images, if there is one process.

    Args:
        latents: `(views, images, channels, height, width)`, clean.
        noise: `(views, draws, images or 1, channels, height, width)`; features are averaged over the draws.
        encoded: number of images that were encoded, by all processes together.
        seconds: time that encoding them takes without a cache.
        images: number of this process's first image, and that after its last (default: all images).
    """

    latents: torch.Tensor
    noise: torch.Tensor
    encoded: int
    seconds: float
    images: range | None = None


@dataclass
class FeatureSweep:
    """Features by name, each `(timesteps, rows, views, columns)` float32, and their cost."""

    values: dict[str, np.ndarray]
    forward_passes: int
    flops: float


def stored_noise_view(inputs: SelectionInputs, data: ImageData, *, whole_image: bool = False) -> Views:
    """One view per image of `data`, as the model itself sees it: whole or center, with the stored evaluation noise."""
    own = processes().block(len(data), inputs.fixed_batch_size)
    latents, seconds = inputs.latents(data, own, whole_image=whole_image)
    latents = latents.to(inputs.model.device)
    return Views(latents[None], inputs.model.stored_noise(latents).float()[None], len(data), seconds, own)


def noise_views(inputs: SelectionInputs, num_views: int) -> Views:
    """The same image under different noise: each image has `num_views` draws of its own."""
    count = len(inputs.images)
    own = processes().block(count, inputs.fixed_batch_size)
    latents, seconds = inputs.latents(inputs.images, own)
    noise = torch.randn((num_views, 1, count, *latents.shape[1:]), generator=_generator(inputs))[:, :, _slice(own)]
    device = inputs.model.device
    return Views(latents.to(device).expand(num_views, *latents.shape), noise.to(device), count, seconds, own)


def augmented_views(inputs: SelectionInputs, num_views: int) -> Views:
    """Random crops (a fifth to all of the area, aspect 3:4 to 4:3, resized back) and flips, each with its own noise."""
    count, generator, started = len(inputs.images), _generator(inputs), time.perf_counter()
    own = processes().block(count, inputs.fixed_batch_size)
    crops = torch.rand(num_views, count, 5, generator=generator)[:, _slice(own)]
    latents = torch.stack([_encode_crops(inputs, own, each) for each in crops])
    seconds = time.perf_counter() - started
    noise = torch.randn((num_views, 1, count, *latents.shape[2:]), generator=generator)[:, :, _slice(own)]
    return Views(latents, noise.to(inputs.model.device), num_views * count, seconds, own)


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

    Inside `shared_work` each process runs its own images, and all get the rows of all images. `rows` come from
    `pooled_rows` or `token_rows`. All features stay in memory, as `features * timesteps * rows * views * columns * 4`
    bytes. With two views of 256 images at 20 timesteps, one feature of DiT-XL/2 takes 47 MB, and all 168 candidates of
    `"auto"` (six kinds of all blocks) take 8 GB.
    """
    here, (num_views, count) = processes(), views.latents.shape[:2]
    start = 0 if views.images is None else views.images.start
    first_row, last_row = rows.first_rows[[start, start + count]]
    shape = (len(timesteps), int(last_row - first_row), num_views)
    columns = {feature: rows.cells * model.config.feature_width(feature) for feature in features}
    values = {feature: np.empty((*shape, columns[feature]), dtype=np.float32) for feature in features}
    draws = views.noise.shape[1]
    passes = len(timesteps) * num_views * draws
    grid_size = model.grid_size(views.latents)
    with tqdm(total=passes * count, desc=name, unit="pass", disable=not (progress and here.is_main)) as bar:
        for column, t in enumerate(timesteps):
            for view, (latents, noises) in enumerate(zip(views.latents, views.noise, strict=True)):
                for first in range(0, count, batch_size):
                    clean = latents[first : first + batch_size]
                    image = start + first
                    kept = slice(*(rows.first_rows[[image, image + len(clean)]] - first_row))
                    steps = torch.full((len(clean),), t, device=clean.device)
                    sums: dict[str, torch.Tensor] = {}
                    for noise in noises:
                        own = noise if len(noise) == 1 else noise[first : first + batch_size]
                        noisy = model.noise_schedule.add_noise(clean, own.expand_as(clean), t)
                        for feature, tokens in model.features_of_noisy(noisy, steps, features).items():
                            found = rows.rows_of(tokens.float(), grid_size, image)
                            sums[feature] = sums[feature] + found if feature in sums else found
                        bar.update(len(clean))
                    for feature, total in sums.items():
                        values[feature][column, kept, view] = (total / draws).cpu().numpy()
    passes *= len(rows.first_rows) - 1
    flops = sweep_flops(model, views.encoded, passes, *features)
    return FeatureSweep({feature: _whole(here, own_rows) for feature, own_rows in values.items()}, passes, flops)


def _whole(here: Processes, values: np.ndarray) -> np.ndarray:
    """The rows `(timesteps, rows, ...)` of all processes, in order."""
    parts = here.gather(values)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _slice(own: range) -> slice:
    return slice(own.start, own.stop)


def _generator(inputs: SelectionInputs) -> torch.Generator:
    return torch.Generator().manual_seed(inputs.seed)


def _encode_crops(inputs: SelectionInputs, own: range, crops: torch.Tensor) -> torch.Tensor:
    """Latents `(images, channels, height, width)` float32 of one crop `(5,)` of each image of `own`."""
    model, images, first = inputs.model, inputs.images, 0
    if not len(own):
        return torch.empty(0, *latent_shape(model, images), device=model.device)
    parts = []
    some = images if len(own) == len(images) else images.subset(own)
    for pixels in some.batches(model.config, inputs.fixed_batch_size):
        each = crops[first : first + len(pixels)]
        cropped = torch.stack([random_resized_crop(*pair) for pair in zip(pixels.float(), each, strict=True)])
        parts.append(model.prepare_latents(cropped.to(model.device)).float())
        first += len(pixels)
    return torch.cat(parts)
