"""Objectives to test the loop with: small, and with everything a real one may do."""

from __future__ import annotations

import os
import resource
from typing import Any

import torch
from torch import nn

from aselect_hf import ASelectDiTConfig, ASelectDiTForSemanticSegmentation
from aselect_hf.selection.timestep_gate import TimestepGate
from aselect_hf.training.draws import SampleDraws
from aselect_hf.training.objective import HeadSetting, TaskObjective


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


def segmenter(gate: bool = False) -> TaskObjective:
    """Segments pictures of `MaskedPictures` and denoises them; with a gate, at two of three timesteps."""
    torch.manual_seed(0)
    config = ASelectDiTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=4, sample_size=8,
        num_channels=1, num_condition_classes=0, learned_sigma=False, timestep=50, num_labels=3,
    )  # fmt: skip
    model = ASelectDiTForSemanticSegmentation(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    candidates = [20, 200, 600]
    log_snr = [model.dit.noise_schedule.log_snr(t) for t in candidates]
    chooser = TimestepGate(16, candidates, log_snr) if gate else None
    return TaskObjective(model, [HeadSetting(1e-3, 0.0)], gate=chooser, denoising_loss_weight=0.5, random_flip=True)


class MaskedPictures(list):
    """Eight pictures: one with a whole mask, two with a few pixels, and five whose pixels are all ignored."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        masks = torch.randint(3, (8, 8, 8), generator=generator)
        masks[1:3, 1:] = 255
        masks[3:] = 255
        super().__init__(zip(torch.randn(8, 1, 8, 8, generator=generator), masks, strict=True))

    @staticmethod
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        pictures, masks = zip(*rows, strict=True)
        return {"pixel_values": torch.stack(pictures), "labels": torch.stack(masks)}
