"""Convert any image to 8-bit pixels, alike in the library, the saved image processor and the endpoint handler.

- Integers of 8 and 16 bits are read by their full range: an image saved as `v` and as `257 * v` gives the same pixels.
- Floats must lie in [0, 1]. Other ranges are refused.
- Transparent pixels are composited on white.
- Colors become RGB, a palette is looked up, and the EXIF orientation is applied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format
from transformers.utils import logging

logger = logging.get_logger(__name__)

ORIENTATION = 0x0112  # EXIF tag; 1 is upright
WIDENED = ("PNG", "PPM")  # formats of 16 bits at most, which some versions of Pillow open with 32
DARK = 4096  # of 65536: what a 12-bit camera writes


def eight_bit_image(image: Any, name: str = "the image", input_data_format: Any = None) -> Image.Image:
    """An image of mode L or RGB, upright, from a PIL image of any mode, an array or a tensor.

    Args:
        image: PIL image; or array or tensor `(height, width)`, `(height, width, channels)` or
            `(channels, height, width)` of 1, 3 or 4 (with alpha) channels.
        input_data_format: `"channels_first"` or `"channels_last"`, if the shape is ambiguous.

    Raises:
        ValueError: NaN or infinite pixels, an unknown range of values, or an unsupported shape.
    """
    if not isinstance(image, Image.Image):
        return _flatten(_image_of_array(_array(image), name, input_data_format))
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(_one_channel(image), name))
    return _flatten(image)


def is_float(image: Any) -> bool:
    """Whether pixels are floats rather than integers."""
    if isinstance(image, Image.Image):
        return image.mode == "F"
    return image.is_floating_point() if isinstance(image, torch.Tensor) else np.asarray(image).dtype.kind == "f"


def _array(image: Any) -> np.ndarray:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        return (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    return np.asarray(image)


def _image_of_array(array: np.ndarray, name: str, input_data_format: Any) -> Image.Image:
    if array.ndim == 2:
        return Image.fromarray(_eight_bits(array, name))
    try:
        layout = input_data_format or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
    except ValueError:
        raise ValueError(
            f"{name} has the shape {array.shape}: an image is (height, width), (height, width, channels) or "
            "(channels, height, width), with 1, 3 or 4 channels"
        ) from None
    if layout in ("channels_first", ChannelDimension.FIRST):
        array = np.moveaxis(array, 0, -1)
    values = _eight_bits(array, name)
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[-1] == 1 else values))


def _one_channel(image: Image.Image) -> np.ndarray:
    """Values of an image with more than 8 bits; its transparent color, if any, becomes white."""
    values = np.asarray(image)
    if image.mode == "I" and image.format in WIDENED:
        values = values.astype(np.uint16)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and values.dtype.name == "uint16":
        values = np.where(values == transparent, np.uint16(65535), values)
    return values


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    kind = values.dtype.name
    if kind == "uint8":
        return values
    if kind == "bool":
        return values * np.uint8(255)
    if kind == "uint16":
        if 0 < values.max() < DARK:
            logger.warning_once(
                "A 16-bit image uses less than a sixteenth of its range, so that it is read as nearly black: 16-bit "
                "images are divided by 65535, whatever the camera recorded. Stretch such images first."
            )
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{name} holds {kind} instead of numbers")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite pixels")
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    raise ValueError(
        f"{name} has {kind} pixels in {low:g}..{high:g}, a range in which black and white are unknown: "
        "scale it to floats in 0..1, or to integers of 8 bits (uint8, 0..255) or 16 bits (uint16, 0..65535)"
    )


def _flatten(image: Image.Image) -> Image.Image:
    """An 8-bit image of any mode as L or RGB, composited on white."""
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


__all__ = ["eight_bit_image", "is_float"]
