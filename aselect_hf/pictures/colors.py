"""Features as colors: three principal directions, the same for all timesteps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

CLIPPED = 0.02
"""Share of the values at each end that get the darkest or brightest color."""


@dataclass(frozen=True)
class FeatureColors:
    """A projection of features to red, green and blue, so that a color means the same at every timestep.

    Each set of tokens is centered on its own mean. Without that, the first direction would be the noise level itself.

    Args:
        directions: `(width, 3)`, the principal directions of centered tokens, the strongest first.
        low, high: `(3,)`, projections with the darkest and the brightest color.
    """

    directions: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def fit(cls, features: torch.Tensor) -> Self:
        """The projection for all of `features`, `(..., tokens, width)`: sets of tokens, such as one per timestep.

        Raises:
            ValueError: features are not finite, or there is only one token.
        """
        if features.ndim < 2 or features.shape[-2] < 2:
            raise ValueError(f"features must be (..., tokens, width) with several tokens, got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError("features hold NaN or infinite values")
        tokens = centered(features).flatten(0, -2).double()  # (all tokens, width)
        _, vectors = torch.linalg.eigh(tokens.T @ tokens)  # ascending
        directions = vectors.flip(-1)[:, :3]
        directions = torch.nn.functional.pad(directions, (0, 3 - directions.shape[1]))  # features of 1 or 2 channels
        largest = directions.abs().argmax(dim=0)
        directions = directions * directions[largest, range(3)].sign()  # a vector and its negative are equally good
        ends = torch.tensor([CLIPPED, 1 - CLIPPED], dtype=torch.float64, device=tokens.device)
        low, high = torch.quantile((tokens @ directions)[:: max(1, len(tokens) // 2**20)], ends, dim=0)
        return cls(directions.float(), low.float(), high.float())

    def __call__(self, features: torch.Tensor) -> np.ndarray:
        """Colors `(..., tokens, 3)`, uint8, of features `(..., tokens, width)`."""
        projected = centered(features) @ self.directions
        share = (projected - self.low) / (self.high - self.low).clamp(min=torch.finfo(torch.float32).tiny)
        return (share.clamp(0, 1) * 255).round().byte().cpu().numpy()


def centered(features: torch.Tensor) -> torch.Tensor:
    """Tokens less their mean, float32."""
    features = features.float()
    return features - features.mean(dim=-2, keepdim=True)
