"""Metrics against scikit-learn, however the data are split into batches, on one process and on two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, top_k_accuracy_score

from aselect_hf.training import metrics
from aselect_hf.training.metrics import Accuracy, MeanIoU, PixelAccuracy, TopKAccuracy, confusion_matrices

NUM_LABELS, IGNORED = 4, 255


def chunks(draw: Any, count: int) -> Iterator[slice]:
    """A split of `range(count)` into batches of any sizes, empty ones included."""
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=4)))
    return (slice(*pair) for pair in zip([0, *cuts], [*cuts, count], strict=True))


def fill(metric: evaluate.Metric, predictions: Any, references: Any, batches: Iterator[slice]) -> evaluate.Metric:
    for batch in batches:
        metric.add_batch(predictions=predictions[batch], references=references[batch])
    return metric


@st.composite
def labeled(draw: Any) -> tuple[np.ndarray, np.ndarray, Iterator[slice]]:
    count = draw(st.integers(1, 30))
    predictions, references = (draw(hnp.arrays(np.int32, count, elements=st.integers(0, 5))) for _ in range(2))
    return predictions, references, chunks(draw, count)


@st.composite
def scored(draw: Any) -> tuple[np.ndarray, np.ndarray, Iterator[slice]]:
    count, classes = draw(st.integers(1, 12)), draw(st.integers(3, 7))
    scores = draw(hnp.arrays(np.float32, (count, classes), elements=st.integers(-2, 2)))  # few values: many ties
    references = draw(hnp.arrays(np.int64, count, elements=st.integers(0, classes - 1)))
    return scores, references, chunks(draw, count)


@st.composite
def masked(draw: Any) -> tuple[list[np.ndarray], list[np.ndarray], Iterator[slice]]:
    """Images of different sizes; few categories, so that some are absent; some pixels ignored, but not all."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=6))
    known = draw(st.lists(st.integers(0, NUM_LABELS - 1), min_size=1, max_size=NUM_LABELS))
    predictions = [draw(hnp.arrays(np.int64, size, elements=st.sampled_from(known))) for size in sizes]
    references = [draw(hnp.arrays(np.uint8, size, elements=st.sampled_from([*known, IGNORED]))) for size in sizes]
    references[0][0, 0] = known[0]
    return predictions, references, chunks(draw, len(sizes))


