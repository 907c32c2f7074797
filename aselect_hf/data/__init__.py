"""Images, labels and masks from any source, and caches of the latents and features computed from them."""

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images

__all__ = ["ImageData", "load_images"]
