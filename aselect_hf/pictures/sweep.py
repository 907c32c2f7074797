"""Features of one picture at many timesteps, in batches of timesteps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from aselect_hf.data.images import image_pixels, read_image
from aselect_hf.modeling.noisy_backbone import NoisyBackbone

BATCH_SIZE = 16
LATENT_RANGE = 3.0  # standard deviations of scaled latents


@dataclass(frozen=True)
class PictureSweep:
    """What a model sees and computes of one picture along the noise axis.

    Args:
        timesteps: ascending, as given.
        noisy: `(timesteps, channels, height, width)`, inputs of the network with the first stored noise.
        features: `(timesteps, tokens, width)` by name, on the CPU, averaged over the stored noises.
        grid_size: `(height, width)` of the patch grid.
        in_pixels: whether the network sees pixels, rather than a VAE's latents.
    """

    timesteps: list[int]
    noisy: torch.Tensor
    features: dict[str, torch.Tensor]
    grid_size: tuple[int, int]
    in_pixels: bool

    def at(self, feature: str, timestep: int) -> torch.Tensor:
        """`(tokens, width)` of one feature at one of the timesteps."""
        return self.features[feature][self.timesteps.index(timestep)]

    def noisy_picture(self, timestep: int) -> Image.Image:
        """The noisy input as a picture; of latents, the first three channels in a range of three deviations."""
        values = self.noisy[self.timesteps.index(timestep)]
        values = values[:3] if len(values) >= 3 else values[:1]
        share = (values / (1.0 if self.in_pixels else LATENT_RANGE) + 1) / 2
        pixels = (share.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")


def picture_latents(model: NoisyBackbone, image: Any, *, whole_image: bool = False) -> torch.Tensor:
    """The clean input `(1, channels, height, width)` of a picture, cropped and resized as the model was trained.

    Args:
        image: PIL image, path, bytes or array; or a tensor that is such an input already.
        whole_image: resize the whole picture to a square, as for segmentation.

    Raises:
        ValueError: it cannot be read as an image.
    """
    if isinstance(image, torch.Tensor) and image.ndim == 4:
        return image.to(model.device).float()
    pixels = image_pixels(model.config, whole_image=whole_image)([read_image(image, "the picture")])
    with torch.inference_mode():
        return model.prepare_latents(pixels.to(model.device)).float()


@torch.inference_mode()
def sweep_picture(
    model: NoisyBackbone,
    image: Any,
    timesteps: Sequence[int],
    features: Sequence[str],
    *,
    whole_image: bool = False,
    batch_size: int = BATCH_SIZE,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] = lambda share: None,
) -> PictureSweep:
    """Read features of a picture at all timesteps; the numbers are those of `model.extract_features`.

    Args:
        model: the backbone, in evaluation mode.
        image: PIL image, path, bytes or array; or latents, see `picture_latents`.
        timesteps: training indices of the model's noise schedule.
        features: names, `blocks.<i>.<kind>`.
        whole_image: see `picture_latents`.
        batch_size: network runs at once.
        dtype: of the features that are kept.
        progress: called after every batch with the share that is done, in (0, 1].

    Raises:
        ValueError: the picture cannot be read; unknown feature or timestep; the model has a fixed timestep.
    """
    steps = [model.noise_schedule.check_timestep(t, "timesteps") for t in timesteps]
    if not steps or not features:
        raise ValueError("timesteps and features must not be empty")
    latents = picture_latents(model, image, whole_image=whole_image)
    draws = model.stored_noise(latents)[:, 0].float()  # (draws, channels, height, width)
    sums: dict[str, list[torch.Tensor]] = {name: [] for name in features}
    first = []
    for start in range(0, len(steps), max(1, batch_size // len(draws))):
        some = torch.tensor(steps[start : start + max(1, batch_size // len(draws))], device=latents.device)
        repeated = some.repeat_interleave(len(draws))  # (steps * draws,)
        clean, noise = latents.expand(len(repeated), *latents.shape[1:]), draws.repeat(len(some), 1, 1, 1)
        noisy = model.noise_schedule.add_noise(clean, noise, repeated)
        first.append(noisy[:: len(draws)].cpu())
        for name, tokens in model.features_of_noisy(noisy, repeated, features).items():
            mean = tokens.float().unflatten(0, (len(some), len(draws))).mean(dim=1)
            sums[name].append(mean.to(dtype).cpu())
        progress((start + len(some)) / len(steps))
    found = {name: torch.cat(parts) for name, parts in sums.items()}
    return PictureSweep(steps, torch.cat(first), found, model.grid_size(latents), model.vae is None)


def even_timesteps(num_train_timesteps: int, count: int) -> list[int]:
    """At most `count` timesteps at equal distances, from 0."""
    return list(range(0, num_train_timesteps, -(-num_train_timesteps // count)))


def dense_timesteps(num_train_timesteps: int, count: int) -> list[int]:
    """At most `count` timesteps from 0 to 0.7 of the schedule, dense at low noise: quadratic, as candidates are."""
    last = 0.7 * (num_train_timesteps - 1)
    return sorted({round(last * (index / max(count - 1, 1)) ** 2) for index in range(count)})
