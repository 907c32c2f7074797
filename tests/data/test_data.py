"""Images from every kind of source, and what happens to those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.images import image_pixels
from aselect_hf.data.sources import load_images
from aselect_hf.data.splits import split_train_validation

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


def test_fingerprint_of_tensors_is_that_of_their_values(normal):
    prints = {ImageData(normal(3, 1, 8, 8)).subset([0, 1]).fingerprint for _ in range(3)}
    assert len(prints) == 1
    assert ImageData(normal(3, 1, 8, 8)).subset([0, 2]).fingerprint not in prints


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


@pytest.mark.parametrize("saved", [False, True])
def test_streaming_reads_the_same_rows(folder, tmp_path, saved):
    source = folder
    if saved:
        source = tmp_path / "saved"
        load_images(folder).save_to_disk(str(source))
    streamed = load_images(source, streaming=True)
    assert isinstance(streamed, datasets.IterableDataset)
    rows = list(streamed)
    for row, expected in zip(rows, load_images(folder), strict=True):
        assert np.array_equal(row["image"], expected["image"])
        assert row["label"] == expected["label"]


@pytest.mark.parametrize(("source", "split"), [("no/such/folder", None), ("sample", "dev")])
def test_streaming_errors_are_those_of_reading(source, split):
    messages = []
    for streaming in (False, True):
        with pytest.raises(ValueError) as caught:
            load_images(source, split, streaming=streaming)
        messages.append(str(caught.value).partition("(")[0])
    assert messages[0] == messages[1]


def test_photos_are_turned_upright(tmp_path):
    """A picture stored on its side, with the EXIF tag that says so."""
    upright = Image.fromarray(np.arange(32, dtype=np.uint8).reshape(4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "0.png", exif=exif)
    assert np.array_equal(ImageData.of([tmp_path / "0.png"]).decode(0), upright)


class TestSplit:
    def test_every_class_keeps_its_share_and_every_image_its_side(self, normal):
        data = ImageData(normal(48, 1, 8, 8), np.arange(48) % 4)
        train, validation = split_train_validation(data, 0.25, 0)
        assert np.bincount(validation.labels).tolist() == [3, 3, 3, 3]
        assert np.bincount(train.labels).tolist() == [9, 9, 9, 9]
        pictures = torch.stack([part.decode(index) for part in (train, validation) for index in range(len(part))])
        assert torch.equal(pictures.unique(dim=0), data.items.unique(dim=0))
        again = split_train_validation(data, 0.25, 0)[1]
        assert torch.equal(torch.stack(again.items), torch.stack(validation.items))

    def test_without_labels(self, normal):
        train, validation = split_train_validation(ImageData(normal(10, 1, 8, 8)), 0.2, 0)
        assert (len(train), len(validation)) == (8, 2)

    @pytest.mark.parametrize("share", [0.0, 1.0, 3])
    def test_share_is_checked(self, normal, share):
        with pytest.raises(ValueError, match="share must be between 0 and 1"):
            split_train_validation(ImageData(normal(10, 1, 8, 8)), share, 0)

    def test_a_class_of_one_image_is_an_error(self, normal):
        with pytest.raises(ValueError, match=r"cannot hold out 0\.2 of the 10 images of images"):
            split_train_validation(ImageData(normal(10, 1, 8, 8), np.arange(10)), 0.2, 0)


def test_sample_is_what_its_card_says():
    sizes = {split: len(load_images("sample", split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 4000, "validation": 1000, "test": 2000}
    data = ImageData.of("sample")
    assert np.bincount(data.labels).tolist() == [400] * 10
    assert data.label_names[9] == "Ankle boot"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_from_workers(folder, make_config, num_workers):
    config, data = make_config(**GREY), ImageData.of(folder)
    state = torch.get_rng_state()
    batches = list(data.batches(config, 4, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)
    expected = image_pixels(config)([data.decode(index) for index in range(len(data))])
    assert torch.equal(torch.cat(batches), expected)
