"""Objectives to test the loop with: small, and with everything a real one may do."""

from __future__ import annotations

import os
import resource
from typing import Any

import torch
from torch import nn

from aselect_hf.training.draws import SampleDraws


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


class StopAt(Toy):
    """Sends the process a signal in a given forward pass."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(dropout=0.5)
        self.stop, self.number = step, number

    def forward(self, batch, draws):
        if self.steps == self.stop - 1:
            os.kill(os.getpid(), self.number)
        return super().forward(batch, draws)


class FullDiskAt(Toy):
    """From a given step on, no file may grow beyond `limit` bytes: a real error from the operating system."""

    def __init__(self, step: int, limit: int) -> None:
        super().__init__()
        self.full_at, self.limit = step, limit

    def forward(self, batch, draws):
        if self.steps == self.full_at - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return super().forward(batch, draws)


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {
        "values": torch.stack([torch.full((4,), float(row["x"] if isinstance(row, dict) else row)) for row in rows])
    }
