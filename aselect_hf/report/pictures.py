"""The pictures of a report: the same images along the noise axis, and the similarity of a patch."""

from __future__ import annotations

from dataclasses import dataclass

from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.pictures import FeatureColors, cosine_similarities, pca_map, similarity_map, sweep_picture
from aselect_hf.pictures.sweep import dense_timesteps
from aselect_hf.reporting.web import data_url

NUM_PICTURES, NUM_TIMESTEPS = 3, 8
SIDE = 160


@dataclass(frozen=True)
class Strip:
    """One image along the noise axis, as addresses of pictures.

    Args:
        name: of the image.
        inputs, features: one per timestep.
        similarity: of the central patch to all others at the chosen timestep.
        lowest: the least similarity.
    """

    name: str
    inputs: list[str]
    features: list[str]
    similarity: str
    lowest: float


def strip_timesteps(model: NoisyBackbone, chosen: int) -> list[int]:
    """Timesteps that are dense at low noise, with the chosen one among them."""
    return sorted({*dense_timesteps(model.noise_schedule.num_train_timesteps, NUM_TIMESTEPS), chosen})


def draw_strips(
    model: NoisyBackbone, images: ImageData, feature: str, timesteps: list[int], chosen: int
) -> list[Strip]:
    """Strips of images spread evenly over the data; empty if the model takes no pictures.

    Args:
        chosen: the timestep of the similarity, one of `timesteps`.
    """
    if not model.config.takes_pictures:
        return []
    rows = range(0, len(images), max(1, -(-len(images) // NUM_PICTURES)))
    return [draw_strip(model, images, row, feature, timesteps, chosen) for row in rows]


def draw_strip(
    model: NoisyBackbone, images: ImageData, row: int, feature: str, timesteps: list[int], chosen: int
) -> Strip:
    """The strip of one image."""
    pixels = next(images.subset([row]).batches(model.config, 1))
    sweep = sweep_picture(model, model.prepare_latents(pixels.to(model.device)), timesteps, [feature])
    colors, grid = FeatureColors.fit(sweep.features[feature]), sweep.grid_size
    patch, tokens = (grid[0] // 2, grid[1] // 2), sweep.at(feature, chosen)
    return Strip(
        name=f"image {row}",
        inputs=[data_url(sweep.noisy_picture(t)) for t in timesteps],
        features=[data_url(pca_map(sweep.at(feature, t), grid, colors=colors, side=max(grid))) for t in timesteps],
        similarity=data_url(similarity_map(tokens, grid, patch, side=SIDE)),
        lowest=float(cosine_similarities(tokens, grid, patch).min()),
    )
