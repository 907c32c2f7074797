"""Metrics of `evaluate` that stream, work offline and are exact across processes.

    metric = MeanIoU(num_labels=150)
    for pixel_values, labels in loader:
        metric.add_batch(predictions=predict(pixel_values), references=labels)
    metric.compute()["mean_iou"]

Predictions are counted, not kept: a metric holds a few integers or one confusion matrix, and writes nothing to disk.
Names and values are those of the Hub's `accuracy` and `mean_iou`, which `evaluate.load` cannot fetch offline.

With several processes, gather before adding, which drops the duplicates that pad an uneven last batch:

    accuracy.add_batch(**accelerator.gather_for_metrics({"predictions": predictions, "references": labels}))
    mean_iou.add_confusion(accelerator.gather_for_metrics(confusion_matrices(predictions, masks, num_labels=150)))
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch


class StreamingMetric(evaluate.Metric, abc.ABC):
    """An `evaluate.Metric` whose state is one integer tensor of a fixed shape, `counts`.

    A batch that is refused adds nothing. Inputs may be tensors on any device, arrays, PIL masks or lists.
    """

    _inputs: datasets.Features

    def __init__(self, counts_shape: tuple[int, ...], **kwargs: Any) -> None:
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                f"num_process={kwargs['num_process']}: these metrics share no files between processes; "
                "add what accelerator.gather_for_metrics returns"
            )
        super().__init__(**kwargs)
        self.counts = torch.zeros(counts_shape, dtype=torch.int64)

    @abc.abstractmethod
    def _count(self, predictions: Any, references: Any) -> torch.Tensor:
        """What a batch adds to `counts`."""

    @abc.abstractmethod
    def _result(self, counts: np.ndarray) -> dict[str, Any]:
        """The values of `counts`, of which at least one is not 0."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=inspect.getdoc(type(self)), citation="", features=self._inputs)

    def _build_data_dir(self) -> str:
        return ""  # the base class would create a cache folder; nothing is cached here

    def add_batch(self, *, predictions: Any = None, references: Any = None) -> None:
        """Count a batch.

        Raises:
            ValueError: one of the two is missing, their shapes differ, or a label is out of range.
        """
        if predictions is None or references is None:
            raise ValueError("give both predictions and references")
        self.counts += self._count(predictions, references).cpu()

    def add(
        self, *, prediction: Any = None, reference: Any = None, predictions: Any = None, references: Any = None
    ) -> None:
        """Count one example. (`evaluate.combine` passes it under the plural names.)"""
        prediction = predictions if prediction is None else prediction
        reference = references if reference is None else reference
        if prediction is None or reference is None:
            raise ValueError("give both prediction and reference")
        self.add_batch(predictions=[prediction], references=[reference])

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, Any]:
        """Compute the metric over everything added, including these predictions, and reset it.

        Raises:
            ValueError: nothing was counted since the last `compute`, or see `add_batch`.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self.counts.any():
            raise ValueError(f"{self.name} has nothing to compute: no batch was added, or every label is ignore_index")
        result = self._result(self.counts.numpy())
        self.counts.zero_()
        return result


class Accuracy(StreamingMetric):
    """Share of correct class labels; predictions and references are integers `(batch,)`.

    Result: `{"accuracy": float in 0..1}`.
    """

    _inputs = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})

    def __init__(self, **kwargs: Any) -> None:
        super().__init__((2,), **kwargs)

    def _count(self, predictions: Any, references: Any) -> torch.Tensor:
        predictions, references = _as_labels("predictions", predictions), _as_labels("references", references)
        if predictions.ndim != 1 or predictions.shape != references.shape:
            raise ValueError(
                "predictions and references must both be class indices (batch,), "
                f"got {tuple(predictions.shape)} and {tuple(references.shape)}"
            )
        return _wrong_and_right(predictions == references.to(predictions.device))

    def _result(self, counts: np.ndarray) -> dict[str, Any]:
        return {"accuracy": float(counts[1] / counts.sum())}


class TopKAccuracy(StreamingMetric):
    """Share of images whose class is among the `k` best scores.

    Predictions are scores `(batch, classes)` of any scale, references integers `(batch,)`. Equal scores rank by class,
    the higher index first, as in scikit-learn. With fewer than `k` classes every image counts as correct.

    Result: `{"top_<k>_accuracy": float in 0..1}`.

    Raises:
        ValueError: `k` is not a positive integer.
    """

    _inputs = datasets.Features(
        {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
    )

    def __init__(self, k: int = 5, **kwargs: Any) -> None:
        _check_integer("k", k, lowest=1)
        super().__init__((2,), **kwargs)
        self.k = k

    def _count(self, predictions: Any, references: Any) -> torch.Tensor:
        scores, references = _as_tensor("predictions", predictions), _as_labels("references", references)
        if scores.ndim != 2 or references.shape != scores.shape[:1]:
            raise ValueError(
                "predictions must be scores (batch, classes) and references class indices (batch,), "
                f"got {tuple(scores.shape)} and {tuple(references.shape)}"
            )
        if scores.isnan().any():
            raise ValueError("predictions hold NaN")
        references = references.to(scores.device)[:, None]
        _check_range("references", references, scores.shape[1])
        own = scores.gather(1, references)
        later = torch.arange(scores.shape[1], device=scores.device) > references
        rank = ((scores > own) | ((scores == own) & later)).sum(1)
        return _wrong_and_right(rank < self.k)

    def _result(self, counts: np.ndarray) -> dict[str, Any]:
        return {f"top_{self.k}_accuracy": float(counts[1] / counts.sum())}


class ConfusionMetric(StreamingMetric):
    """A metric of the confusion matrix over all pixels (rows reference, columns prediction).

    Predictions and references are integer masks `(batch, height, width)`, or lists of masks `(height, width)` if
    sizes differ. Pixels whose reference is `ignore_index` are not counted, whatever was predicted there.

    Raises:
        ValueError: `num_labels` is not a positive integer, or `ignore_index` is not an integer.
    """

    _inputs = datasets.Features(
        {
            "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
            "references": datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
        }
    )

    def __init__(self, num_labels: int, ignore_index: int = 255, **kwargs: Any) -> None:
        _check_integer("num_labels", num_labels, lowest=1)
        _check_integer("ignore_index", ignore_index)
        super().__init__((num_labels, num_labels), **kwargs)
        self.num_labels, self.ignore_index = num_labels, ignore_index

    def _count(self, predictions: Any, references: Any) -> torch.Tensor:
        return confusion_matrices(predictions, references, self.num_labels, self.ignore_index).sum(0)

    def add_confusion(self, matrices: torch.Tensor) -> None:
        """Add one matrix or a batch `(batch, num_labels, num_labels)` of them, from `confusion_matrices`.

        Raises:
            ValueError: wrong shape, or negative values.
        """
        matrices = _as_labels("matrices", matrices)
        if matrices.ndim not in (2, 3) or matrices.shape[-2:] != self.counts.shape:
            raise ValueError(
                f"matrices must be (batch, {self.num_labels}, {self.num_labels}), got {tuple(matrices.shape)}"
            )
        if (matrices < 0).any():
            raise ValueError("matrices must hold counts, got negative values")
        self.counts += matrices.reshape(-1, *self.counts.shape).sum(0).cpu()


class MeanIoU(ConfusionMetric):
    """Intersection over union of each category, and its mean, over all pixels of the data set at once.

    Result, as in the Hub's `mean_iou`: `mean_iou`, `mean_accuracy`, `overall_accuracy` as floats, `per_category_iou`
    and `per_category_accuracy` as arrays `(num_labels,)`. The IoU of a category absent from prediction and reference is
    nan, as is the accuracy of one absent from the reference; the means leave these out. With `label_names`, one per
    category, also `iou_<name>` and `accuracy_<name>`, for trackers.

    Raises:
        ValueError: see `ConfusionMetric`; or `label_names` are not `num_labels` different names.
    """

    def __init__(
        self, num_labels: int, ignore_index: int = 255, label_names: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(num_labels, ignore_index, **kwargs)
        if label_names is not None and not len(label_names) == len(set(label_names)) == num_labels:
            raise ValueError(f"label_names must be {num_labels} different names, got {list(label_names)}")
        self.label_names = label_names
        self.info.module_name = "mean_iou"  # derived from the class it would be mean_io_u

    def _result(self, counts: np.ndarray) -> dict[str, Any]:
        hits, in_reference, in_prediction = counts.diagonal(), counts.sum(1), counts.sum(0)
        with np.errstate(invalid="ignore"):  # 0 / 0: the nan of an absent category
            iou = hits / (in_reference + in_prediction - hits)
            accuracy = hits / in_reference
        result: dict[str, Any] = {
            "mean_iou": float(np.nanmean(iou)),
            "mean_accuracy": float(np.nanmean(accuracy)),
            "overall_accuracy": float(hits.sum() / counts.sum()),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }
        for index, name in enumerate(self.label_names or ()):
            result |= {f"iou_{name}": float(iou[index]), f"accuracy_{name}": float(accuracy[index])}
        return result


class PixelAccuracy(ConfusionMetric):
    """Share of correct pixels among those whose reference is not `ignore_index`.

    Result: `{"pixel_accuracy": float in 0..1}`.
    """

    def _result(self, counts: np.ndarray) -> dict[str, Any]:
        return {"pixel_accuracy": float(counts.trace() / counts.sum())}


def confusion_matrices(predictions: Any, references: Any, num_labels: int, ignore_index: int = 255) -> torch.Tensor:
    """One confusion matrix per image, of a fixed shape that `accelerator.gather_for_metrics` accepts.

    Args:
        predictions: integer masks `(batch, height, width)` in `0..num_labels - 1`, or a list of `(height, width)`.
        references: the same, with `ignore_index` for pixels that are not counted.

    Returns:
        Counts `(batch, num_labels, num_labels)`, int64: rows reference, columns prediction; on the predictions' device.

    Raises:
        ValueError: shapes differ, or a counted label is not in `0..num_labels - 1`.
    """
    for name, masks in (("predictions", predictions), ("references", references)):
        if not hasattr(masks, "__len__"):
            raise ValueError(
                f"{name} must be masks (batch, height, width) or a list of them, got {type(masks).__name__}"
            )
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions for {len(references)} references")
    pairs = zip(predictions, references, strict=True)
    matrices = [_confusion_matrix(*pair, num_labels, ignore_index) for pair in pairs]
    return torch.stack(matrices) if matrices else torch.zeros((0, num_labels, num_labels), dtype=torch.int64)


def _confusion_matrix(prediction: Any, reference: Any, num_labels: int, ignore_index: int) -> torch.Tensor:
    predicted, expected = _as_labels("predictions", prediction), _as_labels("references", reference)
    if predicted.ndim != 2 or predicted.shape != expected.shape:
        raise ValueError(
            "predictions and references must be masks (height, width) of one size per image, "
            f"got {tuple(predicted.shape)} and {tuple(expected.shape)}"
        )
    expected = expected.to(predicted.device)
    counted = expected != ignore_index
    predicted, expected = predicted[counted], expected[counted]
    _check_range("references", expected, num_labels, f" or ignore_index={ignore_index}")
    _check_range("predictions", predicted, num_labels)
    return torch.bincount(expected * num_labels + predicted, minlength=num_labels**2).view(num_labels, num_labels)


def _wrong_and_right(correct: torch.Tensor) -> torch.Tensor:
    return torch.bincount(correct.long(), minlength=2)


def _as_tensor(name: str, values: Any) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach()
    try:
        if isinstance(values, list | tuple) and values and isinstance(values[0], torch.Tensor):
            return torch.stack(list(values)).detach()
        return torch.tensor(np.asarray(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers of one shape in a tensor, an array or a list: {error}") from error


def _as_labels(name: str, values: Any) -> torch.Tensor:
    labels = _as_tensor(name, values)
    if labels.numel() and (labels.is_floating_point() or labels.is_complex()):
        raise ValueError(f"{name} must be integers, got {labels.dtype}; for scores, take the argmax over classes")
    return labels.long()


def _check_range(name: str, labels: torch.Tensor, num_labels: int, other: str = "") -> None:
    if labels.numel() and not 0 <= labels.min() <= labels.max() < num_labels:
        found = f"{labels.min().item()}..{labels.max().item()}"
        raise ValueError(f"{name} must be in 0..{num_labels - 1}{other}, got {found}")


def _check_integer(name: str, value: Any, lowest: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (lowest is not None and value < lowest):
        wanted = "an integer" if lowest is None else f"an integer of at least {lowest}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
