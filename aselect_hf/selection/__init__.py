"""Choosing the timestep: one interface, one registry of strategies."""

from aselect_hf.selection.result import SelectionCost, TimestepSelection
from aselect_hf.selection.select import (
    METHODS,
    NUM_GATE_TIMESTEPS,
    STRATEGIES,
    default_timesteps,
    gate_timesteps,
    select_timestep,
)

__all__ = [
    "METHODS",
    "NUM_GATE_TIMESTEPS",
    "STRATEGIES",
    "SelectionCost",
    "TimestepSelection",
    "default_timesteps",
    "gate_timesteps",
    "select_timestep",
]
