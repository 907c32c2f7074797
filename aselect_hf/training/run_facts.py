"""The facts of a run that its report needs besides the results."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aselect_hf.tasks import Task
from aselect_hf.training.arguments import TaskDataArguments, TaskModelArguments, TrainingArguments
from aselect_hf.training.objective import HeadModel
from aselect_hf.training.task_data import TaskData


@dataclass
class RunFacts:
    """Facts of one run of a task script.

    Args:
        model: with the chosen head.
        batch_size: images per optimizer step, on all devices.
    """

    task: Task
    model_args: TaskModelArguments
    data_args: TaskDataArguments
    args: TrainingArguments
    data: TaskData
    model: HeadModel
    batch_size: int
    device: torch.device
    mixed_precision: str
