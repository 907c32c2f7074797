"""Weights of plain networks of one timestep, computed in double precision (ours).

The identities are in `fixed_timestep.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .folded_blocks import PROJECTIONS, FoldedBlock

State = dict[str, torch.Tensor]


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision on the CPU, since not every accelerator has it."""
    return tensor.detach().cpu().double()


def after_norm(name: str, linears: Sequence[nn.Linear], scale: torch.Tensor, shift: torch.Tensor) -> State:
    """One linear layer in place of a scale, a shift and these layers side by side."""
    weights = [exact(linear.weight) for linear in linears]
    biases = [
        weight @ shift + (0 if linear.bias is None else exact(linear.bias))
        for weight, linear in zip(weights, linears, strict=True)
    ]
    return {f"{name}.weight": torch.cat(weights) * (1 + scale), f"{name}.bias": torch.cat(biases)}


def before_gate(name: str, linear: nn.Linear, gate: torch.Tensor) -> State:
    """One linear layer in place of a layer and a gate after it."""
    return {f"{name}.weight": gate[:, None] * exact(linear.weight), f"{name}.bias": gate * exact(linear.bias)}


def affine(name: str, scale: torch.Tensor, shift: torch.Tensor) -> State:
    return {f"{name}.weight": 1 + scale, f"{name}.bias": shift}


def image_projections(plain: FoldedBlock, attention: Any, scale: torch.Tensor, shift: torch.Tensor) -> State:
    """The queries, keys and values of the image that a block computes, and what normalizes them."""
    if plain.attn is None:
        return {}
    linears = [getattr(attention, PROJECTIONS[kind]) for kind in plain.projections]
    return after_norm("attn.to_qkv", linears, scale, shift) | query_norms("attn", attention)


def query_norms(name: str, attention: Any) -> State:
    """The norms of queries and keys that an attention of diffusers has."""
    norms = {part: getattr(attention, part, None) for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    return {f"{name}.{part}.weight": exact(norm.weight) for part, norm in norms.items() if norm is not None}


def rms_normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """`x` through a norm of diffusers over its last dimension."""
    if norm is None:
        return x
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + norm.eps) * exact(norm.weight)


def distinct_tokens(prompt: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The distinct rows of a prompt `(tokens, width)` in the order of their first appearance, and how often each is."""
    _, group, counts = prompt.unique(dim=0, return_inverse=True, return_counts=True)
    first = [int((group == index).nonzero()[0]) for index in range(len(counts))]
    order = sorted(range(len(counts)), key=first.__getitem__)
    return prompt[[first[index] for index in order]], counts[order].tolist()


def folded_patches(model: Any, embedding: nn.Module, timestep: int) -> State:
    """Patches of clean latents, and positions with the noise of the timestep in them.

    Args:
        embedding: the `PatchEmbed` of diffusers, which adds the positions.
    """
    alpha, sigma = model.noise_schedule.alpha(timestep), model.noise_schedule.sigma(timestep)
    weights = {name: exact(weight) for name, weight in embedding.named_parameters()}
    tables = {name: table.cpu() for name, table in embedding.named_buffers()}
    noise = torch.func.functional_call(embedding, weights | tables, sigma * exact(model.evaluation_noise))
    return {"patch_embedding.weight": alpha * weights["proj.weight"], "position_embedding": noise}


def in_place_of(model: Any, state: State) -> State:
    """The state of a folded network as that of the whole model, in its precision and on its device."""
    return {f"transformer.{name}": tensor.to(model._weight).contiguous() for name, tensor in state.items()}


__all__ = ["State", "after_norm", "before_gate", "distinct_tokens", "exact", "folded_patches"]
