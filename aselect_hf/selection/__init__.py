"""Choosing the timestep: one interface, one registry of rules."""

from aselect_hf.selection.candidates import NUM_GATE_TIMESTEPS, default_timesteps, gate_timesteps
from aselect_hf.selection.result import SelectionCost, TimestepSelection
from aselect_hf.selection.rule import AUTO
from aselect_hf.selection.rules import RULES
from aselect_hf.selection.select import select_timestep

__all__ = [
    "AUTO",
    "NUM_GATE_TIMESTEPS",
    "RULES",
    "SelectionCost",
    "TimestepSelection",
    "default_timesteps",
    "gate_timesteps",
    "select_timestep",
]
