"""WebDataset tars: a folder, a file or a pattern of them, whole or as a stream, gives images with ids and labels."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images


def write_tars(folder: Path, counts: list[int], start: str = "part", labels: bool = True) -> Path:
    """Tars `part-0.tar`, ... of so many gray pictures each; picture n has the value n and the label n % 2."""
    folder.mkdir(exist_ok=True, parents=True)
    number = 0
    for index, count in enumerate(counts):
        with tarfile.open(folder / f"{start}-{index}.tar", "w") as tar:
            for _ in range(count):
                content = io.BytesIO()
                Image.fromarray(np.full((8, 8), number, np.uint8)).save(content, "PNG")
                _add(tar, f"{number:04d}.png", content.getvalue())
                if labels:
                    _add(tar, f"{number:04d}.cls", str(number % 2).encode())
                number += 1
    return folder


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("pattern", ["", "part-*.tar", "part-0.tar"])
def test_tars_are_images_with_labels(tmp_path, pattern):
    folder = write_tars(tmp_path / "tars", [5, 2])
    data = ImageData.of(load_images(folder / pattern))
    count = 5 if pattern == "part-0.tar" else 7
    assert len(data) == count
    assert data.labels.tolist() == [number % 2 for number in range(count)]
    assert [int(np.asarray(data.decode(row))[0, 0]) for row in range(count)] == [*range(count)]


def test_tars_named_like_splits_are_splits_and_stream(tmp_path):
    write_tars(tmp_path / "tars", [4], "train", labels=False)
    folder = write_tars(tmp_path / "tars", [2], "val")
    data = ImageData.of(load_images(folder, "validation"))
    assert (len(data), data.labels.tolist()) == (2, [0, 1])
    stream = load_images(folder, "train", streaming=True)
    assert sum("image" in row for row in stream) == 4


def test_a_pattern_without_files_is_one_error(tmp_path):
    with pytest.raises(ValueError, match=r"none-\*\.tar' names no files"):
        load_images(tmp_path / "none-*.tar")
