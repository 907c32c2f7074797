"""Measured figures with their protocol, in the Hub's formats: `model-index`, and `.eval_results` of a Benchmark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump
from typing_extensions import TypedDict

from aselect_hf.compare.table import Comparison
from aselect_hf.files import as_path, check_types, read_json
from aselect_hf.hub.redaction import publishable
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.reporting.markdown import Markdown


@dataclass(frozen=True)
class EvaluationResult:
    """One figure of one model.

    Args:
        dataset: Hub id of the data set, or any name for one that is not on the Hub (shown, but not in the metadata).
        metric: name as in `evaluate`: `"accuracy"`, `"mean_iou"`, ...
        value: as the metric gives it; accuracies in [0, 1].
        protocol: how it was measured, in words: what was trained, chosen and reported on which images, the spread.
        task: `"image-classification"`, `"image-segmentation"`, ...
        split: of the data set.
        deviation: standard deviation over seeds, in the units of `value`.
        label: name of the figure for readers (default: the metric's).
        benchmark_task: task id in the `eval.yaml` of `dataset`, if that is a Benchmark registered on the Hub. Only such
            figures are written to `.eval_results` too.

    Raises:
        ValueError: no protocol, or `value` is not a number.
    """

    dataset: str
    metric: str
    value: float
    protocol: str
    task: str = "image-classification"
    split: str = "test"
    deviation: float | None = None
    label: str = ""
    benchmark_task: str | None = None

    def __post_init__(self) -> None:
        if not self.protocol.strip():
            raise ValueError(f"protocol of the {self.metric} on {self.dataset} is empty: say how it was measured")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise ValueError(f"value of the {self.metric} on {self.dataset} must be a number, got {self.value!r}")
        object.__setattr__(self, "label", self.label or self.metric.replace("_", " "))

    @property
    def on_hub(self) -> bool:
        return is_hub_id(self.dataset)

    @property
    def value_text(self) -> str:
        return f"{self.value:.4f}" + (f" ± {self.deviation:.4f}" if self.deviation is not None else "")

    @property
    def dataset_link(self) -> Markdown:
        if not self.on_hub:
            return Markdown.escape(self.dataset)
        address = Markdown(f"https://huggingface.co/datasets/{self.dataset}")
        return Markdown("[{}]({})").format(self.dataset, address)

    def public(self) -> EvaluationResult:
        """A copy without secrets and local paths, in which no shortened path looks like a Hub id."""
        public = publishable(self)
        return replace(public, dataset=local_name(public.dataset)) if public.on_hub and not self.on_hub else public

    def to_eval_result(self) -> EvalResult:
        """For the card's `model-index`."""
        return EvalResult(
            task_type=self.task,
            dataset_type=self.dataset,
            dataset_name=self.dataset,
            dataset_split=self.split,
            metric_type=self.metric,
            metric_name=self.label,
            metric_value=round(self.value, 6),
        )

    def to_entry(self) -> EvalResultEntry:
        """For `.eval_results/*.yaml`."""
        return EvalResultEntry(
            dataset_id=self.dataset,
            task_id=self.benchmark_task or "",
            value=round(self.value, 6),
            notes=f"{self.label}, split {self.split}: {self.protocol}",
        )


def local_name(name: str) -> str:
    """Name of a data folder in a card, which does not look like a Hub id."""
    return f"{name} (a local folder)"


def is_hub_id(name: str) -> bool:
    """Whether a name can be a Hub id: it is well formed, and not a local folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name != "sample" and not as_path(name).exists()


def results_of(comparison: Comparison, config: NoisyBackboneConfig, dataset: str | None) -> list[EvaluationResult]:
    """The figure of a comparison on `dataset`, if known, for this checkpoint's own timestep and feature, if any."""
    own = [
        row
        for row in comparison.rows
        if (row.selection.timestep, row.selection.feature) == (config.timestep, config.feature)
    ]
    if not own or dataset is None:
        return []
    row, protocol = own[0], comparison.protocol
    described = [
        f"{name} {protocol[name]}" for name in ("images", "probe", "seeds", "spread", "dtype") if name in protocol
    ]
    return [
        EvaluationResult(
            dataset=dataset,
            metric="accuracy",
            value=row.test_accuracy_mean,
            deviation=row.test_accuracy_deviation,
            label="accuracy of a probe on the frozen feature",
            protocol="; ".join(described),
        )
    ]


class ResultsFile(TypedDict):
    """The part of `results.json` that is read."""

    results: list[EvaluationResult]


def load_results(path: str | Path) -> list[EvaluationResult]:
    """The figures in the `results.json` of a training script; a `ValueError` if the file is invalid."""
    try:
        content = read_json(path)
        check_types(content, ResultsFile)
        return [EvaluationResult(**fields) for fields in content["results"]]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold the results of a training ({error})") from error


def eval_result_files(results: Sequence[EvaluationResult]) -> dict[str, str]:
    """`.eval_results/*.yaml` by path, one file for each data set that is a Benchmark of the Hub."""
    by_dataset: dict[str, list[EvalResultEntry]] = {}
    for result in results:
        if result.on_hub and result.benchmark_task:
            by_dataset.setdefault(result.dataset, []).append(result.to_entry())
    return {
        f".eval_results/aselect-{re.sub('[^A-Za-z0-9_.-]', '-', dataset)}.yaml": yaml_dump(
            eval_result_entries_to_yaml(entries), sort_keys=False
        )
        for dataset, entries in by_dataset.items()
    }
