"""Pictures of what a model sees at a timestep: its noisy input, its features and its attention."""

from aselect_hf.pictures.attention import attention_maps, attention_picture
from aselect_hf.pictures.colors import FeatureColors
from aselect_hf.pictures.curves import curve
from aselect_hf.pictures.maps import cosine_similarities, pca_map, similarity_map
from aselect_hf.pictures.strip import noise_strip
from aselect_hf.pictures.sweep import PictureSweep, picture_latents, sweep_picture

__all__ = [
    "FeatureColors",
    "PictureSweep",
    "attention_maps",
    "attention_picture",
    "cosine_similarities",
    "curve",
    "noise_strip",
    "pca_map",
    "picture_latents",
    "similarity_map",
    "sweep_picture",
]
