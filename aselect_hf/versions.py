"""Versions that decide a number's last digits, for reports."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("aselect-hf", "torch", "transformers", "diffusers", "scikit-learn", "numpy")


def installed_versions() -> dict[str, str]:
    """Python and the packages that compute, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
