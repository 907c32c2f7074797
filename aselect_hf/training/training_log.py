"""The log of a training: averages over steps and processes, for its history and the trackers."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator


class TrainingLog:
    """Collects the values of forward passes until they are logged.

    Attributes:
        history: a dict per log line and evaluation, each with its `step`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add the values of one forward pass on this process."""
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def log(self, step: int, learning_rate: float) -> dict[str, float]:
        """Record and return the averages since the last call, over steps and processes.

        Raises:
            ValueError: the loss is not finite.
        """
        means = {name: value / self._count for name, value in self._reduced_sums(step).items()}
        self._sums, self._count = {}, 0
        self.record(step, means | {"learning_rate": learning_rate})
        return means

    def record(self, step: int, values: dict[str, float]) -> None:
        """Add values to the history and send them to the trackers."""
        self.history.append({"step": step} | values)
        self.accelerator.log(values, step=step)

    def state(self, step: int) -> dict[str, Any]:
        """The history, and the values not logged yet, for a checkpoint."""
        return {"history": self.history, "sums": self._reduced_sums(step), "count": self._count}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        device = self.accelerator.device
        self.history, self._count = state["history"], state["count"]
        self._sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}

    def _reduced_sums(self, step: int) -> dict[str, float]:
        if not self._sums:
            return {}
        values = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="mean").tolist()
        sums = dict(zip(self._sums, values, strict=True))
        if not math.isfinite(sums["loss"]):
            raise ValueError(f"the loss is {sums['loss']} at step {step}: lower learning_rate")
        return sums
