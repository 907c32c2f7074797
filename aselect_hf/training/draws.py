"""Random numbers that belong to a sample, not to the process or batch that happens to hold it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def mix_seed(*parts: int) -> int:
    """Hash integers into a seed in 0..2**32 - 1 (torch's CPU generator reads 32 bits)."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class SampleDraws:
    """Random numbers for a batch, one CPU generator per sample, seeded by (seed, epoch, position).

    A sample gets the same numbers however the global batch is divided among processes, accumulation steps and batches,
    as long as the same draws are requested in the same order.

    Args:
        positions: place of each sample in the global order of the epoch, see `positions_of`.
    """

    def __init__(self, seed: int, epoch: int, positions: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(mix_seed(seed, epoch, position)) for position in positions]

    def __len__(self) -> int:
        return len(self._generators)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), `(batch, *shape)` float32."""
        return self._draw(torch.empty(len(self), *shape), lambda row, generator: row.uniform_(generator=generator))

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, `(batch, *shape)` float32."""
        return self._draw(torch.empty(len(self), *shape), lambda row, generator: row.normal_(generator=generator))

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Integers in low..high - 1, `(batch, *shape)` int64."""
        empty = torch.empty(len(self), *shape, dtype=torch.int64)
        return self._draw(empty, lambda row, generator: row.random_(low, high, generator=generator))

    def _draw(self, out: torch.Tensor, fill: Callable[[torch.Tensor, torch.Generator], torch.Tensor]) -> torch.Tensor:
        for row, generator in zip(out, self._generators, strict=True):
            fill(row, generator)
        return out


def positions_of(micro_step: int, process_index: int, num_processes: int, batch_size: int) -> range:
    """Places of a process's batch in the global order of an epoch.

    Args:
        micro_step: forward passes of this epoch before this one.
        batch_size: samples per process and forward pass.
    """
    first = (micro_step * num_processes + process_index) * batch_size
    return range(first, first + batch_size)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the global random generators of Python, numpy and torch, as `accelerate.utils.set_seed` does.

    On a CPU only its own generator of torch is seeded: `torch.manual_seed` would also queue a call for CUDA in every
    step, with a stack trace.
    """
    random.seed(seed)
    np.random.seed(seed)
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore every global random generator afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
