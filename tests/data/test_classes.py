"""What a label is, which images have none, and one numbering for all splits."""

from __future__ import annotations

import datetime
import re

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aselect_hf.data.classes import UNLABELED, has_classes, is_labeled, listed, read_labels, stratified_sample
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.splits import share_classes, split_train_validation

NAMES = ["ant", "bee", "cat", "dog"]
COLUMNS = {
    "integers": ([0, 1, -1, 1], [0, 1, -1, 1], None),
    "ignored by losses": ([0, 1, -100], [0, 1, -1], None),
    "negative": ([7, -3, -13], [7, -3, -13], None),
    "array": (np.array([3, 0], dtype=np.uint8), [3, 0], None),
    "tensor": (torch.tensor([2, -1]), [2, -1], None),
    "None": ([1, None, 0], [1, -1, 0], None),
    "pandas integers beside missing ones": (pd.Series([0, 1, None]).to_numpy(), [0, 1, -1], None),
    "sparse": ([0, 900_000_000, 1000], [0, 900_000_000, 1000], None),
    "text": (["b", "a", None, "", "b"], [1, 0, -1, -1, 1], ["a", "b"]),
    "text of NumPy": (np.array(["b", "a"]), [1, 0], ["a", "b"]),
    "a class called nan": (["nan", "a", float("nan")], [1, 0, -1], ["a", "nan"]),
    "booleans": ([True, None, True], [1, -1, 1], ["False", "True"]),
    "few fractions": ([0.5, 1.5, float("nan"), 0.5], [0, 1, -1, 0], ["0.5", "1.5"]),
    "nothing": ([None, float("nan"), -1, ""], [-1] * 4, None),
}  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS)
def test_any_column_of_classes_is_read(column):
    values, labels, names = COLUMNS[column]
    read, read_names = read_labels(values)
    assert (read.tolist(), read_names) == (labels, names)
    assert read.dtype == np.int64
    assert [is_labeled(value) for value in values] == [label != UNLABELED for label in labels]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0, 1], [1]], r"lists such as \[0, 1\]"),
        (np.eye(3), "one-hot"),
        ([{"name": "a"}, {"name": "b"}], "structs such as {'name': 'a'}"),
        (np.random.default_rng(0).normal(size=300), "continuous numbers.*not classes"),
        (np.random.default_rng(0).integers(0, 1000, 300) / 10 + 0.05, "continuous"),
        ([b"a", b"b"], "bytes such as b'a'"),
        ([datetime.date(2026, 1, 1)], "date such as 2026-01-01"),
        ([0, "a"], "values of several kinds"),
        ([2**70, 1], "hold 1180591620717411303424"),
    ],
    ids=["several classes", "one-hot", "structs", "regression", "rounded regression", "bytes", "dates", "mixed",
         "huge"],
)  # fmt: skip
def test_what_is_no_class_is_refused_with_what_was_found(values, message):
    with pytest.raises(ValueError, match=r"the labels (hold|are)") as caught:
        read_labels(values)
    assert re.search(message, str(caught.value))
    assert "give one class per image" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_beyond_the_names_are_refused():
    with pytest.raises(ValueError, match="hold the class 3, but only 2 classes have names: 'a', 'b'"):
        read_labels([0, 3], ["a", "b"])
    with pytest.raises(ValueError, match="hold the class -3, but only 2 classes have names"):
        read_labels([0, -3], ["a", "b"])
    with pytest.raises(ValueError, match="have the class 'c', which their names lack"):
        read_labels(["a", "c"], ["a", "b"])


def images_of(values, names=None, name="images") -> ImageData:
    return ImageData(torch.zeros(len(values), 1, 2, 2), values, names, name)


def encoded(truth: list[str], how: str, order: list[str]) -> ImageData:
    """The same classes as text, as a ClassLabel in some order, or as numbers of `NAMES`."""
    if how == "text":
        return images_of(truth)
    if how == "classlabel":
        features = datasets.Features({"image": datasets.Value("int64"), "label": datasets.ClassLabel(names=order)})
        rows = {"image": [0] * len(truth), "label": [order.index(name) for name in truth]}
        return ImageData.of(datasets.Dataset.from_dict(rows, features))
    return images_of([NAMES.index(name) for name in truth], NAMES)


@given(st.data())
def test_the_order_of_classes_in_any_split_changes_nothing(data):
    """Every image keeps its class, under the training split's numbers, whatever each split's own numbers are."""
    truth = {"training": data.draw(st.permutations(NAMES * 2))}
    for split in ("validation", "test"):
        truth[split] = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6))
    splits = {
        split: encoded(names, data.draw(st.sampled_from(["text", "classlabel", "numbers"])),
                       data.draw(st.permutations(NAMES)))
        for split, names in truth.items()
    }  # fmt: skip
    own = splits["training"].label_names
    for split, shared in share_classes(splits).items():
        assert shared.label_names == own
        assert [own[label] for label in shared.labels] == truth[split]


@given(st.lists(st.sampled_from([-3, 7, 1000, 900_000_000]), min_size=1, max_size=8))
def test_sparse_integers_become_classes_with_their_number_as_name(held_out):
    splits = share_classes({"training": images_of([1000, -3, 900_000_000, 7, -3]), "test": images_of(held_out)})
    assert splits["training"].label_names == ["-3", "7", "1000", "900000000"]
    assert splits["training"].labels.tolist() == [2, 0, 3, 1, 0]
    assert [splits["test"].label_names[label] for label in splits["test"].labels] == [str(x) for x in held_out]


def test_dense_integers_stay_as_they_are():
    splits = share_classes({"training": images_of([2, 0, 1, 1]), "test": images_of([2, 1])})
    assert [data.labels.tolist() for data in splits.values()] == [[2, 0, 1, 1], [2, 1]]


