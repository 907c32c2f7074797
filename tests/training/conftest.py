"""accelerate keeps one state per process; every training test starts from a fresh one. A toy objective to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from aselect_hf.training.arguments import TrainingArguments
from aselect_hf.training.draws import SampleDraws
from aselect_hf.training.loop import Trainer


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Toy(nn.Module):
    """Denoises numbers: noise of the draws, dropout of torch's generator, and a buffer that changes with the data."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.layer.weight.data = torch.randn(4, 4, generator=generator)
        self.layer.bias.data.zero_()
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("steps", torch.zeros(()))
        self.progress: list[float] = []
        self.seen: list[list[float]] = []

    def set_progress(self, progress: float) -> None:
        self.progress.append(progress)

    def forward(self, batch: dict[str, torch.Tensor], draws: SampleDraws) -> dict[str, torch.Tensor]:
        values = batch["values"]
        self.seen.append(values[:, 0].tolist())
        self.steps += 1
        noisy = values + draws.normal(4)
        loss = (self.layer(self.dropout(noisy)) - values).square().mean()
        return {"loss": loss, "mean_value": values[:, 0].mean()}


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {
        "values": torch.stack([torch.full((4,), float(row["x"] if isinstance(row, dict) else row)) for row in rows])
    }


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., Trainer]:
    """`make_trainer(name="run", dataset=range(20), dropout=0, **arguments)`; `evaluate`, groups and workers too."""

    def build(name: str = "run", dataset: Any = range(20), objective: nn.Module | None = None, **options) -> Trainer:
        AcceleratorState._reset_state(reset_partial_state=True)
        loop = {key: options.pop(key) for key in ("evaluate", "parameter_groups", "num_workers") if key in options}
        objective = objective or Toy(options.pop("dropout", 0.0))
        defaults = {"per_device_train_batch_size": 4, "max_train_steps": 12, "learning_rate": 0.05, "logging_steps": 1}
        args = TrainingArguments(output_dir=str(tmp_path / name), **defaults | options)
        return Trainer(objective, dataset, collate, args, **loop)

    return build


@pytest.fixture
def weights_of() -> Callable[[Trainer], torch.Tensor]:
    """All parameters and buffers of a trainer's objective in one vector."""
    return lambda trainer: torch.cat(
        [
            tensor.detach().flatten()
            for tensor in trainer.accelerator.unwrap_model(trainer.objective).state_dict().values()
        ]
    )
