"""How the timestep of a family is fixed, by the name in `Family.fold`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .folded_cross import FoldedCross, FoldedCrossBlock, attended_tokens, folded_cross_state
from .folded_joint import FoldedJoint, FoldedJointBlock, folded_joint_state, merged_tokens
from .folded_weights import State


class Fold(NamedTuple):
    """A network of one timestep.

    Args:
        network: its class, made from a config with `fixed_to`.
        block: the class of its blocks.
        tokens: a whole model to how many text tokens each remaining one stands for; refuses what cannot be folded.
        state: a whole model and the empty folded one to the weights of the latter, except its VAE.
    """

    network: type[Any]
    block: type[Any]
    tokens: Callable[[Any], list[int]]
    state: Callable[[Any, Any], State]


CROSS = Fold(FoldedCross, FoldedCrossBlock, attended_tokens, folded_cross_state)
FOLDS = {
    "joint": Fold(FoldedJoint, FoldedJointBlock, merged_tokens, folded_joint_state),
    "cross": CROSS,
    "linear_cross": CROSS,
}

__all__ = ["FOLDS", "Fold"]
