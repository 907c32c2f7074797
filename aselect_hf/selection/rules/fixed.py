"""A fixed timestep: the baseline of a guess."""

from __future__ import annotations

from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.result import SelectionCost, TimestepSelection
from aselect_hf.selection.rule import rule


@rule("fixed", labels="none", explanation="Takes the timestep that is given.", num_images=64, runs=0, audited=False)
def select_fixed(inputs: SelectionInputs, *, timestep: int | None = None) -> TimestepSelection:
    """Take a given timestep. The default is near the optimum that DDAE found for DiT-XL/2 (t = 81 to 121).

    Args:
        timestep: The timestep (default: a tenth of the schedule).
    """
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
