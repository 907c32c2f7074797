"""PixArt and Sana at one timestep, prompt and noise draw: a plain network of one stream (ours).

The identities are those of `fixed_timestep.py`. The text does not change from block to block, so more is constant:

- The keys and values of every cross-attention are a table.
- Tokens that the mask leaves out go, and equal ones become one, as in `folded_joint.py`.
- Cross-attention to a single token, such as an empty prompt often is, gives that token's value whatever the query is,
  since the softmax of one score is 1. It is a constant, which the bias before it takes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .folded_blocks import (
    ATTENTION,
    EPS,
    KINDS,
    MLP,
    MLP_NORM,
    FoldedBlock,
    FoldedNetwork,
    RMSNorm,
    SelfAttention,
    feed_forward,
    kept_kinds,
    normalized,
)
from .folded_weights import (
    State,
    affine,
    after_norm,
    before_gate,
    distinct_tokens,
    exact,
    folded_patches,
    image_projections,
    in_place_of,
    query_norms,
    rms_normed,
)

SANA = {"mlp_ratio": 2.5, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "qk_norm": None}
"""Defaults of diffusers."""
QK_EPS = 1e-5
"""Of the norm of queries and keys, which is over all heads."""
SMALLEST = 1e-15
"""Added to the sum of the weights in linear attention."""
EXPECTED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "norm_elementwise_affine": (False,),
    "attention_type": ("default", None),
    "qk_norm": ("rms_norm_across_heads", None),
    "double_self_attention": (False,),
    "only_cross_attention": (False,),
}
"""Fields of a transformer's config, where it has them, and what can be folded."""


class LinearAttention(SelfAttention):
    """Of Sana: weights are products of rectified queries and keys, in float32 as in diffusers."""

    def forward(self, projected: dict[str, torch.Tensor]) -> torch.Tensor:
        query, key = normalized(self.norm_q, projected["query"]), normalized(self.norm_k, projected["key"])
        query, key, value = (self.split(x).float() for x in (F.relu(query), F.relu(key), projected["value"]))
        total = query @ key.sum(dim=2)[..., None]  # (batch, heads, tokens, 1)
        found = query @ (key.transpose(2, 3) @ value) / (total + SMALLEST)
        assert self.to_image_out is not None
        return self.to_image_out(found.transpose(1, 2).flatten(2).to(projected["query"].dtype))


