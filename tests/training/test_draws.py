"""Draws belong to the sample: no split of a batch changes them, and no two samples share any."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from hypothesis import given
from hypothesis import strategies as st

from aselect_hf.training.draws import SampleDraws, mix_seed, positions_of, seed_generators


def draw_all(draws: SampleDraws) -> torch.Tensor:
    parts = (draws.uniform(), draws.normal(3, 5), draws.integers(2, 9), draws.uniform(2), draws.normal())
    return torch.cat([part.double().flatten(1) if part.ndim > 1 else part.double()[:, None] for part in parts], 1)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=12), st.data())
def test_any_split_gives_the_same_numbers(positions, data):
    cut = data.draw(st.integers(0, len(positions)))
    seed, epoch = data.draw(st.integers(0, 2**40)), data.draw(st.integers(0, 1000))
    whole = draw_all(SampleDraws(seed, epoch, positions))
    parts = [draw_all(SampleDraws(seed, epoch, part)) for part in (positions[:cut], positions[cut:])]
    assert torch.equal(whole, torch.cat(parts))


@given(st.integers(0, 50), st.integers(1, 8), st.integers(1, 8))
def test_processes_and_accumulation_cover_the_doubled_batch(step, processes, batch_size):
    """Whoever holds the parts of a global batch, its places in the epoch are the same."""
    whole = list(positions_of(step, 0, 1, processes * batch_size))
    over_processes = [p for rank in range(processes) for p in positions_of(step, rank, processes, batch_size)]
    over_steps = [p for i in range(processes) for p in positions_of(step * processes + i, 0, 1, batch_size)]
    assert whole == over_processes == over_steps


def test_shapes_types_and_ranges():
    draws = SampleDraws(0, 0, range(500))
    assert len(draws) == 500
    uniform, integers, normal = draws.uniform(2, 3), draws.integers(3, 7), draws.normal(1, 8, 8)
    assert uniform.shape == (500, 2, 3)
    assert (uniform >= 0).all()
    assert (uniform < 1).all()
    assert integers.dtype == torch.int64
    assert integers.shape == (500,)
    assert set(integers.tolist()) == {3, 4, 5, 6}
    assert normal.shape == (500, 1, 8, 8)
    assert normal.dtype == torch.float32


@pytest.mark.parametrize("axis", ["position", "epoch", "seed"])
def test_neighbors_are_independent(axis):
    """Moments and correlations of 400 neighboring streams stay within five standard errors."""
    keys = {
        "position": [(0, 0, i) for i in range(400)],
        "epoch": [(0, i, 0) for i in range(400)],
        "seed": [(i, 0, 0) for i in range(400)],
    }[axis]
    values = torch.cat([SampleDraws(seed, epoch, [position]).normal(1000) for seed, epoch, position in keys]).double()
    assert abs(values.mean().item()) < 5 / 400_000**0.5
    assert values.var().item() == pytest.approx(1, abs=5 * (2 / 400_000) ** 0.5)
    correlations = torch.corrcoef(values) - torch.eye(400)
    assert correlations.abs().max().item() < 6 / 1000**0.5
    assert abs((values[1:] * values[:-1]).mean().item()) < 5 / 399_000**0.5
    first = values[:, 0]
    assert abs((first[1:] * first[:-1]).mean().item()) < 5 / 399**0.5


def test_seeds_of_a_run_rarely_collide():
    seeds = {mix_seed(0, epoch, position) for epoch in range(10) for position in range(2000)}
    assert len(seeds) >= 20_000 - 2


def test_draws_are_fast():
    """256 images of 28 x 28: about 5 ms; the limit leaves room for a busy machine."""
    times = []
    for epoch in range(5):
        start = time.perf_counter()
        SampleDraws(0, epoch, range(256)).normal(784)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_seeding_in_every_step_is_that_of_accelerate():
    """The same numbers as `set_seed`, which keeps a stack trace per call as long as CUDA is not used."""
    found = []
    for seed_all in (set_seed, lambda seed: seed_generators(seed, torch.device("cpu"))):
        seed_all(5)
        found.append((random.random(), np.random.rand(), torch.rand(3).tolist()))
    assert found[0] == found[1]
    queued = len(torch.cuda._queued_calls)
    seed_generators(6, torch.device("cpu"))
    assert len(torch.cuda._queued_calls) == queued
