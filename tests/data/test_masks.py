"""Segmentation masks from every source, what is wrong with some of them, and one class a token."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.images import image_pixels
from aselect_hf.data.masks import resize_mask, token_labels
from aselect_hf.data.sources import load_images, load_mask_names
from aselect_hf.modeling.image_processing_aselect_dit import IGNORED

SHAPE = (6, 8)
NAMES = ["sky", "tree", "car"]


@pytest.fixture
def classes() -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.choice([0, 1, 2, IGNORED], SHAPE).astype(np.uint8) for _ in range(5)]


@pytest.fixture
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, SHAPE, dtype=np.uint8)) for _ in range(5)]


def as_dataset(pictures: list[Image.Image], masks: list[Any], column: str = "mask") -> datasets.Dataset:
    rows = {"image": pictures, column: [m if isinstance(m, Image.Image) else Image.fromarray(m) for m in masks]}
    features = datasets.Features({"image": datasets.Image(), column: datasets.Image()})
    return datasets.Dataset.from_dict(rows, features)


@pytest.fixture
def folder(pictures, classes, tmp_path: Path) -> Path:
    """Pictures and palette masks as files, in a `metadata.jsonl`."""
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = []
    for index, (picture, mask) in enumerate(zip(pictures, classes, strict=True)):
        picture.save(folder / f"{index}.png")
        painted = Image.fromarray(mask, "P")
        painted.putpalette(np.random.default_rng(2).integers(0, 256, 768).tolist())
        painted.save(folder / f"{index}_mask.png")
        lines.append({"image_file_name": f"{index}.png", "mask_file_name": f"{index}_mask.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def masks_of(data: ImageData) -> list[list[list[int]]]:
    return [data.mask(index).tolist() for index in range(len(data))]


def test_every_source_gives_the_same_masks(pictures, classes, folder, tmp_path):
    dataset = as_dataset(pictures, classes)
    dataset.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    expected = [mask.tolist() for mask in classes]
    for source in (dataset, folder, tmp_path / "saved", tmp_path / "parquet"):
        data = ImageData.of(source)
        assert masks_of(data) == expected, source
        assert data.mask(0).dtype == np.int64
        assert data.labels is None
    assert masks_of(ImageData(pictures, masks=[mask.astype(np.int64) for mask in classes])) == expected
    assert masks_of(ImageData(torch.zeros(5, 1, *SHAPE), masks=np.stack(classes))) == expected


@pytest.mark.parametrize("column", ["mask", "annotation", "segmentation", "label"])
def test_the_column_of_masks_is_found(pictures, classes, column):
    assert ImageData.of(as_dataset(pictures, classes, column)).mask(3).tolist() == classes[3].tolist()


def test_a_column_of_labels_is_no_column_of_masks(pictures, classes):
    dataset = as_dataset(pictures, classes, "painted").add_column("label", [0, 1, 0, 1, 0])
    data = ImageData.of(dataset)
    assert data.masks is None
    assert data.labels.tolist() == [0, 1, 0, 1, 0]
    both = ImageData.of(dataset, mask_column="painted")
    assert both.mask(2).tolist() == classes[2].tolist()
    assert both.labels.tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"mask_column 'label' is not a column of images \(those are image, painted"):
        ImageData.of(dataset, mask_column="label")


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16"])
def test_modes_of_masks(pictures, classes, mode):
    if mode == "P":
        mask = Image.fromarray(classes[0], "P")
    else:
        mask = Image.fromarray(classes[0].astype({"L": np.uint8, "I": np.int32, "I;16": np.uint16}[mode]))
    assert mask.mode == mode
    data = ImageData.of(as_dataset(pictures[:1], [mask]))
    assert data.mask(0).tolist() == classes[0].tolist()


def test_reduced_labels_ignore_class_0(pictures, classes):
    data = ImageData.of(as_dataset(pictures, classes), reduce_labels=True)
    shifted = {0: IGNORED, 1: 0, 2: 1, IGNORED: IGNORED}
    expected = [[[shifted[value] for value in row] for row in mask.tolist()] for mask in classes]
    assert masks_of(data) == expected
    assert masks_of(data.subset([4, 1])) == [expected[4], expected[1]]
    assert data.num_mask_classes() == 2


def test_masks_follow_their_images(pictures, classes):
    for data in (ImageData.of(as_dataset(pictures, classes)), ImageData(pictures, masks=classes)):
        sampled = data.sample(3, 0)
        for index in range(3):
            image, mask = sampled.pair(index)
            original = next(i for i, picture in enumerate(pictures) if np.array_equal(picture, image))
            assert mask.tolist() == classes[original].tolist()


def test_names_come_from_the_folder(folder):
    assert ImageData.of(folder).mask_names is None
    assert ImageData.of(folder).num_mask_classes() == 3
    (folder / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))
    data = ImageData.of(folder)
    assert data.mask_names == data.subset([0]).mask_names == NAMES
    assert data.num_mask_classes() == 3
    (folder / "id2label.json").write_text('{"1": "sky"}')
    with pytest.raises(ValueError, match=r"id2label.json must name classes by number"):
        ImageData.of(folder)
    assert load_mask_names("someone/unreachable") is None


def test_a_class_without_a_name_is_an_error(pictures, classes):
    data = ImageData.of(as_dataset(pictures, classes), mask_names=NAMES[:2])
    with pytest.raises(ValueError, match="mask 0 of images holds the class 2, but only 2 classes have names"):
        data.mask(0)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("RGB", SHAPE[::-1]), "mask 1 of images has mode RGB: a mask must have one channel"),
        (Image.new("LA", SHAPE[::-1]), "mask 1 of images has mode LA"),
        (Image.new("L", SHAPE), "mask 1 of images is 8 x 6 pixels, its image 6 x 8"),
        (Image.new("I", SHAPE[::-1], -1), "mask 1 of images holds the negative class -1"),
        (np.zeros(SHAPE), "mask 1 of images must be integers"),
    ],
    ids=["colors", "transparent", "turned", "negative", "floats"],
)
def test_bad_masks_are_named_and_can_be_skipped(pictures, classes, mask, message):
    data = ImageData(pictures, masks=[classes[0], mask, *classes[2:]])
    with pytest.raises(ValueError, match=message):
        masks_of(data)
    assert masks_of(data.readable("skip")) == [classes[index].tolist() for index in (0, 2, 3, 4)]


def test_unreadable_mask_file_is_named(folder):
    (folder / "1_mask.png").write_bytes(b"")
    data = ImageData.of(folder)
    with pytest.raises(ValueError, match=r"1_mask\.png cannot be read as an image"):
        data.mask(1)
    assert len(data.readable("skip")) == 4


def test_requests_that_need_masks(pictures):
    with pytest.raises(ValueError, match="images has no masks"):
        ImageData(pictures).mask(0)
    with pytest.raises(ValueError, match="4 masks for 5 images"):
        ImageData(pictures, masks=[0] * 4)
    bare = as_dataset(pictures, pictures).remove_columns("mask")
    with pytest.raises(ValueError, match="has no column of masks"):
        ImageData.of(bare, reduce_labels=True)


def test_a_photo_on_its_side_fits_an_upright_mask(pictures, classes, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures[0].transpose(Image.Transpose.ROTATE_90).save(tmp_path / "0.png", exif=exif)
    image, mask = ImageData([tmp_path / "0.png"], masks=classes[:1]).pair(0)
    assert np.array_equal(image, pictures[0])
    assert mask.tolist() == classes[0].tolist()


class TestSample:
    def test_masks_are_what_the_labels_say(self):
        data = ImageData.of("sample", split="validation", masks=True)
        assert data.mask_names == ["background", *data.label_names]
        assert data.num_mask_classes() == 11
        for index in (0, 17, 999):
            image, mask = data.pair(index)
            expected = np.where(np.asarray(image) > 0, data.labels[index] + 1, 0)
            assert np.array_equal(mask, expected)
            assert set(np.unique(mask)) == {0, data.labels[index] + 1}

    def test_without_asking_there_are_none(self):
        assert ImageData.of("sample").masks is None

    def test_streamed(self):
        row = next(iter(load_images("sample", "validation", masks=True, streaming=True)))
        first = ImageData.of("sample", split="validation", masks=True).mask(0)
        assert np.array_equal(row["mask"], first)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_and_mask_are_resized_alike(make_config, channels):
    """A dark quarter of a wide image, marked in the mask: the same quarter of the square."""
    array, mask = np.full((20, 40), 255, dtype=np.uint8), np.zeros((20, 40), dtype=np.int64)
    array[10:, :20], mask[10:, :20] = 0, 7
    config = make_config(num_channels=channels)
    pixels = image_pixels(config, whole_image=True)([Image.fromarray(array).convert("RGB")])
    assert pixels.shape == (1, channels, 8, 8)
    resized = resize_mask(mask, config.image_size)
    assert resized.dtype == torch.int64
    assert torch.equal(pixels[0, 0] < 0, resized == 7)
    tensors = [torch.zeros(channels, 8, 8)] * 2
    assert torch.equal(image_pixels(config, whole_image=True)(tensors), torch.stack(tensors))


@pytest.mark.parametrize("size", [(3, 5), (8, 8), (20, 11)])
def test_nearest_is_that_of_pillow(classes, size):
    expected = Image.fromarray(classes[0]).resize(size[::-1], Image.Resampling.NEAREST)
    assert np.array_equal(resize_mask(classes[0].astype(np.int64), size), expected)


@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_token_label_is_the_commonest_class_of_its_patch(data, height, width, tall, wide):
    shape = (height * tall, width * wide)
    values = data.draw(st.lists(st.sampled_from([0, 1, 2, 300, IGNORED]), min_size=shape[0] * shape[1],
                                max_size=shape[0] * shape[1]))  # fmt: skip
    mask = np.array(values).reshape(shape)
    expected = []
    for row in range(height):
        for column in range(width):
            patch = mask[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            counts = Counter(value for value in patch.ravel().tolist() if value != IGNORED)
            expected.append(min(counts, key=lambda c: (-counts[c], c)) if counts else IGNORED)
    assert token_labels(mask, (height, width)).tolist() == expected
