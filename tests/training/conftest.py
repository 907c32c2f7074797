"""accelerate keeps one state per process; every training test starts from a fresh one. A builder of small runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from aselect_hf.training.arguments import TrainingArguments
from aselect_hf.training.loop import Trainer

from .toys import Toy, collate


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., Trainer]:
    """`make_trainer(name="run", dataset=range(20), dropout=0, **arguments)`; `evaluate`, groups and workers too."""

    def build(name: str = "run", dataset: Any = range(20), objective: nn.Module | None = None, **options) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        loop = {key: options.pop(key) for key in ("evaluate", "parameter_groups", "num_workers") if key in options}
        make_batch = options.pop("collate", collate)
        objective = objective or Toy(options.pop("dropout", 0.0))
        defaults = {"per_device_train_batch_size": 4, "max_train_steps": 12, "learning_rate": 0.05, "logging_steps": 1}
        args = TrainingArguments(output_dir=str(tmp_path / name), **defaults | options)
        return Trainer(objective, dataset, make_batch, args, **loop)

    return build


@pytest.fixture
def weights_of() -> Callable[[Trainer], torch.Tensor]:
    """All parameters of a trainer's objective in one vector, and its buffer."""

    def weights(trainer: Trainer) -> torch.Tensor:
        objective = trainer.accelerator.unwrap_model(trainer.objective)
        return torch.cat([tensor.detach().flatten() for tensor in (*objective.parameters(), objective.steps[None])])

    return weights
