"""Models on show and uploads of all sorts."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aselect_hf import ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation
from aselect_hf.app import Checkpoint, Workbench
from aselect_hf.app.uploads import Upload, read_upload
from aselect_hf.conversion import save_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images

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


def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "aselect_hf", "app", *arguments]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"(http://\S+) \(Ctrl", line):
            return server, found[1]
    raise AssertionError("the server did not start")


@pytest.fixture(scope="session")
def address(make_config, randomize, tmp_path_factory) -> Iterator[str]:
    """A page with the sample, a classifier and a segmenter."""
    folder = tmp_path_factory.mktemp("models")
    labels = {"num_channels": 1, "num_labels": 3, "id2label": {0: "cat", 1: "dog", 2: "owl"}}
    heads = {"classifier": ASelectDiTForImageClassification, "segmenter": ASelectDiTForSemanticSegmentation}
    for name, head in heads.items():
        save_model(randomize(head(make_config(**labels))), folder / name)
    server, address = start("sample", *(str(folder / name) for name in heads))
    yield address
    server.terminate()
    server.wait()


@pytest.fixture
def trousers(tmp_path) -> Path:
    data = ImageData.of(load_images("sample", "test"), name="sample")
    row = next(row for row, label in enumerate(data.labels) if data.label_names[label] == "Trouser")
    data.decode(row).save(tmp_path / "trousers.png")
    return tmp_path / "trousers.png"
