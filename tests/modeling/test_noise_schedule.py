"""The noise axis: scale against diffusers, direction by log-SNR and by what networks do, targets, bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from aselect_hf import ASelectDiTModel
from aselect_hf.modeling.noise_schedule import NoiseSchedule

GIVEN_BETAS = np.linspace(1e-3, 0.3, 50).tolist()

DDPM: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear-short": {"num_train_timesteps": 200, "beta_start": 0.0005, "beta_end": 0.05},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "given": {"trained_betas": GIVEN_BETAS, "num_train_timesteps": 50},
}
FLOW: dict[str, dict[str, Any]] = {
    "flow": {"type": "flow_matching"},
    "flow-short": {"type": "flow_matching", "num_train_timesteps": 250},
    "sit": {"type": "flow_matching", "model_time": "data_fraction"},
    "repa": {"type": "flow_matching", "model_time": "noise_fraction"},
}
PREDICTIONS = [(name, fields, kind) for name, fields in DDPM.items() for kind in ("epsilon", "sample", "v_prediction")]
PREDICTIONS += [(name, fields, kind) for name, fields in FLOW.items() for kind in ("velocity", "epsilon", "sample")]

every_ddpm = pytest.mark.parametrize("fields", DDPM.values(), ids=DDPM)
every_flow = pytest.mark.parametrize("fields", FLOW.values(), ids=FLOW)
every_schedule = pytest.mark.parametrize("fields", (DDPM | FLOW).values(), ids=DDPM | FLOW)
fractions = st.floats(0, 1, allow_subnormal=False)


@every_ddpm
def test_ddpm_scales_are_those_of_diffusers(fields: dict[str, Any]) -> None:
    scheduler, schedule = DDPMScheduler(**fields), NoiseSchedule(**fields)
    steps = torch.arange(schedule.num_train_timesteps)
    torch.testing.assert_close(schedule.alpha(steps) ** 2, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    exact = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    torch.testing.assert_close(schedule.alpha(steps.double()), exact.sqrt(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(schedule.sigma(steps.double()), (1 - exact).sqrt(), rtol=1e-4, atol=1e-9)


@every_ddpm
def test_ddpm_noising_is_that_of_diffusers(fields: dict[str, Any]) -> None:
    clean, noise = torch.randn(2, 4, 3, 8, 8)
    steps = torch.tensor([0, 7, 31, 49])
    expected = DDPMScheduler(**fields).add_noise(clean, noise, steps)
    torch.testing.assert_close(NoiseSchedule(**fields).add_noise(clean, noise, steps), expected, rtol=1e-4, atol=1e-5)


@every_ddpm
@given(fraction=fractions)
def test_ddpm_preserves_variance_between_integers_too(fields: dict[str, Any], fraction: float) -> None:
    schedule = NoiseSchedule(**fields)
    t = fraction * (schedule.num_train_timesteps - 1)
    assert math.isclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rel_tol=1e-12)


@every_flow
@given(fraction=fractions)
def test_flow_mixes_linearly(fields: dict[str, Any], fraction: float) -> None:
    schedule = NoiseSchedule(**fields)
    t = fraction * (schedule.num_train_timesteps - 1)
    assert math.isclose(schedule.sigma(t), t / schedule.num_train_timesteps, abs_tol=1e-12)
    assert math.isclose(schedule.alpha(t) + schedule.sigma(t), 1, rel_tol=1e-12)


@every_schedule
@given(first=fractions, second=fractions)
def test_log_snr_falls_strictly_with_t(fields: dict[str, Any], first: float, second: float) -> None:
    schedule = NoiseSchedule(**fields)
    last = schedule.num_train_timesteps - 1
    low, high = sorted((first * last, second * last))
    if high - low > 1e-9 * last:
        assert schedule.log_snr(low) > schedule.log_snr(high)


@every_schedule
def test_the_ends_are_clean_and_noise(fields: dict[str, Any]) -> None:
    schedule = NoiseSchedule(**fields)
    assert schedule.log_snr(0) > 6
    assert schedule.log_snr(schedule.num_train_timesteps - 1) < -4
    assert bool((torch.diff(schedule.log_snr(torch.arange(schedule.num_train_timesteps).double())) < 0).all())


@every_schedule
@given(fraction=st.floats(0.001, 1))
def test_log_snr_is_that_of_alpha_and_sigma_and_inverts(fields: dict[str, Any], fraction: float) -> None:
    schedule = NoiseSchedule(**fields)
    t = fraction * (schedule.num_train_timesteps - 1)
    log_snr = schedule.log_snr(t)
    assert math.isclose(log_snr, 2 * math.log(schedule.alpha(t) / schedule.sigma(t)), rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(schedule.timestep_from_log_snr(log_snr), t, rel_tol=1e-6, abs_tol=1e-6)


@every_schedule
def test_inverse_stays_on_the_axis(fields: dict[str, Any]) -> None:
    schedule = NoiseSchedule(**fields)
    assert schedule.timestep_from_log_snr(1e4) == pytest.approx(0, abs=1e-3)
    assert schedule.timestep_from_log_snr(-1e4) == schedule.num_train_timesteps - 1
    assert schedule.timestep_from_log_snr(torch.tensor(math.inf)) == 0


@every_schedule
@pytest.mark.parametrize("quantity", ["alpha", "sigma", "log_snr", "timestep_from_log_snr"])
def test_numbers_give_floats_and_tensors_give_tensors_of_their_shape(fields: dict[str, Any], quantity: str) -> None:
    function = getattr(NoiseSchedule(**fields), quantity)
    assert type(function(3)) is float
    assert type(function(3.0)) is float
    for shape in ((), (4,), (2, 1, 3)):
        result = function(torch.full(shape, 3))
        assert result.shape == shape
        assert result.dtype == torch.float32
        assert result.flatten()[0].item() == pytest.approx(function(3))
    assert function(torch.full((2,), 3.0, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(("name", "fields", "prediction_type"), PREDICTIONS, ids=lambda value: str(value)[:14])
@pytest.mark.parametrize("batched", [True, False], ids=["per-sample", "one-t"])
def test_a_perfect_prediction_reveals_the_noise(
    name: str, fields: dict[str, Any], prediction_type: str, batched: bool
) -> None:
    schedule = NoiseSchedule(**fields, prediction_type=prediction_type)
    clean, noise = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([5, 20, 45]) if batched else torch.tensor(20)
    noisy = schedule.add_noise(clean, noise, t)
    recovered = schedule.predicted_noise(schedule.training_target(clean, noise, t), noisy, t)
    torch.testing.assert_close(recovered, noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_ddpm_targets_are_those_of_diffusers(prediction_type: str) -> None:
    clean, noise = torch.randn(2, 3, 2, 4, 4)
    t = torch.tensor([5, 400, 990])
    expected = {"epsilon": noise, "sample": clean, "v_prediction": DDPMScheduler().get_velocity(clean, noise, t)}
    target = NoiseSchedule(prediction_type=prediction_type).training_target(clean, noise, t)
    torch.testing.assert_close(target, expected[prediction_type], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model_time", "direction"), [("timestep", 1), ("data_fraction", -1), ("noise_fraction", 1)])
def test_velocity_is_the_derivative_of_x_in_the_networks_own_time(model_time: str, direction: int) -> None:
    schedule = NoiseSchedule("flow_matching", model_time=model_time)
    clean, noise = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64)
    before, after = schedule.add_noise(clean, noise, 400), schedule.add_noise(clean, noise, 401)
    derivative = direction * (after - before) * schedule.num_train_timesteps
    torch.testing.assert_close(schedule.training_target(clean, noise, torch.tensor(400)), derivative)


def test_model_time() -> None:
    t = torch.tensor([0, 250, 999])
    assert NoiseSchedule().model_time(t).tolist() == [0, 250, 999]
    assert NoiseSchedule("flow_matching").model_time(t).tolist() == [0, 250, 999]
    assert NoiseSchedule(**FLOW["sit"]).model_time(t).tolist() == pytest.approx([1, 0.75, 0.001])
    assert NoiseSchedule(**FLOW["repa"]).model_time(t).tolist() == pytest.approx([0, 0.25, 0.999])


def test_default_predictions() -> None:
    assert NoiseSchedule().prediction_type == "epsilon"
    assert NoiseSchedule("flow_matching").prediction_type == "velocity"


@every_schedule
def test_dict_round_trip(fields: dict[str, Any]) -> None:
    schedule = NoiseSchedule(**fields)
    again = NoiseSchedule.from_dict(schedule.to_dict())
    assert again.to_dict() == schedule.to_dict()
    assert again.log_snr(17) == schedule.log_snr(17)
    assert again.model_time(torch.tensor([17])).tolist() == schedule.model_time(torch.tensor([17])).tolist()


@every_schedule
def test_builds_under_the_meta_device(fields: dict[str, Any]) -> None:
    with torch.device("meta"):
        schedule = NoiseSchedule(**fields)
    assert schedule.alpha(17) == NoiseSchedule(**fields).alpha(17)


@pytest.mark.parametrize("t", [0, 50, 999, 50.0, np.int64(50), torch.tensor(50)], ids=repr)
def test_whole_timesteps_are_accepted(t: Any) -> None:
    checked = NoiseSchedule().check_timestep(t)
    assert checked == int(t)
    assert type(checked) is int


@pytest.mark.parametrize(
    "t",
    [
        -1,
        1000,
        1e6,
        50.5,
        math.nan,
        math.inf,
        -math.inf,
        True,
        None,
        "50",
        [50],
        torch.tensor(0.5),
        torch.tensor([5, 6]),
    ],
    ids=repr,
)
def test_other_timesteps_are_refused_with_the_range(t: Any) -> None:
    with pytest.raises(ValueError, match=r"timestep.*0\.\.999"):
        NoiseSchedule().check_timestep(t)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0, np.float64(0.5), torch.tensor(1.0), np.float32(0.5)], ids=repr)
def test_a_float_in_the_unit_interval_is_refused(t: Any) -> None:
    with pytest.raises(ValueError, match="timestep"):
        NoiseSchedule().check_timestep(t)


@pytest.mark.parametrize("t", [-1, 1000, math.nan, torch.tensor([3, 1000]), torch.tensor([3.0, math.nan])], ids=repr)
@pytest.mark.parametrize("quantity", ["alpha", "sigma", "log_snr"])
def test_scales_exist_only_on_the_axis(quantity: str, t: Any) -> None:
    with pytest.raises(ValueError, match=r"0\.\.999"):
        getattr(NoiseSchedule(), quantity)(t)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"type": "edm"}, "type"),
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule"),
        ({"beta_start": 0.0}, "betas"),
        ({"beta_end": 1.0}, "betas"),
        ({"beta_start": math.nan}, "betas"),
        ({"trained_betas": GIVEN_BETAS}, "trained_betas"),
        ({"trained_betas": [0.5, 1.5], "num_train_timesteps": 2}, "betas"),
        ({"prediction_type": "velocity"}, "prediction_type"),
        ({"prediction_type": "noise"}, "prediction_type"),
        ({"type": "flow_matching", "prediction_type": "v_prediction"}, "prediction_type"),
        ({"type": "flow_matching", "trained_betas": GIVEN_BETAS, "num_train_timesteps": 50}, "trained_betas"),
        ({"model_time": "seconds"}, "model_time"),
        ({"beta_sched": "linear"}, "beta_sched"),
    ],
    ids=repr,
)
def test_bad_fields_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        NoiseSchedule.from_dict(fields)


@pytest.mark.parametrize("name", ["linear", "flow", "sit"])
def test_a_trained_network_denoises_along_the_axis(name: str, make_config: Any) -> None:
    """Its estimate of the clean input worsens with t, whatever time and target the network itself works with."""
    torch.manual_seed(0)
    fields = (DDPM | FLOW)[name]
    config = make_config(hidden_size=32, num_attention_heads=2, patch_size=4, noise_schedule=fields)
    network = ASelectDiTModel(config)
    schedule = network.noise_schedule
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)

    def sample(count: int) -> torch.Tensor:
        """Constant images of random sign."""
        return torch.randint(0, 2, (count, config.num_channels, 1, 1)).mul(2.0).sub(1).expand(-1, -1, 8, 8)

    for _ in range(80):
        clean, t = sample(64), torch.randint(0, 1000, (64,))
        noise = torch.randn(clean.shape)
        target = schedule.training_target(clean, noise, t)
        loss = (network.denoise(schedule.add_noise(clean, noise, t), t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def error(t: int) -> float:
        clean = sample(128)
        noisy = schedule.add_noise(clean, torch.randn(clean.shape), t)
        noise = schedule.predicted_noise(network.denoise(noisy, t), noisy, torch.tensor(t))
        return ((noisy - schedule.sigma(t) * noise) / schedule.alpha(t) - clean).square().mean().item()

    errors = [error(t) for t in (50, 300, 600, 950)]
    assert errors == sorted(errors)
    assert errors[-1] > 5 * errors[0]


@pytest.mark.parametrize(("index", "t"), [(990, 35), (950, 141), (900, 254), (850, 349), (500, 751)])
def test_the_authors_indices_are_named_on_our_axis(index: int, t: int) -> None:
    """A-SelecT's timestep 50 is index 950 of 1000 steps with a shift of 3."""
    assert NoiseSchedule(type="flow_matching").timestep_from_sampler(index) == t


@pytest.mark.parametrize("steps", [2, 28, 1000])
@pytest.mark.parametrize(("shift", "mu"), [(1.0, None), (3.0, None), (3.0, 1.15), (3.0, 0.5)])
def test_every_step_is_that_of_the_sampler_of_diffusers(steps: int, shift: float, mu: float | None) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=mu is not None)
    if mu is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    schedule = NoiseSchedule(type="flow_matching")
    for index, t in enumerate(scheduler.timesteps.tolist()):
        found = schedule.timestep_from_sampler(index, steps, shift, mu)
        assert abs(found - min(t, 999)) <= 0.5 + 1e-3


@pytest.mark.parametrize("arguments", [(1000,), (-1,), (1, 1), (1, 10, 0.0)])
def test_a_step_that_a_sampler_does_not_have_is_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="index must be in"):
        NoiseSchedule(type="flow_matching").timestep_from_sampler(*arguments)
    with pytest.raises(ValueError, match="is for flow matching"):
        NoiseSchedule().timestep_from_sampler(3)
