"""Parts that plain networks of one timestep share: self-attention, and the image's half of a block (ours).

See `folded_joint.py` and `folded_cross.py` for the networks, and `fixed_timestep.py` for the identities behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

EPS = 1e-6
"""Of every norm over the width of a token."""
PROJECTIONS = {"query": "to_q", "key": "to_k", "value": "to_v"}
KINDS = ("attention_norm", *PROJECTIONS, "attention", "mlp_norm", "mlp", "hidden")
"""Kinds of features in order of computation."""
ATTENTION, MLP_NORM, MLP = KINDS.index("attention"), KINDS.index("mlp_norm"), KINDS.index("mlp")


class RMSNorm(nn.Module):
    """Over the last dimension, with the mean square in float32, as in diffusers."""

    def __init__(self, width: int, eps: float = EPS) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.float().pow(2).mean(dim=-1, keepdim=True)
        return (x * torch.rsqrt(mean_square + self.eps)).to(x.dtype) * self.weight


class Affine(nn.Module):
    """Scale and shift of a norm whose output is kept as a feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.bias


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


def normalized(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)


class SelfAttention(nn.Module):
    """Attention of image tokens to themselves.

    Args:
        shape: `num_attention_heads` and `attention_head_dim`.
        projections: those to compute, of `PROJECTIONS`; without all three, only these are computed.
        norm_width: of the norm of queries and keys; `None` if they have none.
        norm_eps: of that norm.
    """

    def __init__(
        self, shape: Mapping[str, Any], projections: tuple[str, ...], norm_width: int | None, norm_eps: float = EPS
    ) -> None:
        super().__init__()
        self.heads, self.projections = shape["num_attention_heads"], projections
        width, attends = self.heads * shape["attention_head_dim"], len(projections) == len(PROJECTIONS)
        self.to_qkv = nn.Linear(width, len(projections) * width)
        self.norm_q, self.norm_k = (RMSNorm(norm_width, norm_eps) if norm_width and attends else None for _ in "qk")
        self.to_image_out = nn.Linear(width, width) if attends else None

    def project(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Queries, keys and values `(batch, tokens, width)`, those that are there."""
        return dict(zip(self.projections, self.to_qkv(x).chunk(len(self.projections), dim=-1), strict=True))

    def forward(self, projected: dict[str, torch.Tensor]) -> torch.Tensor:
        query, key, value = (self.split(projected[kind]) for kind in PROJECTIONS)
        query, key = normalized(self.norm_q, query), normalized(self.norm_k, key)
        assert self.to_image_out is not None
        return self.to_image_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, width)` to `(batch, heads, tokens, head width)`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FoldedBlock(GradientCheckpointingLayer):
    """The image's half of a block that computes `kinds` and nothing after them.

    A part that is not needed is `None`. Modulation is folded into the linear layers, except for a gate whose input is
    kept, which stays a vector. A norm whose output is kept has its scale and shift beside them. A subclass adds `attn`
    and `ff`.
    """

    attn: Any
    ff: Any
    parts: ClassVar[dict[str, int]] = {"attn": 1, "norm2": MLP_NORM, "ff": MLP}
    """Modules, and the index of the first of `KINDS` that depends on each."""

    def __init__(self, width: int, kinds: set[str], norm_eps: float = EPS) -> None:
        super().__init__()
        self.kinds, self.deepest = kinds, max(map(KINDS.index, kinds))
        self.projections = tuple(kind for kind in PROJECTIONS if kind in kinds or self.deepest >= ATTENTION)
        self.norm1 = nn.LayerNorm(width, norm_eps, elementwise_affine=False)
        self.attention_norm = Affine(width) if "attention_norm" in kinds else None
        self.gate = nn.Parameter(torch.ones(width)) if "attention" in kinds and self.deepest > ATTENTION else None
        self.norm2 = nn.LayerNorm(width, norm_eps, elementwise_affine=False) if self.deepest >= MLP_NORM else None
        self.mlp_norm = Affine(width) if "mlp_norm" in kinds else None
        self.mlp_gate = nn.Parameter(torch.ones(width)) if "mlp" in kinds and self.deepest > MLP else None

    def start(self, image: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The features before the attention by kind, and the normalized image."""
        found: dict[str, torch.Tensor] = {}
        normed = self.norm1(image)
        if self.attention_norm is not None:
            found["attention_norm"] = self.attention_norm(normed)
        return found if self.attn is None else found | self.attn.project(normed), normed

    def add_attention(self, image: torch.Tensor, found: dict[str, torch.Tensor]) -> torch.Tensor:
        return image + (found["attention"] if self.gate is None else self.gate * found["attention"])

    def finish(self, image: torch.Tensor, found: dict[str, torch.Tensor]) -> None:
        """Add the features of the second half of the block to `found`."""
        if self.norm2 is None:
            return
        normed = self.norm2(image)
        if self.mlp_norm is not None:
            found["mlp_norm"] = self.mlp_norm(normed)
        if self.ff is None:
            return
        found["mlp"] = self.ff(normed)
        found["hidden"] = image + (found["mlp"] if self.mlp_gate is None else self.mlp_gate * found["mlp"])

    def parts_after(self, reached: int) -> list[nn.Module]:
        """The modules that the kind of this index does not depend on."""
        unused = [getattr(self, part) for part, first in self.parts.items() if reached < first]
        if reached < ATTENTION and self.attn is not None:
            unused += [part for name, part in self.attn.named_children() if name != "to_qkv"]
        return [part for part in unused if part is not None]


class FoldedNetwork(nn.Module):
    """What all folded networks start with: patches of clean latents, and positions with the noise in them.

    Args:
        config: an `ASelectDiffusionConfig` with `fixed_to`.
    """

    blocks: nn.ModuleList

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(config.num_noise_draws, config.num_patches, width))

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)` to `(draws * batch, tokens, width)`."""
        patches = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        return (patches[None] + self.position_embedding[:, None]).flatten(0, 1)


def kept_kinds(config: Any) -> list[set[str]]:
    """What each block of a folded network computes: the kept features, and its output if another block follows."""
    names = [config.resolve_feature(name) for name in config.list_features()]
    last = config.num_kept_layers - 1
    kinds = [{name.kind for name in names if name.block == block} for block in range(last + 1)]
    return [wanted | ({"hidden"} if block < last else set()) for block, wanted in enumerate(kinds)]


__all__ = ["FoldedBlock", "FoldedNetwork", "SelfAttention", "kept_kinds"]
