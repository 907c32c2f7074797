"""What was asked of a run, and on what it ran: all that its report tells besides what came out."""

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
        task: what was learned.
        model_args, data_args, args: as they were given.
        data: the splits.
        model: with the head that was chosen.
        batch_size: images per optimizer step, on all devices.
        device, mixed_precision: that it ran on, and in.
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
