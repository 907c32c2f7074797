"""The gate over timesteps: who is visited, how often, what the visits estimate, and what it learns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from aselect_hf.modeling.noise_schedule import NoiseSchedule
from aselect_hf.modeling.timestep_gate import TimestepGate, Visits, gate_temperature
from aselect_hf.selection import gate_timesteps

WIDTH = 12


def make_gate(candidates: int = 16, *, seed: int = 0, spread: float = 0.0, **options: Any) -> TimestepGate:
    """A gate on candidates of the default schedule; `spread` is the deviation of its query, so of its logits."""
    schedule = NoiseSchedule()
    timesteps = gate_timesteps(schedule, candidates)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = TimestepGate(WIDTH, timesteps, [schedule.log_snr(t) for t in timesteps], **options)
        torch.nn.init.normal_(gate.query, std=spread)
    return gate


def uniforms(batch: int, candidates: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, candidates + 1, generator=torch.Generator().manual_seed(seed))


def test_weights_start_uniform_and_gradients_flow(normal: Callable[..., torch.Tensor]) -> None:
    gate = make_gate()
    torch.testing.assert_close(gate.weights(), torch.full((16,), 1 / 16))
    optimizer = torch.optim.SGD(gate.parameters(), lr=1.0)
    for step in range(2):  # a query of zero hides the keys from the first step only
        visits = gate.visit(uniforms(8, 16, seed=step), 2)
        features = normal(8, 2, WIDTH, seed=step)
        gate.observe(features, visits)  # between the forward and the backward pass, as in training
        optimizer.zero_grad()
        gate.combine(features, visits).square().sum().backward()
        assert gate.query.grad.abs().max() > 0
        optimizer.step()
    assert gate.key.weight.grad.abs().max() > 0
    assert gate.embedding.weight.grad.abs().max() > 0


@given(
    st.integers(1, 40).flatmap(lambda candidates: st.tuples(st.just(candidates), st.integers(1, candidates))),
    st.floats(0, 100),
    st.floats(0.05, 1),
    st.floats(0.01, 1),
    st.integers(0, 9),
)
def test_inclusion_probabilities_sum_to_the_visits(sizes, spread, temperature, exploration, seed) -> None:
    candidates, num_visited = sizes
    gate = make_gate(candidates, seed=seed, spread=spread, exploration=exploration)
    probabilities = gate.inclusion_probabilities(num_visited, temperature)
    assert probabilities.double().sum().item() == pytest.approx(num_visited, abs=1e-5)
    assert 0 < probabilities.min() <= probabilities.max() <= 1
    weights = gate.weights(temperature)
    shares = (1 - exploration) * weights + exploration / candidates
    free = probabilities < 1 - 1e-4
    assert (probabilities >= (num_visited * shares).clamp(max=1) - 1e-4).all()
    if free.any():
        scale = (probabilities / shares)[free]
        torch.testing.assert_close(scale, scale.mean().expand_as(scale), rtol=1e-3, atol=0)
    visited = gate.visit(uniforms(20, candidates, seed), num_visited, temperature).indices
    assert all(len(set(row)) == num_visited for row in visited.tolist())
    assert 0 <= visited.min() <= visited.max() < candidates


@pytest.mark.parametrize("offset", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("num_visited", [1, 3, 16])
def test_visits_at_the_ends_of_the_unit_interval(num_visited: int, offset: float) -> None:
    numbers = uniforms(500, 16)
    numbers[:, -1] = offset
    visited = make_gate(spread=10.0).visit(numbers, num_visited).indices
    assert all(len(set(row)) == num_visited for row in visited.tolist())


@pytest.mark.parametrize(("num_visited", "spread"), [(1, 3.0), (2, 10.0), (5, 30.0)])
def test_visits_have_the_inclusion_probabilities(num_visited: int, spread: float) -> None:
    gate, count = make_gate(spread=spread), 40_000
    probabilities = gate.inclusion_probabilities(num_visited)
    assert probabilities.max() > 2 * probabilities.min()
    visited = gate.visit(uniforms(count, 16), num_visited).indices
    frequencies = torch.bincount(visited.flatten(), minlength=16) / count
    error = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((frequencies - probabilities).abs() <= 4 * error + 1e-6).all()


def test_a_certain_favourite_is_always_visited() -> None:
    gate = make_gate(spread=30.0)
    favourite = gate.weights(0.05).argmax()
    visits = gate.visit(uniforms(200, 16), 2, 0.05)
    assert gate.inclusion_probabilities(2, 0.05)[favourite] == 1
    assert (visits.indices == favourite).any(dim=1).all()


@pytest.mark.parametrize("num_visited", [1, 2, 7])
def test_estimate_is_unbiased(num_visited: int, normal: Callable[..., torch.Tensor]) -> None:
    gate, features, count = make_gate(spread=10.0), normal(16, 3, WIDTH), 40_000
    gate.mean_features.copy_(normal(16, WIDTH, seed=1))  # any means leave it unbiased
    visits = gate.visit(uniforms(count, 16), num_visited)
    estimates = gate.combine(features[visits.indices], visits)
    assert estimates.shape == (count, 3, WIDTH)
    full = torch.einsum("k,kij->ij", gate.weights(), features)
    error = estimates.std(dim=0) / count**0.5
    assert ((estimates.mean(dim=0) - full).abs() <= 4 * error + 1e-6).all()
    gradient, expected = (torch.autograd.grad(x.sum(), gate.query)[0] for x in (estimates.mean(dim=0), full))
    torch.testing.assert_close(gradient, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def test_visiting_all_is_exact(normal: Callable[..., torch.Tensor]) -> None:
    gate, features = make_gate(spread=10.0), normal(5, 16, 3, WIDTH)
    gate.mean_features.copy_(normal(16, WIDTH, seed=1))
    visits = gate.visit(uniforms(5, 16), 16)
    visited = features.gather(1, visits.indices[..., None, None].expand_as(features))
    full = torch.einsum("k,bkij->bij", gate.weights(), features)
    torch.testing.assert_close(gate.combine(visited, visits), full)


def test_what_tells_timesteps_apart_adds_no_variance(normal: Callable[..., torch.Tensor]) -> None:
    gate, offsets = make_gate(spread=3.0), 10 * normal(16, WIDTH)
    for step in range(20):
        visits = gate.visit(uniforms(500, 16, step), 2)
        gate.observe(offsets[visits.indices], visits)
    estimates = gate.combine(offsets[visits.indices], visits)
    torch.testing.assert_close(estimates, (gate.weights() @ offsets).expand_as(estimates), rtol=1e-3, atol=1e-3)


def test_visits_do_not_depend_on_the_batch() -> None:
    gate, numbers = make_gate(spread=10.0), uniforms(9, 16)
    whole = gate.visit(numbers, 3)
    parts = [gate.visit(part, 3) for part in numbers.split(4)]
    assert torch.equal(whole.indices, torch.cat([part.indices for part in parts]))
    assert torch.equal(whole.importance, torch.cat([part.importance for part in parts]))


def test_running_means_are_means_and_then_forget(normal: Callable[..., torch.Tensor]) -> None:
    gate, features = make_gate(), 5 + 3 * normal(40, 2, WIDTH)
    visits = gate.visit(uniforms(40, 16), 2)
    for rows in (slice(0, 15), slice(15, 40)):
        part = Visits(visits.indices[rows], visits.importance[rows], visits.weights)
        gate.observe(features[rows], part)
    for candidate in range(16):
        seen = features[visits.indices == candidate]
        assert gate.visit_counts[candidate] == len(seen)
        if len(seen):
            torch.testing.assert_close(gate.mean_features[candidate], seen.mean(dim=0))
    gate.visit_counts.fill_(10**6)
    gate.mean_features.zero_()
    constant = torch.arange(WIDTH).float()
    for step in range(200):
        gate.observe(constant.expand(64, 2, -1), gate.visit(uniforms(64, 16, step), 2))
    error = gate.mean_features / constant.max() - constant / constant.max()
    assert 0.05 < error.abs().max() < 0.5  # 1,600 visits each at a memory of 1,000: exp(-1.6) of it is left


def _observe_half(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    gate, (features, visits) = make_gate(), torch.load(folder / "all.pt", weights_only=False)
    rows = slice(0, 10) if rank == 0 else slice(10, 40)
    gate.observe(features[rows], Visits(visits.indices[rows], visits.importance[rows], visits.weights))
    torch.save((gate.mean_features, gate.visit_counts), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_processes_share_what_they_see(normal: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    gate, features = make_gate(), normal(40, 2, WIDTH)
    with torch.no_grad():
        visits = gate.visit(uniforms(40, 16), 2)
    torch.save((features, visits), tmp_path / "all.pt")
    gate.observe(features, visits)
    torch.multiprocessing.start_processes(_observe_half, args=(tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        means, counts = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(means, gate.mean_features)
        assert torch.equal(counts, gate.visit_counts)


@pytest.mark.parametrize("planted", [0, 8, 15])
def test_a_planted_timestep_is_found(planted: int) -> None:
    """Only one of 16 candidates carries the label; images visit two. Annealing ends in a single candidate."""
    generator = torch.Generator().manual_seed(planted)
    gate, candidates, steps = make_gate(seed=planted), 16, 250
    offsets = torch.randn(candidates, WIDTH, generator=generator)  # what distinguishes timesteps, but not images
    head = torch.nn.Linear(WIDTH, 2)
    torch.nn.init.zeros_(head.weight)
    optimizer = torch.optim.AdamW([*gate.parameters(), *head.parameters()], lr=0.01)
    for step in range(steps):
        temperature = gate_temperature(step / steps)
        labels = torch.randint(2, (64,), generator=generator)
        visits = gate.visit(torch.rand(64, candidates + 1, generator=generator), 2, temperature)
        features = offsets[visits.indices] + torch.randn(64, 2, WIDTH, generator=generator)
        features[..., 0] += (visits.indices == planted) * (4.0 * labels[:, None] - 2.0)
        normed = F.layer_norm(features, (WIDTH,))
        gate.observe(normed, visits)
        optimizer.zero_grad()
        F.cross_entropy(head(gate.combine(normed, visits)), labels).backward()
        optimizer.step()
    assert gate.timestep == gate.timesteps[planted]
    assert gate.weights(gate_temperature(1.0)).max() > 0.99


def test_temperature_falls_and_then_stays() -> None:
    temperatures = [gate_temperature(step / 100) for step in range(101)]
    assert temperatures[0] == 1
    assert temperatures[75:] == pytest.approx([0.05] * 26)
    ratios = [after / before for before, after in pairwise(temperatures[:76])]
    assert ratios == pytest.approx([0.05 ** (1 / 75)] * 75)


def test_state_dict_round_trip(normal: Callable[..., torch.Tensor]) -> None:
    gate = make_gate(spread=3.0)
    gate.observe(normal(8, 2, WIDTH), gate.visit(uniforms(8, 16), 2))
    other = TimestepGate(WIDTH, range(16), [0.0] * 16)
    other.load_state_dict(gate.state_dict())
    assert other.named_weights() == gate.named_weights()
    assert other.timestep == gate.timestep == max(gate.named_weights(), key=gate.named_weights().get)
    assert torch.equal(other.visit_counts, gate.visit_counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, normal: Callable[..., torch.Tensor]) -> None:
    gate = make_gate(spread=3.0)
    expected = gate.weights()
    gate.to(dtype)
    features = normal(8, 2, 5, WIDTH).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        visits, weights = gate.visit(uniforms(8, 16), 2), gate.weights()
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, expected, rtol=0.1, atol=0.01)
    gate.observe(features.mean(dim=2), visits)
    assert gate.combine(features, visits).dtype == dtype
    assert gate.visit_counts.sum() == 16
    assert torch.isfinite(gate.weights()).all()


def test_exactly_clean_input_is_a_candidate() -> None:
    schedule = NoiseSchedule(type="flow_matching")
    timesteps = gate_timesteps(schedule)
    gate = TimestepGate(WIDTH, timesteps, [schedule.log_snr(t) for t in timesteps])
    torch.nn.init.normal_(gate.query)
    assert timesteps[0] == 0
    assert torch.isfinite(gate.weights()).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TimestepGate(4, [], []), "timesteps must not be empty"),
        (lambda: TimestepGate(4, [0, 1], [0.0]), "one value a timestep, got 1 for 2"),
        (lambda: make_gate(exploration=0.0), "exploration must lie in \\[0.01, 1\\], got 0.0"),
        (lambda: make_gate().visit(uniforms(2, 15), 2), "uniforms must be \\(batch, 16 candidates \\+ 1\\)"),
        (lambda: make_gate().visit(uniforms(2, 16), 17), "num_visited must lie in 1..16 .*got 17"),
        (lambda: make_gate().inclusion_probabilities(0), "num_visited must lie in 1..16 .*got 0"),
    ],
    ids=["empty", "lengths", "exploration", "uniforms", "too many", "none"],
)
def test_bad_requests(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
