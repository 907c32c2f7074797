"""The families of diffusion transformers that an `ASelectDiffusionModel` can wrap."""

from __future__ import annotations

from typing import Any

from .families_cross import PIXART, SANA
from .families_flux import CHROMA, FLUX
from .families_sd3 import SD3
from .family import Family

FAMILIES: dict[str, Family] = {family.transformer_class: family for family in (SD3, FLUX, CHROMA, PIXART, SANA)}
"""By the name of diffusers' class."""


def find_family(transformer_class: Any) -> Family:
    """The family of a class of diffusers.

    Raises:
        ValueError: it is not among `FAMILIES`.
    """
    if transformer_class not in FAMILIES:
        raise ValueError(
            f"transformer_class {transformer_class!r} is not supported; supported are {', '.join(FAMILIES)}. "
            "docs/families.md says how to add a family: one adapter and one tiny configuration"
        )
    return FAMILIES[transformer_class]


__all__ = ["FAMILIES", "find_family"]