@pytest.mark.parametrize(
    ("training", "held_out", "unknown"),
    [(["a", "b"], ["a", "zebra"], "zebra"), ([0, 1], [1, 5], "5"), ([False, True], ["True", "maybe"], "maybe"),
     ([0.0, 1.0], [1.5], "1.5")],
)  # fmt: skip
def test_a_class_that_training_lacks_is_refused_by_name(training, held_out, unknown):
    with pytest.raises(ValueError, match=f"the test images .*photos.* have the class '{unknown}', which the training"):
        share_classes({"training": images_of(training), "test": images_of(held_out, name="photos")})


def test_a_whole_number_is_the_same_class_beside_fractions_and_alone():
    splits = share_classes({"training": images_of([0.5, 1.0, 0.5, 1.0]), "test": images_of([1.0, 1.0])})
    assert splits["training"].label_names == ["0.5", "1"]
    assert splits["test"].labels.tolist() == [1, 1]


def test_given_names_decide():
    text = share_classes({"training": images_of(["cat", "ant"])}, NAMES)["training"]
    assert (text.labels.tolist(), text.label_names) == ([2, 0], NAMES)
    assert share_classes({"training": images_of([2, 0])}, NAMES)["training"].labels.tolist() == [2, 0]
    assert share_classes({"training": images_of([20, 10])}, ["10", "20"])["training"].labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="have the class '4', which the given names lack"):
        share_classes({"training": images_of([4])}, NAMES)


def test_classes_without_images_are_reported(caplog):
    names = [*"abcd"]
    share_classes({"training": images_of([0, 1, 2], names), "validation": images_of([0, 1, 3], names)})
    assert "no training image (images) has the class 'd'" in caplog.text
    assert "no validation image (images) has the class 'c'" in caplog.text
    assert "validation images have the class 'd', which no training image has: the predictions for" in caplog.text


@pytest.mark.parametrize("missing", [-1, None, float("nan")])
def test_images_without_a_label_are_left_out_and_counted(missing, caplog):
    data = images_of([0, missing, 1, missing])
    pixels = data.items.clone()
    assert data[1][1] is None
    shared = share_classes({"training": data})["training"]
    assert shared.labels.tolist() == [0, 1]
    assert "2 of 4 images of images have no label: not used" in caplog.text
    assert torch.equal(pixels, data.items)
    assert len(data) == 4
    nothing = images_of([missing] * 3)
    assert nothing.labels is None
    with pytest.raises(ValueError, match="has no labels: all 3 are missing"):
        nothing.labeled()


def test_what_a_leave_one_out_probe_needs():
    assert has_classes(np.array([0, 0, 1, 1]))
    assert not has_classes(np.array([0, 0, 1, -1, -1]))
    assert not has_classes(None)


def test_many_names_are_counted():
    assert listed("abc") == "'a', 'b', 'c'"
    assert listed(range(1000)) == "'0', '1', '2', '3', '4' and 995 more"
    assert listed(["a", "b"], [20, 1]) == "'b' 1, 'a' 20"


class TestSamples:
    @given(
        st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 60), st.integers(0, 5), st.integers(1, 2)
    )
    def test_every_class_keeps_its_share(self, labels, num, seed, per_class):
        labels = np.array(labels)
        rows = stratified_sample(labels, num, seed, per_class)
        assert len(rows) == len(np.unique(rows)) == min(num, len(labels))
        assert np.array_equal(rows, stratified_sample(labels, num, seed, per_class))
        counts, taken = np.bincount(labels, minlength=6), np.bincount(labels[rows], minlength=6)
        reserved = np.minimum(counts, per_class)
        if num >= reserved.sum():
            assert (taken >= reserved).all()
        else:
            assert (taken == reserved)[taken > 0].sum() >= (taken > 0).sum() - 1  # whole classes, and part of one
        if num < len(labels):
            share = num / len(labels)
            over = taken > np.maximum(reserved, np.ceil(counts * share) + 1)
            assert not over.any()

    def test_the_order_is_random(self):
        labels = np.repeat([0, 1], 500)
        rows = stratified_sample(labels, 200, 0)
        assert 30 < labels[rows][:100].sum() < 70
        assert rows.tolist() != stratified_sample(labels, 200, 1).tolist()

    def test_of_sorted_images_every_class_is_there(self):
        data = images_of(np.repeat(np.arange(10), 30))
        assert np.bincount(data.sample(50, 0, per_class=1).labels).tolist() == [5] * 10


class TestHeldOut:
    @given(st.lists(st.integers(0, 4), min_size=10, max_size=60), st.floats(0.1, 0.5), st.integers(0, 3))
    def test_training_keeps_every_class(self, labels, share, seed):
        data = ImageData(torch.arange(len(labels)).view(-1, 1, 1, 1).float(), labels)
        num = int(np.ceil(len(labels) * share))
        if num > len(labels) - len(set(labels)):
            with pytest.raises(ValueError, match="cannot hold out"):
                split_train_validation(data, share, seed)
            return
        train, validation = split_train_validation(data, share, seed)
        assert len(validation) == num
        assert {*train.labels} == {*labels}
        assert sorted(torch.stack([*train.items, *validation.items]).flatten().tolist()) == [*range(len(labels))]

    def test_a_class_of_one_image_trains_and_is_named(self, caplog):
        data = images_of([0] * 12 + [1] * 7 + [2], ["common", "some", "rare"])
        train, validation = split_train_validation(data, 0.2, 0)
        assert 2 in train.labels
        assert {*validation.labels} == {0, 1}
        assert "too few images of 'rare' to hold any out; all of them are used for training" in caplog.text
