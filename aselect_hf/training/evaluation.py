"""Scores of every head of a bank on one split, exact on any number of processes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from aselect_hf.tasks import Task
from aselect_hf.training.metrics import Accuracy, MeanIoU, PixelAccuracy, TopKAccuracy, confusion_matrices
from aselect_hf.training.objective import TaskObjective
from aselect_hf.training.task_dataset import TaskDataset

NUM_SCORED_CLASSES = "num_scored_classes"


class HeadEvaluation:
    """Streams a split through the backbone once and scores all heads.

    Accuracies are shares in [0, 1]. Masks are scored at their own resolution: logits are resized to each mask.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        loader: DataLoader,
        label_names: list[str],
        task: Task,
        ignore_index: int,
    ) -> None:
        self.accelerator = accelerator
        self.dataset: TaskDataset = loader.dataset  # type: ignore[assignment]
        self.loader = accelerator.prepare(loader)
        self.label_names, self.task, self.ignore_index = label_names, task, ignore_index

    @torch.no_grad()
    def run(self, objective: torch.nn.Module, description: str) -> list[dict[str, float]]:
        """Metrics by name, one dict per head. `objective` is the prepared module, in eval mode."""
        heads: TaskObjective = self.accelerator.unwrap_model(objective)
        metrics = [self._metrics() for _ in heads.heads]
        quiet = not self.accelerator.is_local_main_process
        for batch in tqdm(self.loader, desc=description, leave=False, disable=quiet):
            logits = objective(batch)
            if self.task.dense:
                self._add_masks(metrics, logits, batch["masks"])
            else:
                self._add_labels(metrics, logits, batch["labels"])
        return [self._compute(each) for each in metrics]

    def _metrics(self) -> list[Any]:
        """Metrics of one head: `Task.metric`, and others to report."""
        count = len(self.label_names)
        if self.task.dense:
            names = self.label_names if len(set(self.label_names)) == count else None  # names may repeat
            return [MeanIoU(count, self.ignore_index, names), PixelAccuracy(count, self.ignore_index)]
        return [Accuracy(), *([TopKAccuracy(5)] if count > 5 else [])]

    def _add_labels(self, metrics: list[list[Any]], logits: torch.Tensor, labels: torch.Tensor) -> None:
        scores, labels = self.accelerator.gather_for_metrics((logits.transpose(0, 1), labels))
        for each, values in zip(metrics, scores.unbind(1), strict=True):
            for metric in each:
                top_k = isinstance(metric, TopKAccuracy)
                metric.add_batch(predictions=values if top_k else values.argmax(dim=1), references=labels)

    def _add_masks(self, metrics: list[list[Any]], logits: torch.Tensor, masks: list[torch.Tensor]) -> None:
        for each, head_logits in zip(metrics, logits, strict=True):
            predictions = [
                F.interpolate(image[None], size=mask.shape, mode="bilinear", align_corners=False)[0].argmax(dim=0)
                for image, mask in zip(head_logits, masks, strict=True)
            ]
            found = confusion_matrices(predictions, masks, len(self.label_names), self.ignore_index)
            found = self.accelerator.gather_for_metrics(found.to(self.accelerator.device)).cpu()
            for metric in each:
                metric.add_confusion(found)

    @staticmethod
    def _compute(metrics: list[Any]) -> dict[str, float]:
        """All metrics that are numbers. A class that neither occurs nor is predicted enters no mean."""
        values = {name: value for metric in metrics for name, value in metric.compute().items()}
        if "per_category_iou" in values:
            values[NUM_SCORED_CLASSES] = float(np.isfinite(values["per_category_iou"]).sum())
        return {name: value for name, value in values.items() if isinstance(value, float) and not math.isnan(value)}
