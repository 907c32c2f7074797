"""A learnable gate over candidate timesteps: one set of weights per data set, trained with the task until one is left.

The published note asks for a light attention-based gate that reads the transformer's own hidden states, is trained end
to end with the task and costs no forward passes beyond those of training. The form below is ours:

    weights w = softmax(query . key / temperature),      key_k = linear(mean feature at k) + embedding(log-SNR of k)
    loss = sum_k w_k loss(head(feature_k)), estimated from the M candidates an image visits (Horvitz & Thompson 1952)

This is the expected loss of inference at one timestep drawn from the weights. The loss of the weighted feature,
loss(head(sum_k w_k feature_k)), is not used: a mixture holds information that none of its parts has, and the timesteps
that it favored were scattered over the axis. Visits follow the weights, so unlikely candidates cost little. During
training the temperature falls until the weights are practically one-hot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from aselect_hf.selection.ties import best_of

MAX_LOG_SNR = 20.0
"""The gate does not tell apart cleaner inputs than this (a sigma of 1/20,000), up to exactly clean ones."""
FINAL_TEMPERATURE = 0.05
ANNEALED_AT = 0.75
FREQUENCIES = 16
MIN_EXPLORATION = 0.01  # keeps inclusion probabilities far above their rounding
MEMORY = 1000
"""Visits over which a candidate's mean feature and mean losses are averaged."""
UNIT = 2**30
"""Inclusion probabilities are multiples of `1 / UNIT`, so their sums are exact and no candidate is drawn twice."""


def gate_temperature(progress: float) -> float:
    """Temperature of the weights: 1 at the start, falling exponentially to 0.05 at 0.75, then constant (ours).

    Args:
        progress: share of the training that is done, in [0, 1].
    """
    return FINAL_TEMPERATURE ** min(1.0, progress / ANNEALED_AT)


@dataclass
class Visits:
    """The candidates that each image visits.

    Args:
        indices: `(batch, num_visited)`, distinct within an image.
        importance: `(batch, num_visited)` float32, weight over inclusion probability; differentiable in the weight.
        weights: `(candidates,)`, all weights at that moment.
    """

    indices: torch.Tensor
    importance: torch.Tensor
    weights: torch.Tensor


