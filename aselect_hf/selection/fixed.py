"""A fixed timestep: the baseline of everyone who guesses."""

from __future__ import annotations

from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import SelectionCost, TimestepSelection


def select(inputs: SelectionInputs, *, timestep: int | None = None) -> TimestepSelection:
    """Take `timestep`; default a tenth of the schedule, about where DDAE found DiT-XL/2's optimum (t = 81 to 121)."""
    schedule = inputs.model.noise_schedule
    chosen = schedule.num_train_timesteps // 10 if timestep is None else schedule.check_timestep(timestep)
    return TimestepSelection(
        method="fixed",
        feature=inputs.feature,
        timestep=chosen,
        timesteps=[chosen],
        scores=[],
        standard_errors=[],
        cost=SelectionCost(forward_passes=0, seconds=0.0, flops=0.0),
        schedule=schedule.to_dict(),
        score_name="none",
        options={"timestep": chosen},
        seed=inputs.seed,
    )
