"""Candidate timesteps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aselect_hf.modeling.noise_schedule import NoiseSchedule

NUM_TIMESTEPS = 20
NUM_GATE_TIMESTEPS = 16
NOISIEST = 0.95  # of the schedule
CLEANEST_LOG_SNR = 10.0


def default_timesteps(schedule: NoiseSchedule, num: int = NUM_TIMESTEPS) -> list[int]:
    """Candidates that are dense at low noise: quadratic from 0 to 0.95 of the schedule (ours)."""
    if num < 1:
        raise ValueError(f"the number of timesteps must be at least 1, got {num}")
    last = NOISIEST * (schedule.num_train_timesteps - 1)
    return sorted({round(last * (index / max(num - 1, 1)) ** 2) for index in range(num)})


def gate_timesteps(schedule: NoiseSchedule, num: int = NUM_GATE_TIMESTEPS) -> list[int]:
    """Candidates of the gate: `num` different ones, even in log-SNR from t = 0 to 0.95 of the schedule (ours).

    If t = 0 is cleaner than a log-SNR of 10 (flow matching: exactly clean), the others are spread from 10.
    """
    last = round(NOISIEST * (schedule.num_train_timesteps - 1))
    if not 1 <= num <= last + 1:
        raise ValueError(f"the number of timesteps must be in 1..{last + 1}, got {num}")
    spread = np.linspace(min(schedule.log_snr(0), CLEANEST_LOG_SNR), schedule.log_snr(last), num)
    steps = [0]
    for index, log_snr in enumerate(spread[1:].tolist(), start=1):
        highest = last - (num - 1 - index)  # leaves room for the rest
        steps.append(min(max(round(schedule.timestep_from_log_snr(log_snr)), steps[-1] + 1), highest))
    return steps


def candidate_timesteps(
    schedule: NoiseSchedule, timesteps: Sequence[int] | int | None, even_in_log_snr: bool = False
) -> list[int]:
    """The candidates, ascending: those given, or that many of the default ones.

    Raises:
        ValueError: `timesteps` is empty, or one of them is not on the schedule.
    """
    propose = gate_timesteps if even_in_log_snr else default_timesteps
    if timesteps is None:
        return propose(schedule)
    if isinstance(timesteps, int):
        return propose(schedule, timesteps)
    candidates = sorted({schedule.check_timestep(t, "timesteps") for t in timesteps})
    if not candidates:
        raise ValueError("timesteps must not be empty")
    return candidates


def read_integers(text: str, name: str) -> list[int]:
    """Integers from `"0,50,100"`.

    Raises:
        ValueError: the text is something else; the message calls it `name`.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be integers such as '0,50,100'; got {text!r}") from None


def read_candidates(text: str | None) -> list[int] | int | None:
    """Candidate timesteps from `"0,50,100"`, or how many of the default ones from `"10"`; `None` if absent."""
    if text is None:
        return None
    values = read_integers(text, "timesteps")
    return values[0] if len(values) == 1 else values
