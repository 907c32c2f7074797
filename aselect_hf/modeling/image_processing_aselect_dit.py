"""Images to pixel values in [-1, 1]: shortest edge resized, centre cropped, as DiT was trained."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from .configuration_aselect_dit import ASelectDiTConfig

LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class ASelectDiTImageProcessor(PilBackend):
    """Image processor for one-channel models: colour images become their luminance (ITU-R 601)."""

    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 28}  # noqa: RUF012
    crop_size = {"height": 28, "width": 28}  # noqa: RUF012
    image_mean = [0.5]  # noqa: RUF012
    image_std = [0.5]  # noqa: RUF012
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        if hasattr(image, "convert"):
            image = image.convert("L")
        image = super().process_image(image, *args, **kwargs)
        if image.shape[0] == 3:
            image = np.tensordot(LUMINANCE, image, axes=1)[None].round().astype(image.dtype)
        return image


def make_image_processor(config: ASelectDiTConfig) -> PilBackend:
    """The image processor that matches a model: transformers' own for RGB, `ASelectDiTImageProcessor` for grey.

    Raises:
        ValueError: the model sees neither one nor three channels; such inputs are given as tensors.
    """
    channels = config.num_channels if config.vae_config is None else config.vae_config.get("in_channels", 3)
    side = config.image_size
    options: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "resample": PILImageResampling.BICUBIC,
        "do_center_crop": True,
    }
    if channels == 1:
        return ASelectDiTImageProcessor(**options)
    if channels == 3:
        half = [0.5] * 3
        return ViTImageProcessorPil(do_convert_rgb=True, image_mean=half, image_std=half, **options)
    raise ValueError(f"no image processor for {channels} channels: give the model tensors instead of images")


__all__ = ["ASelectDiTImageProcessor", "make_image_processor"]
