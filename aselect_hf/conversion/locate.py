"""Where a checkpoint is, and of what kind."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from aselect_hf.data import SAMPLE_MODEL
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig

ORIGINAL_LICENSES = {"dit": "cc-by-nc-4.0", "sit": "mit"}
"""Kinds of original `.pt` files, with the licenses that they were published under."""


def locate(source: str | Path, allow_pickle: bool = False) -> Path:
    """A local path for a path or Hub id (downloaded: configs and weights only); `"sample"` is the shipped model."""
    if str(source) == "sample":
        return SAMPLE_MODEL
    path = Path(source)
    if path.exists():
        return path
    patterns = ["*.json", "*.safetensors", "README.md"] + (["*.bin"] if allow_pickle else [])
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"checkpoint {str(source)!r} is neither a local path nor reachable on the Hub ({first_line(error)})"
        ) from error


def detect_format(path: Path) -> str:
    """Tell a checkpoint's format by its files.

    Raises:
        ValueError: of a known kind but another model, or of no known kind.
    """
    if path.is_file():
        name = path.name.lower()
        for kind in ORIGINAL_LICENSES:
            if kind in name:
                return kind
        raise ValueError(f"cannot tell whether {path.name} is a DiT or a SiT: pass source_format='dit' or 'sit'")
    if (path / "model_index.json").is_file():
        return "diffusers"
    try:
        fields = json.loads((path / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a checkpoint: no readable config.json or model_index.json") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not a checkpoint: its config.json holds no fields")
    if fields.get("model_type") == ASelectDiTConfig.model_type:
        return "aselect"
    class_name, norm_type = fields.get("_class_name"), fields.get("norm_type")
    if class_name == "DiTTransformer2DModel" or (class_name, norm_type) == ("Transformer2DModel", "ada_norm_zero"):
        return "diffusers"  # the second: how diffusers called it before 0.29, the published repositories among them
    found = fields.get("model_type") or fields.get("_class_name") or "unknown"
    raise ValueError(f"{path} holds a model of type {found!r}; accepted are aselect_dit and DiTTransformer2DModel")


def card_license(path: Path) -> str | None:
    """The license that a folder's model card names."""
    card = path / "README.md"
    return ModelCard.load(card).data.license if card.is_file() else None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
