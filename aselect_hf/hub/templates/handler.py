"""Custom handler of a Hugging Face Inference Endpoint: an image in, what the model's pipeline says of it out.

Request: the bytes of an image, or JSON `{"inputs": "<image in base64>" or a list of such, "parameters": {...}}`.
Response, of one image: `[{"label", "score"}, ...]` (classification), `[{"label", "mask": "<PNG in base64>"}, ...]`
(segmentation), or a feature vector (feature extraction). A list of images is answered by a list.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from transformers import pipeline

TASKS = {"ForImageClassification": "image-classification", "ForSemanticSegmentation": "image-segmentation"}
PARAMETERS = {
    "image-classification": ("top_k", "function_to_apply"),
    "image-segmentation": (),
    "image-feature-extraction": (),
}


class EndpointHandler:
    """Loads the repository once; every call is one request.

    Args:
        path: folder of the downloaded repository.
    """

    def __init__(self, path: str = "") -> None:
        architecture = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        self.task = next(
            (task for suffix, task in TASKS.items() if architecture.endswith(suffix)), "image-feature-extraction"
        )
        # The code that runs is the repository's own, which whoever deploys this endpoint has chosen to run.
        options: dict[str, Any] = {"task": self.task, "model": path, "trust_remote_code": True}
        if self.task == "image-feature-extraction":
            options["pool"] = True
        self.pipeline: Any = pipeline(**options, device="cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Answer a request.

        Raises:
            ValueError: `inputs` is missing or no image, or a parameter is unknown.
        """
        if data.get("inputs") is None:
            raise ValueError("'inputs' is missing: send an image")
        parameters = data.get("parameters") or {}
        accepted = PARAMETERS[self.task]
        if unknown := sorted(set(parameters) - set(accepted)):
            raise ValueError(f"parameters {unknown} are unknown; accepted are {list(accepted)}")
        inputs = data["inputs"]
        if isinstance(inputs, list):
            return [self._answer(image, parameters) for image in inputs]
        return self._answer(inputs, parameters)

    def _answer(self, image: Any, parameters: dict[str, Any]) -> list[Any]:
        output = self.pipeline(read_image(image), **parameters)
        if self.task == "image-segmentation":
            return [{"label": part["label"], "mask": encode_png(part["mask"])} for part in output]
        if self.task == "image-feature-extraction":
            return output[0]
        return output


def read_image(image: Any) -> Image.Image:
    """An image from what a request can hold; never from an address or a path, which a stranger could point anywhere."""
    if isinstance(image, Image.Image):
        return image
    try:
        if isinstance(image, str):
            image = base64.b64decode(image.rpartition("base64,")[2], validate=True)
        opened = Image.open(io.BytesIO(image))
        opened.load()
    except (binascii.Error, UnidentifiedImageError, OSError, TypeError, ValueError) as error:
        raise ValueError("'inputs' must be an image: its bytes, or base64 text") from error
    return opened


def encode_png(mask: Image.Image) -> str:
    """A mask as base64 text, which JSON can carry."""
    buffer = io.BytesIO()
    mask.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
