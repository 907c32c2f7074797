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
from aselect_hf.selection import gate_timesteps
from aselect_hf.selection.timestep_gate import TimestepGate, Visits, gate_temperature

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
        losses = normal(1, 8, 2, seed=step).exp()
        loss = gate.expected_losses(losses, visits).sum()
        gate.observe(normal(8, 2, WIDTH, seed=step), losses, visits)  # before the backward pass, as in training
        optimizer.zero_grad()
        loss.backward()
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
    gate, losses, count = make_gate(spread=10.0), normal(1, 16).exp(), 40_000
    gate.mean_losses.copy_(normal(1, 16, seed=1).exp())  # any means leave it unbiased
    gate.visit_counts.fill_(1)
    visits = gate.visit(uniforms(count, 16), num_visited)
    visited = losses[:, visits.indices]
    singles = [gate.expected_losses(visited[:, row], _rows(visits, row)) for row in torch.arange(count).split(100)]
    estimate, error = torch.stack(singles).mean(dim=0), torch.stack(singles).std(dim=0) / len(singles) ** 0.5
    full = losses @ gate.weights()
    assert ((estimate - full).abs() <= 4 * error + 1e-6).all()
    gradient, expected = (torch.autograd.grad(x.sum(), gate.query)[0] for x in (estimate, full))
    torch.testing.assert_close(gradient, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())


def _rows(visits: Visits, rows: Any) -> Visits:
    return Visits(visits.indices[rows], visits.importance[rows], visits.weights)


def test_visiting_all_is_exact(normal: Callable[..., torch.Tensor]) -> None:
    gate, losses = make_gate(spread=10.0, num_heads=3), normal(3, 5, 16).exp()
    gate.mean_losses.copy_(normal(3, 16, seed=1))
    gate.visit_counts.fill_(1)
    visits = gate.visit(uniforms(5, 16), 16)
    visited = losses.gather(2, visits.indices.expand_as(losses))
    torch.testing.assert_close(gate.expected_losses(visited, visits), (losses @ gate.weights()).mean(dim=1))


def test_what_tells_timesteps_apart_adds_no_variance(normal: Callable[..., torch.Tensor]) -> None:
    gate, offsets = make_gate(spread=3.0), 10 * normal(16)
    for step in range(20):
        visits = gate.visit(uniforms(500, 16, step), 2)
        losses = offsets[visits.indices][None]
        gate.observe(normal(500, 2, WIDTH), losses, visits)
    for row in range(50):
        estimate = gate.expected_losses(losses[:, row : row + 1], _rows(visits, slice(row, row + 1)))
        torch.testing.assert_close(estimate, (visits.weights @ offsets)[None], rtol=1e-3, atol=1e-3)


def test_the_best_head_leads_the_weights_and_all_heads_learn(normal: Callable[..., torch.Tensor]) -> None:
    gate, visits = make_gate(spread=3.0, num_heads=3), make_gate().visit(uniforms(64, 16), 2)
    gate.observe(normal(64, 2, WIDTH), torch.tensor([torch.nan, 1.0, 2.0])[:, None, None].expand(3, 64, 2), visits)
    losses = normal(3, 64, 2).exp().requires_grad_()
    visits = gate.visit(uniforms(64, 16), 2)
    of_weights = [
        torch.autograd.grad(head, gate.query, retain_graph=True, allow_unused=True)[0]
        for head in gate.expected_losses(losses, visits)
    ]
    assert [gradient is not None and bool(gradient.any()) for gradient in of_weights] == [False, True, False]
    gate.expected_losses(losses, visits)[1:].sum().backward()
    torch.testing.assert_close(losses.grad[1:], (visits.importance / 64).detach().expand(2, -1, -1))


def test_visits_do_not_depend_on_the_batch() -> None:
    gate, numbers = make_gate(spread=10.0), uniforms(9, 16)
    whole = gate.visit(numbers, 3)
    parts = [gate.visit(part, 3) for part in numbers.split(4)]
    assert torch.equal(whole.indices, torch.cat([part.indices for part in parts]))
    assert torch.equal(whole.importance, torch.cat([part.importance for part in parts]))


