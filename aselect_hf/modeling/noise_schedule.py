"""The one noise axis: `t` is the training index of the backbone's own process, 0 is clean, larger is noisier.

    x_t = alpha(t) * clean + sigma(t) * noise,      log_snr(t) = log(alpha(t)^2 / sigma(t)^2)

Two families. DDPM (Ho et al. 2020): `alpha^2 = alphas_cumprod[t]`, variance preserving. Flow matching (Lipman et al.
2023; SiT, SD3): `alpha = 1 - s`, `sigma = s`, `s = t / num_train_timesteps`. Whatever time the network itself was
trained with (SiT: a fraction of data, so reversed) is reached only through `model_time`.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch

Time = TypeVar("Time", bound="int | float | torch.Tensor")

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = {
    "ddpm": ("epsilon", "sample", "v_prediction"),
    "flow_matching": ("velocity", "epsilon", "sample"),
}
MODEL_TIMES = ("timestep", "data_fraction")


class NoiseSchedule:
    """`t -> alpha, sigma, log_snr`, the inverse, and the conversions between what a network predicts.

    Args:
        type: `"ddpm"` or `"flow_matching"`.
        num_train_timesteps: length of the training process; valid `t` are `0 .. num_train_timesteps - 1`.
        beta_schedule: DDPM only; `"linear"`, `"scaled_linear"` or `"squaredcos_cap_v2"` (cosine), as in diffusers.
        beta_start, beta_end: DDPM only; ends of the linear schedules.
        trained_betas: DDPM only; explicit betas, one per timestep, instead of a named schedule.
        prediction_type: what the network outputs. DDPM: `"epsilon"`, `"sample"`, `"v_prediction"` (Salimans & Ho
            2022: `alpha * noise - sigma * clean`). Flow: `"velocity"` (the derivative of `x` in the network's own
            time), `"epsilon"`, `"sample"`. Default: `"epsilon"` for DDPM, `"velocity"` for flow matching.
        model_time: what the network's timestep embedder receives: `"timestep"` (`t` itself) or `"data_fraction"`
            (`1 - t / num_train_timesteps`, SiT).

    Raises:
        ValueError: a field is unknown or contradicts another; the message names it and what is accepted.
    """

    def __init__(
        self,
        type: str = "ddpm",
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: list[float] | None = None,
        prediction_type: str | None = None,
        model_time: str = "timestep",
    ) -> None:
        if type not in PREDICTION_TYPES:
            raise ValueError(f"noise_schedule type must be one of {sorted(PREDICTION_TYPES)}, got {type!r}")
        if not isinstance(num_train_timesteps, int) or num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps must be an integer of at least 2, got {num_train_timesteps!r}")
        prediction_type = prediction_type or PREDICTION_TYPES[type][0]
        if prediction_type not in PREDICTION_TYPES[type]:
            accepted = ", ".join(PREDICTION_TYPES[type])
            raise ValueError(
                f"prediction_type for a {type} schedule must be one of {accepted}; got {prediction_type!r}"
            )
        if model_time not in MODEL_TIMES:
            raise ValueError(f"model_time must be one of {', '.join(MODEL_TIMES)}; got {model_time!r}")
        if type != "ddpm" and trained_betas is not None:
            raise ValueError(f"trained_betas are those of a ddpm schedule; this one is of type {type!r}")
        self.type = type
        self.num_train_timesteps = num_train_timesteps
        self.beta_schedule = beta_schedule
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.trained_betas = list(trained_betas) if trained_betas is not None else None
        self.prediction_type = prediction_type
        self.model_time_kind = model_time
        with torch.device("cpu"):  # `from_pretrained` builds models on the meta device, where no value can be read
            self._log_snr_table = self._ddpm_log_snr() if type == "ddpm" else None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> NoiseSchedule:
        """Build from `config.noise_schedule`; an unknown key is an error that names it."""
        accepted = set(cls().to_dict()) | {"trained_betas"}
        if unknown := sorted(set(fields) - accepted):
            raise ValueError(f"noise_schedule has unknown fields {unknown}; accepted are {sorted(accepted)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields that rebuild this schedule, ready for a config or a report."""
        fields: dict[str, Any] = {"type": self.type, "num_train_timesteps": self.num_train_timesteps}
        if self.type == "ddpm" and self.trained_betas is not None:
            fields["trained_betas"] = self.trained_betas
        elif self.type == "ddpm":
            fields |= {"beta_schedule": self.beta_schedule, "beta_start": self.beta_start, "beta_end": self.beta_end}
        return fields | {"prediction_type": self.prediction_type, "model_time": self.model_time_kind}

    def alpha(self, t: Time) -> Time:
        """Scale of the clean input at `t` (float in, float out; tensor in, tensor of the same shape out)."""
        return self._evaluate(self._alpha, t)

    def sigma(self, t: Time) -> Time:
        """Standard deviation of the noise at `t`."""
        return self._evaluate(self._sigma, t)

    def log_snr(self, t: Time) -> Time:
        """`log(alpha^2 / sigma^2)`: strictly decreasing in `t`, infinite where the input is exactly clean."""
        return self._evaluate(self._log_snr, t)

    def timestep_from_log_snr(self, log_snr: Time) -> Time:
        """The `t` (real-valued, clipped to the schedule's range) with this log-SNR; inverse of `log_snr`."""
        return self._evaluate(self._inverse_log_snr, log_snr, check=False)

    def model_time(self, t: torch.Tensor) -> torch.Tensor:
        """`t` in the units the network's timestep embedder was trained with."""
        if self.model_time_kind == "data_fraction":
            return 1.0 - t.double() / self.num_train_timesteps
        return t

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, t: int | float | torch.Tensor) -> torch.Tensor:
        """`alpha(t) * clean + sigma(t) * noise`; `t` is a number or one value per sample."""
        return self._expand(self.alpha(t), clean) * clean + self._expand(self.sigma(t), clean) * noise

    def training_target(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should output for `add_noise(clean, noise, t)`, by `prediction_type`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        if self.prediction_type == "v_prediction":
            return self._expand(self.alpha(t), clean) * noise - self._expand(self.sigma(t), clean) * clean
        return self._velocity_sign * (noise - clean)

    def predicted_noise(self, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The network's output as an estimate of the noise, whatever its `prediction_type`.

        For `"sample"` and `"velocity"` this divides by `sigma`, so `t` must not be exactly clean.
        """
        alpha, sigma = self._expand(self.alpha(t), noisy), self._expand(self.sigma(t), noisy)
        if self.prediction_type == "epsilon":
            return prediction
        if self.prediction_type == "sample":
            return (noisy - alpha * prediction) / sigma
        if self.prediction_type == "v_prediction":
            return alpha * prediction + sigma * noisy
        return noisy + alpha * self._velocity_sign * prediction

    def check_timestep(self, t: int | float, name: str = "timestep") -> int:
        """Return `t` as an int after checking it: an integer of this schedule's axis, not a fraction.

        Raises:
            ValueError: out of range, not a whole number, or a float in [0, 1] (another library's time convention).
        """
        last = self.num_train_timesteps - 1
        if isinstance(t, torch.Tensor) and t.numel() == 1:
            t = t.item()
        if isinstance(t, bool | torch.Tensor) or (not isinstance(t, int | float) and not hasattr(t, "__index__")):
            raise ValueError(f"{name} must be an integer in 0..{last}, got {t!r}")
        if isinstance(t, float) and 0.0 <= t <= 1.0:
            raise ValueError(
                f"{name}={t} is a float in [0, 1]; here a timestep is a training index in 0..{last} "
                f"(0 clean, {last} noise): did you mean {round(t * last)}?"
            )
        if not 0 <= t <= last or int(t) != t:
            raise ValueError(f"{name} must be an integer in 0..{last} (0 clean, {last} noise), got {t!r}")
        return int(t)

    @property
    def _velocity_sign(self) -> float:
        return -1.0 if self.model_time_kind == "data_fraction" else 1.0

    def _ddpm_log_snr(self) -> torch.Tensor:
        steps = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float64)
            if betas.shape != (steps,):
                raise ValueError(f"trained_betas must hold num_train_timesteps={steps} values, got {betas.numel()}")
        elif self.beta_schedule == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, steps, dtype=torch.float64)
        elif self.beta_schedule == "scaled_linear":
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, steps, dtype=torch.float64) ** 2
        elif self.beta_schedule == "squaredcos_cap_v2":
            time = torch.arange(steps + 1, dtype=torch.float64) / steps
            alpha_bar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}; got {self.beta_schedule!r}")
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"betas must lie strictly between 0 and 1; got {betas.min().item():g} to {betas.max().item():g}"
            )
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        return torch.log(alphas_cumprod) - torch.log1p(-alphas_cumprod)

    def _log_snr(self, t: torch.Tensor) -> torch.Tensor:
        if self._log_snr_table is None:
            s = t / self.num_train_timesteps
            return 2 * (torch.log1p(-s) - torch.log(s))
        table = self._log_snr_table.to(t.device)
        lower = t.floor().long().clamp(max=self.num_train_timesteps - 2)
        return torch.lerp(table[lower], table[lower + 1], t - lower)

    def _inverse_log_snr(self, log_snr: torch.Tensor) -> torch.Tensor:
        if self._log_snr_table is None:
            t = self.num_train_timesteps * torch.sigmoid(-log_snr / 2)
        else:
            table = self._log_snr_table.to(log_snr.device)
            upper = torch.searchsorted(-table, (-log_snr).contiguous()).clamp(1, self.num_train_timesteps - 1)
            t = (upper - 1) + (table[upper - 1] - log_snr) / (table[upper - 1] - table[upper])
        return t.clamp(0, self.num_train_timesteps - 1)

    def _alpha(self, t: torch.Tensor) -> torch.Tensor:
        if self._log_snr_table is None:
            return 1 - t / self.num_train_timesteps
        return torch.sigmoid(self._log_snr(t)).sqrt()

    def _sigma(self, t: torch.Tensor) -> torch.Tensor:
        if self._log_snr_table is None:
            return t / self.num_train_timesteps
        return torch.sigmoid(-self._log_snr(t)).sqrt()

    def _evaluate(self, function, t, check: bool = True):
        """Run `function` in float64; numbers come back as floats, tensors as float32 (float64 if they were)."""
        values = t if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu")
        compiling = torch.compiler.is_compiling()  # no value can be read then: numbers come back as tensors
        check = check and not compiling and values.device.type == "cpu"
        if check and values.numel() and not 0 <= values.min() <= values.max() <= self.num_train_timesteps - 1:
            raise ValueError(f"timestep must lie in 0..{self.num_train_timesteps - 1}, got {t}")
        result = function(values.double())
        if not isinstance(t, torch.Tensor):
            return result if compiling else result.item()
        return result if t.dtype == torch.float64 else result.float()

    @staticmethod
    def _expand(value, like: torch.Tensor):
        if isinstance(value, torch.Tensor) and value.ndim:
            return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
        return value