class TimestepGate(nn.Module):
    """Attention of one learned query over candidate timesteps; one choice per data set, not per image.

    Args:
        width: width of the feature.
        timesteps: candidates.
        log_snr: log-SNR of each candidate; may be infinite.
        num_heads: heads that train side by side with separate losses; the best one leads the gate.
        key_width: width of query and keys.
        exploration: share of the visits that is spread evenly over the candidates, in [0.01, 1].

    Raises:
        ValueError: no candidates, another number of `log_snr`, or an exploration outside its range.
    """

    timesteps: torch.Tensor
    log_snr: torch.Tensor
    mean_features: torch.Tensor
    mean_losses: torch.Tensor
    visit_counts: torch.Tensor
    settled: torch.Tensor

    def __init__(
        self,
        width: int,
        timesteps: Sequence[int],
        log_snr: Sequence[float],
        *,
        num_heads: int = 1,
        key_width: int = 64,
        exploration: float = 0.2,
    ) -> None:
        super().__init__()
        if not timesteps:
            raise ValueError("timesteps must not be empty")
        if len(log_snr) != len(timesteps):
            raise ValueError(f"log_snr must hold one value per timestep, got {len(log_snr)} for {len(timesteps)}")
        if not MIN_EXPLORATION <= exploration <= 1:
            raise ValueError(f"exploration must be in [{MIN_EXPLORATION}, 1], got {exploration}")
        self.exploration = exploration
        self.query = nn.Parameter(torch.zeros(key_width))  # weights start uniform; keys differ, so it gets a gradient
        self.key = nn.Linear(width, key_width, bias=False)
        self.embedding = nn.Linear(2 * FREQUENCIES, key_width, bias=False)
        clipped = torch.tensor([float(value) for value in log_snr]).clamp(-MAX_LOG_SNR, MAX_LOG_SNR)
        self.register_buffer("timesteps", torch.tensor([int(t) for t in timesteps]))
        self.register_buffer("log_snr", clipped)
        self.register_buffer("mean_features", torch.zeros(len(timesteps), width))
        self.register_buffer("mean_losses", torch.zeros(num_heads, len(timesteps)))
        self.register_buffer("visit_counts", torch.zeros(len(timesteps), dtype=torch.long))
        self.register_buffer("settled", torch.tensor(-1))

    def weights(self, temperature: float = 1.0) -> torch.Tensor:
        """Weights of all candidates, `(candidates,)` float32 with sum 1; differentiable."""
        with torch.autocast(self.query.device.type, enabled=False):
            periods = 2 * MAX_LOG_SNR / 2 ** torch.linspace(0, 6, FREQUENCIES, device=self.query.device)
            angles = 2 * math.pi * self.log_snr.float()[:, None] / periods
            waves = torch.cat([angles.sin(), angles.cos()], dim=1)
            means = nn.functional.layer_norm(self.mean_features.float(), self.mean_features.shape[-1:])
            keys = means @ self.key.weight.float().T + waves @ self.embedding.weight.float().T
            logits = keys @ self.query.float() / len(self.query) ** 0.5
            return (logits / temperature).softmax(dim=0)

    def inclusion_probabilities(self, num_visited: int, temperature: float = 1.0) -> torch.Tensor:
        """Probability that an image visits each candidate, `(candidates,)` in (0, 1], with sum `num_visited`.

        They are proportional to the weights (mixed with an even spread), and at most 1.
        """
        return self._inclusion_units(self.weights(temperature).detach(), num_visited).float() / UNIT

    def visit(self, uniforms: torch.Tensor, num_visited: int, temperature: float = 1.0) -> Visits:
        """Draw distinct candidates for every image: systematic sampling in a random order (Madow 1949).

        Args:
            uniforms: `(batch, candidates + 1)` float32 in [0, 1): the order of the candidates, then an offset. If each
                image has uniforms of its own, its visits do not depend on the batch.
            num_visited: candidates per image. With a single one nothing is compared, and weights follow the scales of
                the features instead of what they tell.
        """
        candidates = len(self.timesteps)
        if uniforms.ndim != 2 or uniforms.shape[1] != candidates + 1:
            raise ValueError(f"uniforms must be (batch, {candidates} candidates + 1), got {tuple(uniforms.shape)}")
        weights = self.weights(temperature)
        units = self._inclusion_units(weights.detach(), num_visited)
        order = uniforms[:, :-1].argsort(dim=1, stable=True)
        offsets = (uniforms[:, -1:] * UNIT).long()
        points = offsets + UNIT * torch.arange(num_visited, device=offsets.device)
        indices = order.gather(1, torch.searchsorted(units[order].cumsum(dim=1), points, right=True))
        return Visits(indices, weights[indices] * UNIT / units[indices], weights)

    def settle(self, batch_size: int) -> Visits:
        """Fix the current favorite as the choice, whatever the weights become; every image visits it alone.

        The parameters stay in the graph with zero gradients, because distributed training needs a gradient for each.
        """
        weights = self.weights()
        if self.settled < 0:
            self.settled.fill_(best_of(weights.tolist()))
        indices = self.settled.expand(batch_size, 1)
        only = nn.functional.one_hot(self.settled, len(weights)) + 0 * weights
        return Visits(indices, only[indices], only)

    def expected_losses(self, losses: torch.Tensor, visits: Visits) -> torch.Tensor:
        """Unbiased estimates of `sum_k w_k loss_k` over all candidates, `(heads,)`.

        Only the difference of each loss from its candidate's running mean is estimated; the means themselves enter
        exactly (a control variate), so differences between timesteps add no variance. Every head learns from its own
        weighted losses. The weights learn only from the head with the least expected loss so far.

        Args:
            losses: `(heads, batch, num_visited)`, in the order of `visits.indices`.
        """
        seen = self.visit_counts > 0
        means = self.mean_losses.float()
        unseen = means[:, seen].mean(dim=1, keepdim=True) if seen.any() else torch.zeros_like(means[:, :1])
        means = torch.where(seen, means, unseen)
        leader = (means @ visits.weights.detach()).nan_to_num(torch.inf).argmin()
        leads = torch.arange(len(means), device=means.device) == leader
        importance = torch.where(leads[:, None, None], visits.importance, visits.importance.detach())
        weights = torch.where(leads[:, None], visits.weights, visits.weights.detach())
        return (importance * (losses - means[:, visits.indices])).sum(dim=2).mean(dim=1) + (weights * means).sum(dim=1)

    @torch.no_grad()
    def observe(self, pooled: torch.Tensor, losses: torch.Tensor, visits: Visits) -> None:
        """Update the means with pooled features `(batch, num_visited, width)` and losses `(heads, batch, num_visited)`.

        The means are plain at first and forget later. All processes share them.
        """
        values = torch.cat([pooled.float().flatten(0, 1), losses.float().flatten(1).T], dim=1)
        seen = nn.functional.one_hot(visits.indices.flatten(), len(self.timesteps)).to(values.dtype)
        sums = torch.cat([seen.T @ values, seen.sum(dim=0)[:, None]], dim=1)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        sums, counts = sums[:, :-1], sums[:, -1:]
        known = self.visit_counts[:, None].clamp(max=MEMORY)
        means = torch.cat([self.mean_features, self.mean_losses.T], dim=1).float()
        means = (known * means + sums) / (known + counts).clamp(min=1)
        width = self.mean_features.shape[1]
        self.mean_features.copy_(means[:, :width])
        self.mean_losses.copy_(means[:, width:].T)
        self.visit_counts += counts[:, 0].long()

    @property
    def timestep(self) -> int:
        """The candidate with the highest weight, or the one that was settled on."""
        favorite = int(self.settled)
        return int(self.timesteps[favorite if favorite >= 0 else best_of(self.weights().tolist())])

    def named_weights(self, temperature: float = 1.0) -> dict[int, float]:
        """Weights by timestep."""
        return dict(zip(self.timesteps.tolist(), self.weights(temperature).tolist(), strict=True))

    def _inclusion_units(self, weights: torch.Tensor, num_visited: int) -> torch.Tensor:
        """Inclusion probabilities in units of `1 / UNIT`, as integers with sum `num_visited * UNIT`."""
        candidates = len(weights)
        if not 1 <= num_visited <= candidates:
            raise ValueError(f"num_visited must be in 1..{candidates} (the number of candidates), got {num_visited}")
        shares = (1 - self.exploration) * weights + self.exploration / candidates
        largest = shares.sort(descending=True).values
        # If the s largest are certain, the others share the other num_visited - s visits. Take the least s that fits.
        rest = largest.flip(0).cumsum(0).flip(0)[:num_visited]
        scales = (num_visited - torch.arange(num_visited, device=weights.device)) / rest
        fits = scales * largest[:num_visited] <= 1 + 1e-6
        scale = scales[fits.int().argmax()]
        units = (UNIT * (scale * shares).clamp(max=1)).long()
        if num_visited == candidates:
            return torch.full_like(units, UNIT)
        rounding = num_visited * UNIT - units.sum()  # given to the smallest, or taken from the largest below 1
        units[units.argmin()] += rounding.clamp(min=0)
        units[units.masked_fill(units == UNIT, 0).argmax()] += rounding.clamp(max=0)
        return units
