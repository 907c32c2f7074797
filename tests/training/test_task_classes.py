"""Classes of training, validation and test images in the task scripts, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.splits import share_mask_classes
from aselect_hf.tasks import CLASSIFICATION, SEGMENTATION, Task
from aselect_hf.training.arguments import TaskDataArguments, TrainingArguments
from aselect_hf.training.batches import StreamBatches
from aselect_hf.training.task_data import load_task_data
from aselect_hf.training.task_dataset import stream_collate

NAMES = ["ant", "bee", "cat", "dog"]


@pytest.fixture
def write(tmp_path) -> Callable[..., str]:
    """`write(train=labels, validation=labels)`: a data set on disk; `feature`: of the labels. Returns its folder."""

    def write(feature: Any = None, **splits: Any) -> str:
        written = datasets.DatasetDict()
        for split, labels in splits.items():
            rows = {"image": [Image.new("L", (2, 2), row % 256) for row in range(len(labels))]}
            dataset = datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image()}))
            written[split] = dataset.add_column("label", list(labels), feature=feature)
        folder = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        written.save_to_disk(str(folder))
        return str(folder)

    return write


def load(source: str, seed: int = 0, task: Task = CLASSIFICATION, **arguments: Any):
    given = {"dataset_name": source, "validation_split": "validation", "cache_dir": f"{source}-cache"} | arguments
    return load_task_data(TaskDataArguments(**given), task, seed)


def named(data) -> list[str]:
    return [data.label_names[label] for label in data.labels]


def test_text_keeps_its_class_where_a_split_lacks_one(write):
    data = load(write(train=NAMES * 3, validation=["dog", "bee"] * 2, test=["cat"]), test_split="test")
    assert data.label_names == data.validation.label_names == data.test.label_names == NAMES
    assert [named(part) for part in (data.train, data.validation, data.test)] == [
        NAMES * 3, ["dog", "bee"] * 2, ["cat"]
    ]  # fmt: skip


def test_sparse_integers_keep_their_number_as_name(write):
    data = load(write(train=[5, 900_000_000, 1000, 5], validation=[1000]))
    assert data.label_names == ["5", "1000", "900000000"]
    assert data.train.labels.tolist() == [0, 2, 1, 0]
    assert named(data.validation) == ["1000"]


@pytest.mark.parametrize(("train", "validation", "unknown"), [([0, 1], [1, 7], "7"), (["a", "b"], ["c"], "c")])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_class_that_training_lacks_is_refused_before_any_work(write, train, validation, unknown, split):
    source = write(**{"train": train * 2, "validation": train, "test": train, split: validation})
    with pytest.raises(ValueError, match=f"the {split} images .* have the class '{unknown}', which the training"):
        load(source, test_split="test")


@pytest.mark.parametrize("missing", [-1, None])
def test_images_without_a_label_do_not_train(write, missing, caplog):
    data = load(write(train=[0, 1, missing] * 4, validation=[0, missing, 1]))
    assert data.label_names == ["0", "1"]
    assert data.train.labels.tolist() == [0, 1] * 4
    assert data.validation.labels.tolist() == [0, 1]
    assert "4 of 12 images" in caplog.text
    with pytest.raises(ValueError, match="has no labels: all 3 are missing"):
        load(write(train=[missing] * 3 if missing else np.array([-1] * 3), validation=[0]))


@pytest.mark.parametrize("labels", [[[0, 1], [1, 0]] * 4, np.linspace(0, 1, 50)], ids=["several", "regression"])
def test_labels_that_are_no_classes_are_described(write, labels):
    with pytest.raises(ValueError, match=r"has no labels: the labels in column 'label' of .*give one class per image"):
        load(write(train=labels, validation=labels))


def test_samples_of_sorted_images_have_every_class(write):
    source = write(train=np.repeat(range(4), 50), validation=np.repeat(range(4), 20), test=np.repeat(range(4), 20))
    sizes = {"max_train_samples": 40, "max_eval_samples": 8, "max_test_samples": 12}
    data, again, other = (load(source, seed, test_split="test", **sizes) for seed in (0, 0, 1))
    for part, count in ((data.train, 10), (data.validation, 2), (data.test, 3)):
        assert np.bincount(part.labels).tolist() == [count] * 4
    assert data.validation.labels.tolist() == again.validation.labels.tolist()
    pixels = [[part.validation.decode(row).getpixel((0, 0)) for row in range(8)] for part in (data, again, other)]
    assert pixels[0] == pixels[1] != pixels[2]


def test_classes_are_those_of_all_training_images(write):
    """Also of those that no sample has room for."""
    data = load(write(train=NAMES * 5, validation=NAMES), max_train_samples=3)
    assert data.label_names == NAMES
    assert len(data.validation) == 4


class TestStreams:
    @pytest.fixture
    def source(self, write) -> str:
        labels = {"train": [*np.repeat(range(4), 30), -1], "validation": np.repeat(range(4), 10)}
        return write(datasets.ClassLabel(names=NAMES), **labels)

    def test_rows_are_shuffled(self, source):
        data = load(source, streaming=True, num_streamed_images=40, max_eval_samples=16)
        order = [row["label"] for row in data.stream]
        assert sorted(order) == [0] * 30 + [1] * 30 + [2] * 30 + [3] * 30  # without the unlabeled one
        for labels in (order[:30], data.train.labels, data.validation.labels):
            assert (np.bincount(labels, minlength=4) > 0).all()
        other = load(source, 1, streaming=True)
        assert [row["label"] for row in other.stream] != order

    def test_a_resumed_run_reads_the_very_same_batches(self, source, make_config):
        data_args = {"streaming": True, "shuffle_buffer_size": 25}
        args = TrainingArguments(output_dir="unused", per_device_train_batch_size=7, max_train_steps=40)

        def batches(state: dict[str, int] | None, step: int, count: int) -> list[list[int]]:
            data = load(source, **data_args)
            arguments = TaskDataArguments(dataset_name=source, streaming=True)
            config = make_config(num_channels=1)
            collate = stream_collate(config, arguments, CLASSIFICATION, data)
            found = StreamBatches(data.stream, collate, args, Accelerator(cpu=True), 0)
            found.state = state or found.state
            taken = [batch["labels"].tolist() for _, _, batch in islice(found.from_step(step), count)]
            states.append(found.state)
            return taken

        states: list[dict[str, int]] = []
        whole = batches(None, 0, 40)
        assert len({tuple(batch) for batch in whole[:17]} & {tuple(batch) for batch in whole[17:34]}) < 5
        assert batches(None, 0, 23) == whole[:23]
        assert batches(states[-1], 23, 17) == whole[23:]

    @pytest.mark.parametrize("labels", [[0, 1, 2, 3] * 3, NAMES * 3], ids=["integers", "text"])
    def test_classes_are_given_or_refused(self, write, make_config, labels):
        source = write(train=labels, validation=labels)
        with pytest.raises(ValueError, match=r"classes of a stream must be known before it is read.*give --classes"):
            load(source, streaming=True)
        classes = ["4"] if labels[0] == 0 else NAMES[::-1]
        data = load(source, streaming=True, classes=classes)
        assert data.label_names == ([*"0123"] if labels[0] == 0 else NAMES[::-1])
        collate = stream_collate(make_config(num_channels=1), TaskDataArguments(), CLASSIFICATION, data)
        rows = list(data.stream)
        found = [data.label_names[label] for label in collate(rows)["labels"]]
        assert found == [str(row["label"]) for row in rows]

    def test_the_split_without_labels_is_named(self, write):
        feature = datasets.ClassLabel(names=["a", "b"])
        source = write(feature, train=[0, 1] * 4, validation=[-1] * 4)
        with pytest.raises(ValueError, match=r"the stream of .* \(validation\) has no labels: all 4 are missing"):
            load(source, streaming=True)

    def test_a_sample_of_a_stream_is_not_taken_and_that_is_said(self, source, caplog):
        data = load(source, streaming=True, num_streamed_images=40, max_train_samples=10)
        assert len(data.train) in (39, 40)  # one of all has no label
        assert "max_train_samples is ignored with --streaming" in caplog.text


class TestMasks:
    @pytest.fixture
    def folder(self, tmp_path) -> Callable[..., str]:
        """`folder(train=[values, ...], validation=...)`: images with masks whose left and right halves are a value."""

        def write(names: dict | None = None, **splits: list[tuple[int, int]]) -> str:
            for split, halves in splits.items():
                path = tmp_path / "masks" / split
                path.mkdir(parents=True)
                rows = []
                for row, values in enumerate(halves):
                    mask = np.repeat([values], 4, axis=0).repeat(2, axis=1)
                    Image.new("L", (4, 4)).save(path / f"{row}.png")
                    kind = np.uint16 if mask.max() > 255 else np.uint8
                    Image.fromarray(mask.astype(kind)).save(path / f"{row}_mask.png")
                    rows.append({"image_file_name": f"{row}.png", "mask_file_name": f"{row}_mask.png"})
                (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
            if names:
                (tmp_path / "masks" / "id2label.json").write_text(json.dumps(names))
            return str(tmp_path / "masks")

        return write

    @pytest.mark.parametrize("names", [None, {0: "background", 1: "lesion"}], ids=["unnamed", "named"])
    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_binary_masks_of_255_are_refused(self, folder, names, split):
        halves = {"train": [(0, 1)] * 4, "validation": [(0, 1)] * 2} | {split: [(0, 255), (0, 0)]}
        message = "hold only 0 and 255, and 255 marks ignored pixels: divide the masks by 255"
        with pytest.raises(ValueError, match=message):
            load(folder(names, **halves), task=SEGMENTATION)

    @pytest.mark.parametrize("given", ["id2label.json", "--classes"])
    def test_255_is_a_class_where_it_has_a_name(self, folder, given):
        names = {0: "background", 255: "lesion"}
        halves = {"train": [(0, 255), (0, 0)], "validation": [(255, 0)]}
        source = folder(names if given == "id2label.json" else None, **halves)
        classes = [f"{value}={name}" for value, name in names.items()] if given == "--classes" else None
        data = load(source, task=SEGMENTATION, classes=classes)
        assert data.label_names == ["background", "lesion"]
        assert data.train.mask(0).tolist() == [[0, 0, 1, 1]] * 4
        assert data.validation.mask(0).tolist() == [[1, 1, 0, 0]] * 4

    def test_sparse_values_are_classes_with_their_value_as_name(self, folder):
        source = folder(train=[(0, 1000), (2000, 255)], validation=[(2000, 0)])
        data = load(source, task=SEGMENTATION)
        assert data.label_names == ["0", "1000", "2000"]
        assert data.train.mask(1).tolist() == [[2, 2, 255, 255]] * 4
        assert data.validation.mask(0).tolist() == [[2, 2, 0, 0]] * 4

    def test_every_mask_counts(self):
        masks = np.zeros((600, 2, 2), dtype=np.uint8)
        masks[:, 0], masks[[1, 598]] = 1, 2
        splits = {"training": ImageData(torch.zeros(600, 1, 2, 2), masks=masks)}
        assert share_mask_classes(splits, progress=False)["training"].mask_names == ["0", "1", "2"]
        assert splits["training"].num_mask_classes() == 3

    def test_names_may_repeat(self, folder):
        data = load(
            folder({0: "door", 1: "wall", 2: "door"}, train=[(0, 1)] * 3, validation=[(2, 0)]), task=SEGMENTATION
        )
        assert data.label_names == ["door", "wall", "door"]
        assert data.validation.mask(0).tolist() == [[2, 2, 0, 0]] * 4

    def test_masks_are_read_once(self, folder, monkeypatch):
        source = folder(train=[(0, 1)] * 3, validation=[(1, 0)])
        names = load(source, task=SEGMENTATION).label_names
        monkeypatch.setattr(ImageData, "_read_mask_values", lambda *_: pytest.fail("read again"))
        assert load(source, task=SEGMENTATION).label_names == names

    def test_no_mask_of_a_set_that_is_split_is_read_twice_for_its_classes(self, folder, monkeypatch):
        read = ImageData._mask_pixels
        rows = []
        monkeypatch.setattr(ImageData, "_mask_pixels", lambda data, at: (rows.append(data.rows[at]), read(data, at))[1])
        load(folder(train=[(0, 1)] * 8), task=SEGMENTATION, validation_split=None, max_train_samples=6)
        assert sorted(rows) == [*range(8)]

    def test_a_value_without_a_name_is_told_from_those_with_one(self, folder):
        source = folder({0: "wall", 1: "door"}, train=[(0, 1), (2, 0)], validation=[(0, 1)])
        with pytest.raises(ValueError, match=r"hold the class '2', but the named classes are 'wall', 'door'"):
            load(source, task=SEGMENTATION)

    def test_a_class_of_held_out_masks_only_is_refused(self, folder):
        source = folder(train=[(0, 1)] * 3, validation=[(0, 2)])
        with pytest.raises(ValueError, match=r"the validation masks .* hold the class '2', but the training masks"):
            load(source, task=SEGMENTATION)
        assert load(source, task=SEGMENTATION, classes=["3"]).label_names == ["0", "1", "2"]

    def test_names_in_another_order_are_matched(self, folder, tmp_path):
        source = Path(folder({0: "sky", 1: "tree"}, train=[(0, 1)] * 3))
        (source.parent / "masks").rename(source.parent / "training")
        held_out = folder({0: "tree", 1: "sky"}, validation=[(0, 1)])
        data = load(str(source.parent / "training"), task=SEGMENTATION, validation_split=None, validation_dir=held_out)
        assert data.validation.mask_names == ["sky", "tree"]
        assert data.validation.mask(0).tolist() == [[1, 1, 0, 0]] * 4

    def test_a_named_class_without_pixels_is_reported(self, folder, caplog):
        load(folder({0: "sky", 1: "tree", 2: "car"}, train=[(0, 1)] * 3, validation=[(0, 0)]), task=SEGMENTATION)
        assert "no pixel of the training masks" in caplog.text
        assert "has the class 'car'" in caplog.text
        assert "has the classes 'tree', 'car'" in caplog.text

    def test_reduced_labels_ignore_0_of_sparse_values_too(self, folder):
        source = folder(train=[(0, 10), (20, 255)], validation=[(10, 0)])
        data = load(source, task=SEGMENTATION, reduce_labels=True)
        assert data.label_names == ["10", "20"]
        assert data.train.mask(0).tolist() == [[255, 255, 0, 0]] * 4

    def test_more_classes_than_ignored_leaves_room_for_are_refused(self):
        masks = np.arange(280).reshape(70, 2, 2)
        with pytest.raises(ValueError, match="the masks hold 279 classes, but at most 255"):
            share_mask_classes({"training": ImageData(torch.zeros(70, 1, 2, 2), masks=masks)}, progress=False)
