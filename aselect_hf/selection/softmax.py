"""Linear probes of large sets, in torch: the minimum that scikit-learn finds, on an accelerator if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch.nn.functional import cross_entropy

CHUNK = 2**14
"""Rows that are on the device at once."""
ITERATIONS, GRADIENT, HISTORY = 500, 1e-3, 20
"""Limits of L-BFGS: iterations, largest entry of the gradient of the mean loss at which it stops (both as
scikit-learn's here), steps that it remembers."""


@dataclass
class SoftmaxRegression:
    """Multinomial logistic regression on standardized features.

    It minimizes what scikit-learn's `StandardScaler` and `LogisticRegression(C)` do, the sum of all cross-entropies
    plus `|W|^2 / (2 C)`, by L-BFGS on the whole set. The device holds one chunk of rows. Not from the paper.

    Args:
        C: inverse strength of the regularization.
    """

    C: float

    device: torch.device = field(init=False)
    classes: np.ndarray = field(init=False)
    mean: torch.Tensor = field(init=False)
    scale: torch.Tensor = field(init=False)
    weights: torch.Tensor = field(init=False)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(self, features: np.ndarray, labels: np.ndarray, start: SoftmaxRegression | None = None) -> Self:
        """Fit to `(rows, width)` features.

        Args:
            start: a fit to the same rows with another `C`, to begin with.
        """
        self.device = _device()
        self.classes, targets = np.unique(labels, return_inverse=True)
        self.mean, self.scale = (start.mean, start.scale) if start else _moments(features)
        shape = (len(self.classes), features.shape[1] + 1)  # the last column is the bias, which is not regularized
        weights = torch.zeros(shape, device=self.device) if start is None else start.weights.clone()
        self.weights = weights.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [self.weights],
            max_iter=ITERATIONS,
            history_size=HISTORY,
            tolerance_grad=GRADIENT,
            line_search_fn="strong_wolfe",
        )

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            total = (self.weights[:, :-1] ** 2).sum() / (2 * self.C * len(labels))
            total.backward()
            for first, logits in self._logits(features):
                aims = torch.from_numpy(targets[first : first + len(logits)]).to(self.device)
                part = cross_entropy(logits, aims, reduction="sum") / len(labels)
                part.backward()
                total = total + part
            return total.detach()

        optimizer.step(loss)
        self.weights = self.weights.detach()
        return self

    @torch.no_grad()
    def predict(self, features: np.ndarray) -> np.ndarray:
        """The class of each row."""
        return self.classes[
            np.concatenate([logits.argmax(dim=1).cpu().numpy() for _, logits in self._logits(features)])
        ]

    def score(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Share of correct predictions, in [0, 1]."""
        return float(np.mean(self.predict(features) == labels))

    def _logits(self, features: np.ndarray) -> Iterator[tuple[int, torch.Tensor]]:
        """The number of the first row of each chunk, and logits `(chunk, classes)`."""
        for first in range(0, len(features), CHUNK):
            rows = torch.tensor(features[first : first + CHUNK], device=self.device)
            yield first, ((rows - self.mean) / self.scale) @ self.weights[:, :-1].T + self.weights[:, -1]


def _device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _moments(features: np.ndarray) -> list[torch.Tensor]:
    """Mean and standard deviation of every column, summed in float64; a constant column has deviation 1."""
    mean, square = features.mean(axis=0, dtype=np.float64), np.zeros(features.shape[1])
    for first in range(0, len(features), CHUNK):
        square += ((features[first : first + CHUNK] - mean) ** 2).sum(axis=0)
    deviation = np.sqrt(square / len(features))
    deviation[deviation <= 10 * np.finfo(np.float32).eps * np.abs(mean)] = 1.0
    return [torch.from_numpy(each.astype(np.float32)).to(_device()) for each in (mean, deviation)]
