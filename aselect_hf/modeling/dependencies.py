"""The parts of a DiT that a feature depends on; the others can be frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .features import FEATURE_KINDS

_ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
_PARTS = {
    "attention_norm": (),
    "query": _ATTENTION[:1],
    "key": _ATTENTION[1:2],
    "value": _ATTENTION[2:3],
    "attention": _ATTENTION,
    "attention_gated": _ATTENTION,
    "mlp_norm": _ATTENTION,
    "mlp": (*_ATTENTION, "mlp"),
    "mlp_gated": (*_ATTENTION, "mlp"),
    "hidden": (*_ATTENTION, "mlp"),
}
"""Parts of a block that each kind of feature depends on, besides its modulation."""


def unused_parts(dit: Any, features: Sequence[str]) -> list[nn.Module]:
    """The parts of an `ASelectDiTModel` that none of `features` depends on."""
    names = [dit.config.resolve_feature(name) for name in features]
    deepest = max(name.block for name in names)
    kinds = [name.kind for name in names if name.block == deepest]
    unused = [*dit.layers[deepest + 1 :]]
    if dit.config.fixed_timestep:
        return unused + dit.layers[deepest].parts_after(max(kinds, key=FEATURE_KINDS.index))
    unused.append(dit.final_layer)
    unused += dit.condition_embeddings[deepest + 1 :]  # one embedding, or one per block
    used = {part for kind in kinds for part in _PARTS[kind]}
    return unused + [dit.layers[deepest].get_submodule(part) for part in _PARTS["hidden"] if part not in used]