class TextAttention(nn.Module):
    """Cross-attention to constant keys and values.

    Args:
        shape: of the transformer.
        tokens: number of text tokens.
    """

    def __init__(self, shape: Mapping[str, Any], tokens: int) -> None:
        super().__init__()
        self.key_value: Any
        self.heads, inner = shape["num_cross_attention_heads"], _cross_width(shape)
        width = shape["num_attention_heads"] * shape["attention_head_dim"]
        self.to_q = nn.Linear(width, inner)
        self.norm_q = RMSNorm(inner, QK_EPS) if shape["qk_norm"] else None
        self.register_buffer("key_value", torch.zeros(2, tokens, inner))
        self.to_image_out = nn.Linear(inner, width)

    def forward(self, image: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
        """Tokens like `image`; `scores` `(tokens,)` are added to those of the text."""
        query = self.split(normalized(self.norm_q, self.to_q(image)))
        key, value = (self.split(x.expand(image.shape[0], -1, -1)) for x in self.key_value)
        mask = None if scores is None else scores[None, None, None].to(query.dtype)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_image_out(found.transpose(1, 2).flatten(2))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ConvFeedForward(nn.Module):
    """The gated MLP of Sana, with a 3 x 3 convolution of every channel inside."""

    def __init__(self, width: int, hidden: int, grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.first = nn.Linear(width, 2 * hidden)
        self.conv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.last = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = F.silu(self.first(x)).transpose(1, 2).unflatten(2, self.grid_size)
        value, gate = self.conv(maps).flatten(2).transpose(1, 2).chunk(2, dim=-1)
        return self.last(value * F.silu(gate))


class FoldedCrossBlock(FoldedBlock):
    """A block of self-attention, cross-attention and MLP.

    Args:
        shape: of the transformer, see `cross_shape`.
        tokens: number of text tokens.
        grid_size: of the patches.
    """

    parts = FoldedBlock.parts | {"attn2": MLP_NORM}

    def __init__(self, shape: Mapping[str, Any], kinds: set[str], tokens: int, grid_size: tuple[int, int]) -> None:
        width = shape["num_attention_heads"] * shape["attention_head_dim"]
        super().__init__(width, kinds, shape["norm_eps"])
        attention = LinearAttention if shape["linear"] else SelfAttention
        norm_width = width if shape["qk_norm"] else None
        self.attn = attention(shape, self.projections, norm_width, QK_EPS) if self.projections else None
        goes_on = self.deepest > ATTENTION
        self.attn2 = TextAttention(shape, tokens) if goes_on and tokens > 1 else None
        apart = goes_on and tokens == 1 and "attention" in kinds
        self.constant = nn.Parameter(torch.zeros(width)) if apart else None
        self.ff = None
        if self.deepest >= MLP and shape["linear"]:
            self.ff = ConvFeedForward(width, int(shape["mlp_ratio"] * width), grid_size)
        elif self.deepest >= MLP:
            self.ff = feed_forward(width)

    def forward(self, image: torch.Tensor, scores: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Features by kind."""
        found, _ = self.start(image)
        if self.deepest < ATTENTION:
            return found
        found["attention"] = self.attn(found)
        if self.deepest == ATTENTION:
            return found
        image = self.add_attention(image, found)
        if self.attn2 is not None:
            image = image + self.attn2(image, scores)
        elif self.constant is not None:
            image = image + self.constant
        self.finish(image, found)
        return found


class FoldedCross(FoldedNetwork):
    """The whole folded network, from clean latents to features."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        shape, counts = cross_shape(config), config.merged_tokens or [1]
        self.blocks = nn.ModuleList(
            FoldedCrossBlock(shape, kinds, len(counts), config.grid_size) for kinds in kept_kinds(config)
        )
        merged = max(counts) > 1 and any(block.attn2 is not None for block in self.blocks)
        self.register_buffer("token_scores", torch.tensor(counts).log() if merged else None)

    def forward(self, latents: torch.Tensor, deepest: int) -> dict[tuple[int, str], torch.Tensor]:
        """Features `(draws * batch, tokens, width)` by block and kind, up to a block."""
        image = self.embed(latents)
        features: dict[tuple[int, str], torch.Tensor] = {}
        for index, block in enumerate(self.blocks[: deepest + 1]):
            found = block(image, self.token_scores)
            features |= {(index, kind): tokens for kind, tokens in found.items()}
            image = found.get("hidden", image)
        return features

    def unused_parts(self, deepest: int, kinds: list[str]) -> list[nn.Module]:
        """The parts that these kinds of the deepest block that is read, and all blocks before it, do not depend on."""
        block: Any = self.blocks[deepest]
        return [*self.blocks[deepest + 1 :], *block.parts_after(max(map(KINDS.index, kinds)))]


def cross_shape(config: Any) -> dict[str, Any]:
    """The fields of the transformer that are read here; `linear` is whether its attention is linear, as Sana's."""
    linear = config.family.fold == "linear_cross"
    pixart = {"num_cross_attention_heads": config.shape["num_attention_heads"], "qk_norm": None}
    pixart["cross_attention_head_dim"] = config.shape["attention_head_dim"]
    return {"norm_eps": EPS, "linear": linear} | (SANA if linear else pixart) | config.shape


def _cross_width(shape: Mapping[str, Any]) -> int:
    return shape["num_cross_attention_heads"] * shape["cross_attention_head_dim"]


# --------------------------------------------------------------------------------------------------------- the weights


def attended_tokens(model: Any) -> list[int]:
    """How many text tokens each distinct one that the mask keeps stands for.

    Raises:
        ValueError: the transformer has parts that cannot be folded.
    """
    found = dict(model.transformer.config)
    for name, accepted in EXPECTED.items():
        if found.get(name, accepted[0]) not in accepted:
            raise ValueError(
                f"the timestep of a {model.config.transformer_class} with {name}={found[name]!r} cannot be fixed: "
                f"{name} must be {' or '.join(map(repr, accepted))}"
            )
    return distinct_tokens(_attended(model))[1]


def _attended(model: Any) -> torch.Tensor:
    """The tokens that the mask keeps `(tokens, width)`; a mask of zeros keeps all alike."""
    mask = model.conditioning_prompt_attention_mask
    return model.conditioning_prompt_embeds[mask == mask.max()]


@torch.no_grad()
def folded_cross_state(model: Any, fixed: Any) -> State:
    """Everything in `fixed` but its VAE, computed in double precision.

    Args:
        model: the whole `ASelectDiffusionModel`; it is not changed.
        fixed: the folded one, still empty.
    """
    config, network, weight = fixed.config, model.transformer, model._weight
    timestep, linear = config.fixed_to["timestep"], config.family.fold == "linear_cross"
    latents = model.evaluation_noise[:1]
    arguments = model.inputs(latents, torch.tensor([timestep], device=weight.device))
    embedder = network.time_embed if linear else network.adaln_single
    modulation, _ = embedder(
        arguments["timestep"], arguments.get("added_cond_kwargs"), batch_size=1, hidden_dtype=weight.dtype
    )
    text = network.caption_projection(distinct_tokens(_attended(model).to(weight))[0])
    text = exact(network.caption_norm(text) if linear else text)  # (tokens, width)
    state = folded_patches(model, network.patch_embed if linear else network.pos_embed, timestep)
    if fixed.transformer.token_scores is not None:
        state["token_scores"] = torch.tensor(config.merged_tokens, dtype=torch.float64).log()
    for index, plain in enumerate(fixed.transformer.blocks):
        parts = _folded_block(network.transformer_blocks[index], modulation[0], plain, text)
        state |= {f"blocks.{index}.{name}": parts[name] for name in plain.state_dict()}
    return in_place_of(model, state)


def _folded_block(block: Any, modulation: torch.Tensor, plain: FoldedCrossBlock, text: torch.Tensor) -> State:
    table = exact(block.scale_shift_table)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table + exact(modulation).view_as(table)
    ones = torch.ones_like(gate)
    state = {"gate": gate, "mlp_gate": mlp_gate} | affine("attention_norm", scale, shift)
    state |= affine("mlp_norm", mlp_scale, mlp_shift) | image_projections(plain, block.attn1, scale, shift)
    attended = "attention" in plain.kinds
    state |= before_gate("attn.to_image_out", block.attn1.to_out[0], ones if attended else gate)
    if plain.attn2 is not None:
        state |= _text_attention(block.attn2, text)
    elif plain.deepest > ATTENTION:
        state["constant"] = F.linear(_value(block.attn2, text), *_exact_linear(block.attn2.to_out[0]))[0]
        if not attended:
            state["attn.to_image_out.bias"] = state["attn.to_image_out.bias"] + state["constant"]
    return state | _mlp(block.ff, mlp_scale, mlp_shift, ones if "mlp" in plain.kinds else mlp_gate)


def _text_attention(attention: Any, text: torch.Tensor) -> State:
    key = rms_normed(attention.norm_k, F.linear(text, *_exact_linear(attention.to_k)))
    state = {"attn2.key_value": torch.stack([key, _value(attention, text)])} | query_norms("attn2", attention)
    for name, linear in (("to_q", attention.to_q), ("to_image_out", attention.to_out[0])):
        weight, bias = _exact_linear(linear)
        state |= {f"attn2.{name}.weight": weight}
        state |= {f"attn2.{name}.bias": weight.new_zeros(len(weight)) if bias is None else bias}
    return state


def _value(attention: Any, text: torch.Tensor) -> torch.Tensor:
    return F.linear(text, *_exact_linear(attention.to_v))


def _exact_linear(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return exact(linear.weight), None if linear.bias is None else exact(linear.bias)


def _mlp(ff: Any, scale: torch.Tensor, shift: torch.Tensor, gate: torch.Tensor) -> State:
    if not hasattr(ff, "conv_inverted"):
        return after_norm("ff.0", [ff.net[0].proj], scale, shift) | before_gate("ff.2", ff.net[2], gate)
    weight = exact(ff.conv_inverted.weight).flatten(1)  # of a 1 x 1 convolution
    return {
        "ff.first.weight": weight * (1 + scale),
        "ff.first.bias": weight @ shift + exact(ff.conv_inverted.bias),
        "ff.conv.weight": exact(ff.conv_depth.weight),
        "ff.conv.bias": exact(ff.conv_depth.bias),
        "ff.last.weight": gate[:, None] * exact(ff.conv_point.weight).flatten(1),
    }


__all__ = ["FoldedCross", "attended_tokens", "folded_cross_state"]
