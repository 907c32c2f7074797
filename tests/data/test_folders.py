"""Folders: what is a class, what a split, and what is left out; a path is what it says, whatever its characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from aselect_hf.data.folders import SPLIT_OF
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images


def write(folder: Path, *files: str) -> Path:
    """Images of 4 x 4 pixels, each of its own gray."""
    for index, file in enumerate(files):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), index, np.uint8)).save(path)
    return folder


def classes(dataset: Any) -> dict[str, int]:
    names = dataset.features["label"].names
    return {name: dataset["label"].count(index) for index, name in enumerate(names)}


@pytest.mark.parametrize("word", sorted(SPLIT_OF))
@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_may_be_named_like_a_split(tmp_path: Path, word: str, streaming: bool, caplog: Any) -> None:
    write(
        tmp_path, "bus/0.png", f"bus/my {word} 1.png", "car/0.png", "car/1.png", f"{word}/0.png", f"{word}/{word}.png"
    )
    found = load_images(tmp_path, streaming=streaming)
    assert sorted(found.features["label"].names) == sorted(["bus", "car", word])
    assert [row["label"] for row in found] == [0, 0, 1, 1, 2, 2]
    assert f"{word}: read as classes" in caplog.text


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train", "val"), ("training", "dev"), ("train", "validation"), ("Train", "VAL"), ("train2017", "val2017")],
)
def test_splits_with_and_without_classes(tmp_path: Path, train: str, validation: str) -> None:
    write(
        tmp_path / "classes", f"{train}/a/0.png", f"{train}/b/1.png", f"{validation}/a/2.png", f"{validation}/b/3.png"
    )
    write(tmp_path / "flat", f"{train}/0.png", f"{train}/1.png", f"{validation}/2.png")
    assert classes(load_images(tmp_path / "classes", validation)) == {"a": 1, "b": 1}
    assert classes(load_images(tmp_path / "classes", "validation")) == {"a": 1, "b": 1}
    for split, count in ((None, 2), (train, 2), ("train", 2), (validation, 1), ("validation", 1)):
        data = ImageData.of(tmp_path / "flat", split=split)
        assert (len(data), data.labels) == (count, None)
    with pytest.raises(ValueError, match=f"flat' has no split 'test'; it has {train}, {validation}"):
        load_images(tmp_path / "flat", "test")


def test_one_split_alone(tmp_path: Path) -> None:
    write(tmp_path, "val/a/0.png", "val/b/1.png")
    assert classes(load_images(tmp_path)) == {"a": 1, "b": 1}
    with pytest.raises(ValueError, match="has no split 'train'; it has val"):
        load_images(tmp_path, "train")


def test_class_folders_have_no_other_split(tmp_path: Path) -> None:
    write(tmp_path, "bus/0.png", "train/1.png")
    with pytest.raises(ValueError, match="no split 'validation': its folders are not splits, so all its images"):
        load_images(tmp_path, "validation")


@pytest.mark.parametrize("split", [None, "train", "val"])
@pytest.mark.parametrize("other", ["runs/x/0.png", "runs/0.png"])
def test_splits_beside_other_folders_are_refused(tmp_path: Path, split: str | None, other: str) -> None:
    write(tmp_path, "train/a/0.png", "train/b/0.png", "val/a/0.png", "val/b/0.png", other)
    with pytest.raises(ValueError, match=r"named like splits \(train, val\) beside others \(runs\)"):
        load_images(tmp_path, split)


def test_folders_that_may_be_splits_or_classes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train_images/0.png", "test_images/1.png")
    with pytest.raises(ValueError, match=r"may be splits or classes \(test_images, train_images\)"):
        load_images(tmp_path)
    write(tmp_path, "photos/0.png")
    assert len(classes(load_images(tmp_path))) == 3


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: Any) -> None:
    write(tmp_path, "cat/0.png", "dog/1.png", "dog/more/2.png", "3.png", "4.png")
    for name in ("cat/notes.txt", "cat/0.heic", "README.md", ".hidden"):
        (tmp_path / name).write_text("x")
    assert classes(load_images(tmp_path)) == {"cat": 1, "dog": 2}
    assert "2 files are not images (.heic, .txt): not used" in caplog.text
    assert "2 images lie beside the class folders: not used" in caplog.text


def test_a_folder_of_one_folder_is_that_folder(tmp_path: Path) -> None:
    write(tmp_path / "nested", "data/images/a/0.png", "data/images/b/1.png")
    assert classes(load_images(tmp_path / "nested")) == {"a": 1, "b": 1}
    write(tmp_path / "flat", "photos/0.png", "photos/1.png")
    assert ImageData.of(tmp_path / "flat").labels is None
    write(tmp_path / "wrapped", "data/train/a/0.png", "data/train/b/1.png", "data/test/a/2.png")
    assert len(load_images(tmp_path / "wrapped", "test")) == 1


def test_classes_that_are_not_clear_are_not_used(tmp_path: Path, caplog: Any) -> None:
    write(tmp_path, "cat/indoor/0.png", "cat/outdoor/1.png", "dog/indoor/2.png")
    data = ImageData.of(tmp_path)
    assert (len(data), data.labels) == (3, None)
    assert "it is unclear which folders are classes" in caplog.text


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, "a/0.png", "b/1.png"))
    data = ImageData.of(".")
    monkeypatch.chdir("/")
    assert [data.decode(index).getpixel((0, 0)) for index in range(2)] == [0, 1]


@pytest.mark.parametrize("content", ["nothing", "text", "empty folders"])
def test_a_folder_without_images_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    if content == "text":
        (tmp_path / "set" / "a" / "x.txt").write_text("x")
    with pytest.raises(ValueError, match=r"set' holds neither images nor tables; found (nothing|1 \.txt)"):
        load_images(tmp_path / "set")


@pytest.mark.parametrize("name", ["photos [2024]", "a*b?", "a::b", "it's (1)", "[!x]", "ünï", "test", "~"])
@pytest.mark.parametrize("kind", ["images", "flat", "metadata", "parquet", "saved"])
def test_a_path_is_what_it_says(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).mkdir()
    folder = tmp_path / "plain" if kind in ("parquet", "saved") else tmp_path / name / "set"
    write(folder, *(["a/0.png", "b/1.png"] if kind == "images" else ["0.png", "1.png"]))
    if kind == "metadata":
        lines = [json.dumps({"file_name": f"{index}.png", "label": index}) for index in range(2)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    if kind in ("parquet", "saved"):
        dataset, plain = load_images(folder), tmp_path / kind
        plain.mkdir()
        dataset.save_to_disk(str(plain)) if kind == "saved" else dataset.to_parquet(plain / "x.parquet")
        folder = plain.rename(tmp_path / name / kind)
    if name == "a::b" and kind not in ("images", "flat"):
        with pytest.raises(ValueError, match="'::'"):
            ImageData.of(folder)
        return
    data = ImageData.of(folder)
    assert [data.decode(index).getpixel((0, 0)) for index in range(2)] == [0, 1]
    assert (data.labels is not None) == (kind in ("images", "metadata"))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "photos", "a/0.png", "b/1.png")
    assert len(load_images("~/photos")) == 2


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "0.png")
    write(tmp_path / "set", "a/0.png")
    (tmp_path / "set" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    assert classes(load_images(tmp_path / "set")) == {"a": 1, "b": 1}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_names_its_images(tmp_path: Path, kind: str, caplog: Any) -> None:
    write(tmp_path, "train/0.png", "train/1.png", "train/test_2.png", "val/3.png")
    rows = [("0.png", 5), ("test_2.png", 7)]
    if kind == "csv":
        text = "file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows)
    else:
        text = "".join(json.dumps({"file_name": name, "label": label}) + "\n" for name, label in rows)
    (tmp_path / "train" / f"metadata.{kind}").write_text(text)
    found = load_images(tmp_path)
    assert found["label"][:] == [5, 7]
    assert [np.asarray(image)[0, 0] for image in found["image"]] == [0, 2]
    assert "1 images are not named by the metadata" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("above", ["", "data/"])
@pytest.mark.parametrize("below", ["", "images/"])
def test_metadata_above_splits_is_shared_among_them(tmp_path: Path, streaming: bool, above: str, below: str) -> None:
    names = [f"{split}/{index}.png" for split in ("train", "val") for index in range(3)]
    write(tmp_path / above / below, *names)
    rows = [{"file_name": below + name, "label": "ab"[index % 2]} for index, name in enumerate(names)]
    (tmp_path / above / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split, first in (("train", 0), ("validation", 3)):
        found = [
            (row["image"].getpixel((0, 0)), row["label"]) for row in load_images(tmp_path, split, streaming=streaming)
        ]
        assert found == [(index, "ab"[index % 2]) for index in range(first, first + 3)]


def test_metadata_may_lie_above_the_folder_of_images(tmp_path: Path) -> None:
    write(tmp_path, "images/0.png", "images/1.png")
    rows = [{"file_name": f"images/{index}.png", "label": "ab"[index]} for index in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert ImageData.of(tmp_path).class_names == ["a", "b"]


@pytest.mark.parametrize("images", [("images/0.png", "images/1.png"), ("train/0.png", "test/1.png")])
def test_a_table_beside_the_folders_of_images_is_counted(tmp_path: Path, images: tuple[str, str], caplog: Any) -> None:
    write(tmp_path, *images)
    (tmp_path / "labels.csv").write_text("image,label\n0.png,1\n")
    load_images(tmp_path)
    assert caplog.text.count("1 files are not images (.csv): not used") == 1


def test_tables_are_split_by_their_names_or_read_whole(tmp_path: Path) -> None:
    def table(name: str, *values: int) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict({"x": values}).to_parquet(tmp_path / name)

    table("splits/train-00000-of-00002.parquet", 1)
    table("splits/train-00001-of-00002.parquet", 2)
    table("splits/test.parquet", 3)
    assert load_images(tmp_path / "splits")["x"][:] == [1, 2]
    assert load_images(tmp_path / "splits", "test")["x"][:] == [3]
    table("words/buses.parquet", 1)
    table("words/the-test-drive.parquet", 2)
    assert load_images(tmp_path / "words")["x"][:] == [1, 2]
    table("mixed/train.parquet", 1)
    table("mixed/more.parquet", 2)
    with pytest.raises(ValueError, match=r"holds splits \(train\) beside other .parquet files \(more.parquet\)"):
        load_images(tmp_path / "mixed")


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "0.png")
    with pytest.raises(ValueError, match=r"0\.png' is a file; give the folder that holds it"):
        load_images(tmp_path / "0.png")


def test_saved_splits_keep_their_names(tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"x": [1]})
    datasets.DatasetDict({"fold0": part, "fold1": part}).save_to_disk(str(tmp_path))
    assert len(load_images(tmp_path, "fold1")) == 1
    with pytest.raises(ValueError, match="no split 'train'; it has fold0, fold1"):
        load_images(tmp_path)
    (tmp_path / "dataset_dict.json").write_text("[")
    with pytest.raises(ValueError, match=r"dataset_dict\.json does not list the splits that save_to_disk wrote"):
        load_images(tmp_path)
