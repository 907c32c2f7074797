"""WebDataset tars: a folder, a file or a pattern of them, whole or as a stream, gives images with ids and labels."""

from __future__ import annotations

import numpy as np
import pytest

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images

from .tars import write_tars


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
