"""Maps over the patch grid: principal components as colors, and similarity to one patch."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw

from aselect_hf.pictures.colors import FeatureColors

SIDE = 224


def pca_map(
    features: torch.Tensor, grid_size: tuple[int, int], *, colors: FeatureColors | None = None, side: int = SIDE
) -> Image.Image:
    """Features as an RGB picture: similar patches have similar colors.

    Args:
        features: `(height * width, channels)`, row-major, of one picture at one timestep.
        grid_size: `(height, width)` of the patch grid.
        colors: the projection, fitted to several timesteps or pictures that are to be compared (default: to these
            features alone).
        side: of the result's longer side, in pixels.

    Returns:
        A picture of mode RGB, each patch a rectangle.

    Raises:
        ValueError: shapes do not match, or features are not finite.
    """
    check_grid(features, grid_size)
    values = (colors or FeatureColors.fit(features))(features)
    return enlarged(Image.fromarray(values.reshape(*grid_size, 3)), side)


def cosine_similarities(
    features: torch.Tensor, grid_size: tuple[int, int], patch: tuple[int, int], *, reference: torch.Tensor | None = None
) -> np.ndarray:
    """Cosine similarity of one patch to all patches.

    Args:
        features: `(height * width, channels)`, row-major.
        grid_size: `(height, width)` of the patch grid.
        patch: `(row, column)` in the grid, counted from 0.
        reference: features of the picture that `patch` is in, with the same grid (default: `features`).

    Returns:
        `(height, width)` float32 in [-1, 1].

    Raises:
        ValueError: shapes do not match, or there is no such patch.
    """
    reference = features if reference is None else reference
    for each in (features, reference):
        check_grid(each, grid_size)
    row, column = patch
    if not (0 <= row < grid_size[0] and 0 <= column < grid_size[1]):
        raise ValueError(f"patch must be (row, column) within {grid_size[0]} x {grid_size[1]}, got {tuple(patch)}")
    one = reference[row * grid_size[1] + column].float()
    found = torch.nn.functional.cosine_similarity(features.float(), one[None], dim=-1)
    return found.view(grid_size).clamp(-1, 1).cpu().numpy()


def similarity_map(
    features: torch.Tensor,
    grid_size: tuple[int, int],
    patch: tuple[int, int],
    *,
    reference: torch.Tensor | None = None,
    side: int = SIDE,
) -> Image.Image:
    """`cosine_similarities` as a picture: the lowest similarity is dark, 1 is bright, and the patch is framed.

    Arguments and errors are those of `cosine_similarities`; `side` is the result's longer side in pixels. With a
    `reference` the patch is in another picture, so nothing is framed.
    """
    values = cosine_similarities(features, grid_size, patch, reference=reference)
    low = float(values.min())
    picture = enlarged(heat((values - low) / max(1 - low, 1e-6)), side)
    if reference is None:
        frame_patch(picture, grid_size, patch)
    return picture


def heat(shares: np.ndarray) -> Image.Image:
    """Numbers `(height, width)` in [0, 1] as colors, dark to bright (matplotlib's inferno)."""
    from matplotlib import colormaps

    return Image.fromarray((colormaps["inferno"](shares)[..., :3] * 255).round().astype(np.uint8))


def frame_patch(picture: Image.Image, grid_size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Draw a white frame with a dark edge around a patch, in place."""
    height, width = picture.height / grid_size[0], picture.width / grid_size[1]
    top, left = round(patch[0] * height), round(patch[1] * width)
    bottom, right = round((patch[0] + 1) * height) - 1, round((patch[1] + 1) * width) - 1
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, right, bottom), outline="black", width=4)
    draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline="white", width=2)


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    """A picture whose longer side is `side`, without smoothing, so that every patch keeps its color and its edges."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST)


def check_grid(features: torch.Tensor, grid_size: tuple[int, int]) -> None:
    """Refuse features that do not fill the grid."""
    if features.ndim != 2 or features.shape[0] != grid_size[0] * grid_size[1]:
        raise ValueError(
            f"features must be ({grid_size[0]} * {grid_size[1]}, channels) for grid_size={tuple(grid_size)}, "
            f"got {tuple(features.shape)}"
        )