def test_running_means_are_means_and_then_forget(normal: Callable[..., torch.Tensor]) -> None:
    gate, features = make_gate(), 5 + 3 * normal(40, 2, WIDTH)
    visits, losses = gate.visit(uniforms(40, 16), 2), features[..., 0][None]
    for rows in (slice(0, 15), slice(15, 40)):
        gate.observe(features[rows], losses[:, rows], _rows(visits, rows))
    for candidate in range(16):
        seen = features[visits.indices == candidate]
        assert gate.visit_counts[candidate] == len(seen)
        if len(seen):
            torch.testing.assert_close(gate.mean_features[candidate], seen.mean(dim=0))
            torch.testing.assert_close(gate.mean_losses[0, candidate], seen[:, 0].mean())
    gate.visit_counts.fill_(10**6)
    gate.mean_features.zero_()
    constant = torch.arange(WIDTH).float()
    for step in range(200):
        gate.observe(constant.expand(64, 2, -1), torch.ones(1, 64, 2), gate.visit(uniforms(64, 16, step), 2))
    error = gate.mean_features / constant.max() - constant / constant.max()
    assert 0.05 < error.abs().max() < 0.5  # 1,600 visits each at a memory of 1,000: exp(-1.6) of it is left


def _observe_half(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    gate, (features, visits) = make_gate(), torch.load(folder / "all.pt", weights_only=False)
    rows = slice(0, 10) if rank == 0 else slice(10, 40)
    gate.observe(features[rows], features[None, rows, :, 0], _rows(visits, rows))
    torch.save((gate.mean_features, gate.mean_losses, gate.visit_counts), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_processes_share_what_they_see(normal: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    gate, features = make_gate(), normal(40, 2, WIDTH)
    with torch.no_grad():
        visits = gate.visit(uniforms(40, 16), 2)
    torch.save((features, visits), tmp_path / "all.pt")
    gate.observe(features, features[None, ..., 0], visits)
    torch.multiprocessing.start_processes(_observe_half, args=(tmp_path,), nprocs=2, start_method="fork")
    for rank in range(2):
        means, losses, counts = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(means, gate.mean_features)
        torch.testing.assert_close(losses, gate.mean_losses)
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
        logits, targets = head(F.layer_norm(features, (WIDTH,))), labels[:, None].expand(-1, 2)
        losses = F.cross_entropy(logits.movedim(2, 1), targets, reduction="none")[None]
        loss = gate.expected_losses(losses, visits).sum()
        gate.observe(features, losses, visits)
        optimizer.zero_grad()
        loss.backward()
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
    gate.observe(normal(8, 2, WIDTH), normal(1, 8, 2), gate.visit(uniforms(8, 16), 2))
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
    features, losses = normal(8, 2, WIDTH).to(dtype), normal(1, 8, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        visits, weights = gate.visit(uniforms(8, 16), 2), gate.weights()
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, expected, rtol=0.1, atol=0.01)
    gate.observe(features, losses, visits)
    assert torch.isfinite(gate.expected_losses(losses, visits)).all()
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
        (lambda: TimestepGate(4, [0, 1], [0.0]), "one value per timestep, got 1 for 2"),
        (lambda: make_gate(exploration=0.0), "exploration must be in \\[0.01, 1\\], got 0.0"),
        (lambda: make_gate().visit(uniforms(2, 15), 2), "uniforms must be \\(batch, 16 candidates \\+ 1\\)"),
        (lambda: make_gate().visit(uniforms(2, 16), 17), "num_visited must be in 1..16 .*got 17"),
        (lambda: make_gate().inclusion_probabilities(0), "num_visited must be in 1..16 .*got 0"),
    ],
    ids=["empty", "lengths", "exploration", "uniforms", "too many", "none"],
)
def test_bad_requests(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_of_weights_that_differ_by_rounding_every_machine_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = make_gate(3)
    weights = torch.tensor([0.2, 0.4, 0.4 + 1e-7])
    monkeypatch.setattr(gate, "weights", lambda temperature=1.0: weights)
    assert gate.timestep == gate.timesteps[1]
    assert gate.settle(4).indices.tolist() == [[1]] * 4
