"""Images from every kind of source, and what happens to those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from aselect_hf.data import ImageData, load_images

GREY = {"num_channels": 1, "patch_size": 4, "sample_size": 8}


@pytest.fixture
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(6)]


@pytest.fixture
def folder(pictures: list[Image.Image], tmp_path: Path) -> Path:
    for index, picture in enumerate(pictures):
        path = tmp_path / "images" / ("cat" if index % 2 else "dog") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return tmp_path / "images"


def pixels(data: ImageData, config) -> torch.Tensor:
    return torch.cat(list(data.batches(config, 4)))


def test_every_source_gives_the_same_pixels(pictures, folder, tmp_path, make_config):
    config = make_config(**GREY)
    expected = pixels(ImageData.of(pictures), config)
    rows = {"image": pictures, "label": [0, 1] * 3}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
    ))  # fmt: skip
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    sources = {
        "dataset": dataset,
        "saved": tmp_path / "saved",
        "parquet": tmp_path / "parquet",
        "tensor": expected,
        "loader": DataLoader(TensorDataset(expected, torch.tensor([0, 1] * 3)), batch_size=4),
        "paths": sorted(folder.rglob("*.png"), key=lambda path: int(path.stem)),
    }
    for name, source in sources.items():
        data = ImageData.of(source)
        assert torch.equal(pixels(data, config), expected), name
        if name not in ("tensor", "paths"):
            assert data.labels is not None
            assert data.labels.tolist() == [0, 1] * 3


def test_folder_of_images_has_its_subfolders_as_labels(folder, make_config):
    data = ImageData.of(str(folder))
    assert data.label_names == ["cat", "dog"]
    assert np.bincount(data.labels).tolist() == [3, 3]
    assert pixels(data, make_config(**GREY)).shape == (6, 1, 8, 8)


@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
def test_unreadable_image_is_named_and_can_be_skipped(folder, content, make_config):
    broken = folder / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60] if content is None else content)
    data = ImageData.of(str(folder))
    with pytest.raises(ValueError, match=r"1\.png cannot be read as an image"):
        pixels(data, make_config(**GREY))
    rest = data.readable("skip")
    assert len(rest) == 5
    assert len(rest.labels) == 5
    assert pixels(rest, make_config(**GREY)).shape[0] == 5


def test_nothing_readable_is_an_error(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 6 images"):
        ImageData.of(str(folder)).readable("skip")


def test_sample_is_seeded_and_keeps_labels_aligned(normal):
    images, labels = normal(20, 1, 8, 8), np.arange(20)
    data = ImageData(images, labels)
    first, second, other = data.sample(5, 0), data.sample(5, 0), data.sample(5, 1)
    assert first.labels.tolist() == second.labels.tolist() != other.labels.tolist()
    assert torch.equal(first.decode(0), images[first.labels[0]])
    assert data.sample(None, 0) is data.sample(100, 0) is data


def test_fingerprint_follows_the_content(pictures):
    same, fewer = ImageData.of(list(pictures)), ImageData.of(pictures[:5])
    assert ImageData.of(pictures).fingerprint == same.fingerprint != fewer.fingerprint
    pixels = torch.arange(96.0).reshape(2, 3, 4, 4)
    assert ImageData(pixels).fingerprint == ImageData(pixels.clone()).fingerprint != ImageData(-pixels).fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "cannot load images from 'no/such/folder'"),
        (3.0, "images must be a pixel tensor"),
        (torch.zeros(8, 8), "images must be"),
        ([], "holds no images"),
        (datasets.DatasetDict({"a": datasets.Dataset.from_dict({"x": [1]})}), "pass one of its splits: a"),
        (datasets.Dataset.from_dict({"x": [1]}), "no column 'image'; it has x"),
    ],
    ids=["missing", "number", "2-D tensor", "empty list", "dict", "no image column"],
)
def test_bad_sources(source, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ImageData.of(source)


def test_missing_split_lists_what_there_is():
    with pytest.raises(ValueError, match="no split 'dev'; it has train, validation, test"):
        load_images("sample", "dev")


def test_sample_is_what_its_card_says():
    sizes = {split: len(load_images("sample", split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 4000, "validation": 1000, "test": 2000}
    data = ImageData.of("sample")
    assert np.bincount(data.labels).tolist() == [400] * 10
    assert data.label_names[9] == "Ankle boot"
