"""The families of diffusion transformers that an `ASelectDiffusionModel` can wrap."""

from __future__ import annotations

from typing import Any

from .families_auraflow import AURAFLOW
from .families_cogview import COGVIEW4
from .families_cross import PIXART, SANA
from .families_flux import CHROMA, FLUX
from .families_flux2 import FLUX2
from .families_hunyuan import HUNYUAN
from .families_prx import PRX
from .families_qwen import QWEN_IMAGE
from .families_sd3 import SD3
from .families_single import LUMINA2, Z_IMAGE
from .family import Family

FAMILIES: dict[str, Family] = {
    family.transformer_class: family
    for family in (
        SD3,
        FLUX,
        CHROMA,
        PIXART,
        SANA,
        FLUX2,
        QWEN_IMAGE,
        LUMINA2,
        Z_IMAGE,
        PRX,
        AURAFLOW,
        HUNYUAN,
        COGVIEW4,
    )
}
"""By the name of diffusers' class."""

UNSUPPORTED = {
    "HiDreamImageTransformer2DModel": (
        "its prompts need four text encoders, and its blocks are mixtures of experts, which are not tested here"
    ),
    "LuminaNextDiT2DModel": "only its successor, Lumina-Image 2, has been looked at",
    "PriorTransformer": "it makes image embeddings, not images",
    "StableAudioDiTModel": "it is for audio",
    "UNet2DConditionModel": "it is a U-Net, and features are those of a transformer's blocks",
    "UNet2DModel": "it is a U-Net, and features are those of a transformer's blocks",
}
"""Why classes of diffusers that people may try are refused."""
HELP = "docs/families.md#how-to-add-a-family"


def find_family(transformer_class: Any) -> Family:
    """The family of a class of diffusers.

    Raises:
        ValueError: it is not among `FAMILIES`; the message says why, which ones are, and how to add one.
    """
    if transformer_class not in FAMILIES:
        reason = unsupported(str(transformer_class))
        raise ValueError(
            f"transformer_class {transformer_class!r} is not supported{reason}; supported are {', '.join(FAMILIES)}. "
            f"To add a family (one adapter and one tiny configuration), follow {HELP}"
        )
    return FAMILIES[transformer_class]


def unsupported(transformer_class: str) -> str:
    """Why a class is not supported, as the rest of a sentence; empty if nothing is known of it."""
    reason = UNSUPPORTED.get(transformer_class, "")
    if not reason and transformer_class.endswith("3DModel"):
        reason = "it is for video, and images are read here"
    return f": {reason}" if reason else ""


__all__ = ["FAMILIES", "find_family"]
