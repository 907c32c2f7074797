"""Images, labels and masks from anywhere, and the caches of what a model makes of them."""

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images

__all__ = ["ImageData", "load_images"]
