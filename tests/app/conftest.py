"""Models on show and uploads of all sorts."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aselect_hf import ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation
from aselect_hf.app import Checkpoint, Workbench
from aselect_hf.app.uploads import Upload, read_upload

COLORS = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)


@pytest.fixture
def upload(tmp_path) -> Upload:
    Image.fromarray(COLORS).save(tmp_path / "picture.png")
    return read_upload(str(tmp_path / "picture.png"))


@pytest.fixture
def shown(make_model) -> Checkpoint:
    return Checkpoint("plain", make_model(num_channels=1))


@pytest.fixture
def classifier(make_config, randomize) -> Checkpoint:
    config = make_config(num_channels=1, num_labels=3, id2label={0: "cat", 1: "dog", 2: "<b>owl</b>"})
    return Checkpoint("classifier", randomize(ASelectDiTForImageClassification(config)))


@pytest.fixture
def segmenter(make_config, randomize) -> Checkpoint:
    config = make_config(num_channels=1, num_labels=2, id2label={0: "sky", 1: "<b>sea</b>"})
    return Checkpoint("segmenter", randomize(ASelectDiTForSemanticSegmentation(config)))


@pytest.fixture
def bench(shown) -> Workbench:
    return Workbench([shown])


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path) -> Callable[[str, bytes], str]:
    """`write(name, content)`: a file of an upload."""

    def write(name: str, content: bytes) -> str:
        Path(tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write
