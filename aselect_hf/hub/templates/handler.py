"""Custom handler of a Hugging Face Inference Endpoint, which answers images with the output of the model's pipeline.

Request: the bytes of an image, or JSON `{"inputs": "<base64 image>" or a list of these, "parameters": {...}}`. Base64
may be standard or URL-safe, have line breaks, and be a `data:` URL.
Response to one image: `[{"label", "score"}, ...]` (classification), `[{"label", "mask": "<PNG in base64>"}, ...]`
(segmentation), or a feature vector (feature extraction). A list of images is answered by a list.
Parameters: `top_k` and `function_to_apply` ("softmax", "sigmoid" or "none"), for classification.
Limits: `MAX_IMAGES` per request and `MAX_PIXELS` per image; for segmentation, also `MAX_SCORES` pixels times classes.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import pipeline

TASKS = {"ForImageClassification": "image-classification", "ForSemanticSegmentation": "image-segmentation"}
MAX_IMAGES = 64
MAX_PIXELS = 50_000_000
MAX_SCORES = 250_000_000  # a gigabyte
BATCH_SIZE = 8


class EndpointHandler:
    """Loads the repository once; every call is one request.

    Args:
        path: folder of the downloaded repository.
    """

    def __init__(self, path: str = "") -> None:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        architecture = config["architectures"][0]
        self.task = next(
            (task for suffix, task in TASKS.items() if architecture.endswith(suffix)), "image-feature-extraction"
        )
        # This runs the repository's own code. Deploying the endpoint means trusting that code.
        options: dict[str, Any] = {"task": self.task, "model": path, "trust_remote_code": True}
        if self.task == "image-feature-extraction":
            options["pool"] = True
        self.pipeline: Any = pipeline(**options, device="cuda" if torch.cuda.is_available() else "cpu")
        self.max_pixels, self.batch_size = MAX_PIXELS, BATCH_SIZE
        if self.task == "image-segmentation":  # answers at the size of the image, a score for every pixel and class
            self.max_pixels, self.batch_size = min(MAX_PIXELS, MAX_SCORES // self.pipeline.model.config.num_labels), 1

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Answer a request.

        Raises:
            ValueError: `inputs` is missing, not an image or beyond a limit, or a parameter is unknown or wrong.
        """
        if not isinstance(data, dict) or data.get("inputs") is None:
            raise ValueError("'inputs' is missing: send an image")
        parameters = self._parameters(data.get("parameters") or {})
        inputs = data["inputs"]
        if not isinstance(inputs, list):
            return self._answers([inputs], parameters)[0]
        if len(inputs) > MAX_IMAGES:
            raise ValueError(f"'inputs' holds {len(inputs)} images; at most {MAX_IMAGES} are accepted in one request")
        return self._answers(inputs, parameters)

    def _parameters(self, parameters: Any) -> dict[str, Any]:
        if not isinstance(parameters, dict):
            raise ValueError(f"'parameters' must be an object, got {type(parameters).__name__}")
        accepted = PARAMETERS if self.task == "image-classification" else {}
        if unknown := sorted(set(parameters) - set(accepted)):
            raise ValueError(f"parameters {unknown} are unknown; accepted are {list(accepted)}")
        for name, value in parameters.items():
            is_valid, expected = accepted[name]
            if not is_valid(value):
                raise ValueError(f"parameter {name!r} must be {expected}, got {str(value)[:80]!r}")
        return parameters

    def _answers(self, inputs: list[Any], parameters: dict[str, Any]) -> list[Any]:
        def pictures() -> Iterator[Image.Image]:  # one batch is decoded at a time
            for index, image in enumerate(inputs):
                name = f"'inputs'[{index}]" if len(inputs) > 1 else "'inputs'"
                yield self.pipeline.image_processor.eight_bit_image(read_image(image, name, self.max_pixels), name)

        return [self._answer(output) for output in self.pipeline(pictures(), batch_size=self.batch_size, **parameters)]

    def _answer(self, output: Any) -> list[Any]:
        if self.task == "image-segmentation":
            return [{"label": part["label"], "mask": encode_png(part["mask"])} for part in output]
        return output[0] if self.task == "image-feature-extraction" else output


def read_image(image: Any, name: str = "'inputs'", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a request. URLs and paths are refused, since a stranger could point them anywhere.

    Raises:
        ValueError: it is not an image, or has more than `max_pixels`, which is checked before decoding.
    """
    try:
        if isinstance(image, str):
            image = decode_base64(image)
        opened = image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels; at most {max_pixels:,} are accepted") from error
    except Exception as error:  # a decoder may raise anything on a broken file
        raise ValueError(f"{name} must be an image: its bytes, or base64 text") from error
    if opened.width * opened.height > max_pixels:
        raise ValueError(f"{name} has {opened.width} x {opened.height} pixels; at most {max_pixels:,} are accepted")
    try:
        opened.load()
    except Exception as error:
        raise ValueError(f"{name} must be an image: its bytes, or base64 text; this one is damaged") from error
    return opened


def decode_base64(text: str) -> bytes:
    """Bytes from standard or URL-safe base64, with or without line breaks, padding and a `data:` prefix."""
    text = re.sub(r"\s", "", text.rpartition("base64,")[2]).translate(str.maketrans("-_", "+/")).rstrip("=")
    if not text:
        raise binascii.Error("no data")
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def encode_png(mask: Image.Image) -> str:
    """A mask as base64 text, which JSON can carry."""
    buffer = io.BytesIO()
    mask.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_function(value: Any) -> bool:
    return value in ("softmax", "sigmoid", "none")


PARAMETERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "top_k": (_is_count, "an integer of at least 1"),
    "function_to_apply": (_is_function, "'softmax', 'sigmoid' or 'none'"),
}