def counted(predictions: list[np.ndarray], references: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    predicted = np.concatenate([mask.ravel() for mask in predictions])
    expected = np.concatenate([mask.ravel() for mask in references])
    return predicted[expected != IGNORED], expected[expected != IGNORED].astype(int)


@given(labeled())
def test_accuracy(case):
    predictions, references, batches = case
    result = fill(Accuracy(), predictions, references, batches).compute()
    assert result == {"accuracy": pytest.approx(accuracy_score(references, predictions), abs=1e-12)}


@given(scored(), st.integers(1, 9))
def test_top_k_accuracy(case, k):
    scores, references, batches = case
    classes = scores.shape[1]
    result = fill(TopKAccuracy(k), torch.from_numpy(scores), references.tolist(), batches).compute()
    expected = top_k_accuracy_score(references, scores, k=k, labels=range(classes)) if k < classes else 1.0
    assert result == {f"top_{k}_accuracy": pytest.approx(expected, abs=1e-12)}


@given(masked())
def test_mean_iou_and_pixel_accuracy(case):
    predictions, references, batches = case
    metric = evaluate.combine([MeanIoU(NUM_LABELS), PixelAccuracy(NUM_LABELS)])
    result = fill(metric, predictions, references, batches).compute()
    predicted, expected = counted(predictions, references)
    assert result["pixel_accuracy"] == result["overall_accuracy"] == pytest.approx(accuracy_score(expected, predicted))

    iou = jaccard_score(expected, predicted, labels=range(NUM_LABELS), average=None, zero_division=0)
    iou[np.setdiff1d(range(NUM_LABELS), [*expected, *predicted])] = np.nan
    accuracy = [np.mean(predicted[expected == i] == i) if (expected == i).any() else np.nan for i in range(NUM_LABELS)]
    np.testing.assert_allclose(result["per_category_iou"], iou, rtol=1e-12)
    np.testing.assert_allclose(result["per_category_accuracy"], accuracy, rtol=1e-12)
    assert result["mean_iou"] == pytest.approx(np.nanmean(iou))
    assert result["mean_accuracy"] == pytest.approx(np.nanmean(accuracy))


@given(masked())
def test_confusion_matrices_are_one_per_image_and_add_up(case):
    predictions, references, batches = case[0], case[1], list(case[2])
    matrices = confusion_matrices(predictions, references, NUM_LABELS)
    assert matrices.shape == (len(predictions), NUM_LABELS, NUM_LABELS)
    assert matrices.dtype == torch.int64
    for matrix, prediction, reference in zip(matrices, predictions, references, strict=True):
        pairs = counted([prediction], [reference])[::-1]
        expected = confusion_matrix(*pairs, labels=range(NUM_LABELS)) if len(pairs[0]) else np.zeros_like(matrix)
        assert np.array_equal(matrix, expected)
    for metric in (MeanIoU(NUM_LABELS), PixelAccuracy(NUM_LABELS)):
        for batch in batches:
            metric.add_confusion(matrices[batch])
        whole = type(metric)(NUM_LABELS).compute(predictions=predictions, references=references)
        np.testing.assert_equal(metric.compute(), whole)


def test_absent_categories_are_nan_and_left_out_of_the_mean():
    metric = MeanIoU(4, label_names=["sky", "road", "car", "tree"])
    metric.add(prediction=[[0, 0], [2, 2]], reference=[[0, 0], [0, IGNORED]])
    result = metric.compute()
    np.testing.assert_equal(result["per_category_iou"], [2 / 3, np.nan, 0, np.nan])
    np.testing.assert_equal(result["per_category_accuracy"], [2 / 3, np.nan, np.nan, np.nan])
    assert result["mean_iou"] == pytest.approx(1 / 3)
    assert result["mean_accuracy"] == result["iou_sky"] == pytest.approx(2 / 3)
    assert np.isnan(result["accuracy_car"])


def test_an_ignored_category_inside_the_range():
    metric = PixelAccuracy(3, ignore_index=0)
    assert metric.compute(predictions=[[[1, 2, 0, 9]]], references=[[[1, 1, 2, 0]]]) == {"pixel_accuracy": 1 / 3}


def test_state_is_constant_exact_and_reset_by_compute(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    metric = MeanIoU(3)
    shape = metric.counts.shape
    metric.add_confusion(torch.tensor([[2**60, 1, 0], [0, 0, 0], [0, 0, 0]]))  # beyond what a float counts
    metric.add_batch(predictions=torch.zeros(8, 16, 16).byte(), references=torch.zeros(8, 16, 16).byte())
    assert metric.counts.shape == shape
    assert metric.counts[0].tolist() == [2**60 + 8 * 16 * 16, 1, 0]
    metric.compute()
    assert metric.counts.shape == shape
    assert not metric.counts.any()
    assert list(tmp_path.iterdir()) == []


def test_the_interface_of_evaluate():
    two = evaluate.combine([TopKAccuracy(1), TopKAccuracy(2)])
    two.add(prediction=[0.1, 0.9, 0.5], reference=2)
    two.add_batch(predictions=[torch.tensor([0.1, 0.9, 0.5])], references=[1])
    assert two.compute() == {"top_1_accuracy": 0.5, "top_2_accuracy": 1.0}
    accuracy = evaluate.load(metrics.__file__)
    assert isinstance(accuracy, evaluate.Metric)
    accuracy.add(prediction=1, reference=0)
    assert accuracy.compute(predictions=[1, 2, 3], references=(1, 2, 3)) == {"accuracy": 0.75}
    assert MeanIoU(3).name == "mean_iou"


def test_masks_as_images():
    mask = Image.fromarray(np.array([[0, 1], [1, IGNORED]], dtype=np.uint8))
    assert PixelAccuracy(2).compute(predictions=[[[0, 1], [0, 0]]], references=[mask]) == {"pixel_accuracy": 2 / 3}


ONES = torch.ones(2, 3, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("metric", "predictions", "references", "message"),
    [
        (Accuracy(), [1, 2], [1], "class indices"),
        (Accuracy(), [0.5], [1], "argmax"),
        (Accuracy(), [[1, 0]], [[1, 0]], "class indices"),
        (Accuracy(), ["cat"], [1], "predictions must be numbers"),
        (Accuracy(), [1], None, "both"),
        (TopKAccuracy(), [[0.1, 0.2]], [2], "references must be in 0..1, got 2..2"),
        (TopKAccuracy(), [0.1, 0.2], [1, 1], "scores"),
        (TopKAccuracy(), [[0.1, float("nan")]], [0], "NaN"),
        (TopKAccuracy(), [[0.1], [0.1, 0.2]], [0, 0], "of one shape"),
        (MeanIoU(2), ONES, ONES[:1], "2 predictions for 1"),
        (MeanIoU(2), ONES, ONES[:, :2], "of one size"),
        (MeanIoU(2), ONES[0], ONES[0], "height, width"),
        (MeanIoU(2), 3, ONES, "predictions must be masks"),
        (MeanIoU(2), ONES, 2 * ONES, "references must be in 0..1 or ignore_index=255, got 2..2"),
        (MeanIoU(2), 2 * ONES, ONES, "predictions must be in 0..1, got 2..2"),
        (PixelAccuracy(2), ONES - 2, ONES, "predictions must be in 0..1, got -1..-1"),
        (PixelAccuracy(2), ONES, 255 * ONES, "nothing to compute"),
    ],
)
def test_bad_input_is_refused_and_adds_nothing(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)
    assert not metric.counts.any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopKAccuracy(0), "k must be an integer of at least 1, got 0"),
        (lambda: MeanIoU(2.0), "num_labels must be"),
        (lambda: PixelAccuracy(2, ignore_index=None), "ignore_index must be an integer, got None"),
        (lambda: MeanIoU(2, label_names=["a", "a"]), "2 different names"),
        (lambda: Accuracy(num_process=2), "gather_for_metrics"),
        (lambda: Accuracy().compute(), "nothing to compute"),
        (lambda: MeanIoU(2).add_confusion(torch.ones(1, 3, 3).long()), r"\(batch, 2, 2\), got \(1, 3, 3\)"),
        (lambda: MeanIoU(2).add_confusion(torch.ones(2, 2)), "integers"),
        (lambda: MeanIoU(2).add_confusion(-torch.ones(2, 2).long()), "negative"),
    ],
)
def test_bad_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def evaluate_on_a_process(masks: torch.Tensor, labels: torch.Tensor, folder: Path) -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator()
    loader = torch.utils.data.DataLoader(list(zip(*masks, *labels, strict=True)), batch_size=2)
    accuracy, mean_iou = Accuracy(), MeanIoU(3)
    for predicted, expected, label, target in accelerator.prepare(loader):
        mean_iou.add_confusion(accelerator.gather_for_metrics(confusion_matrices(predicted, expected, 3)))
        accuracy.add_batch(**accelerator.gather_for_metrics({"predictions": label, "references": target}))
    result = mean_iou.compute() | accuracy.compute()
    torch.save([accelerator.num_processes, result], folder / f"{accelerator.process_index}.pt")


def test_two_processes_give_the_value_of_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (2, 11, 4, 4), generator=generator)
    labels = torch.randint(3, (2, 11), generator=generator)
    debug_launcher(evaluate_on_a_process, (masks, labels, tmp_path), num_processes=2)
    expected = MeanIoU(3).compute(predictions=masks[0], references=masks[1])
    expected |= Accuracy().compute(predictions=labels[0], references=labels[1])
    for process in range(2):
        np.testing.assert_equal(torch.load(tmp_path / f"{process}.pt", weights_only=False), [2, expected])
