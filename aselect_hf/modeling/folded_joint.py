"""Stable Diffusion 3 at one timestep, prompt and noise draw: a plain network of two streams (ours).

The identities are those of `fixed_timestep.py`, for both streams. Three more come from the text:

- The text of the first block is constant, so its queries, keys and values are a table.
- The text of a block is needed only if a later block attends to it.
- Text tokens have no positions, so equal tokens stay equal. `n` of them act as one whose score has `log(n)` added:

      n exp(s) = exp(s + log n)
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
    PROJECTIONS,
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

SHIFTS = ("shift", "scale", "gate", "mlp_shift", "mlp_scale", "mlp_gate", "shift2", "scale2", "gate2")
"""Parts of what modulates a block; the last three are of a second attention (SD3.5)."""


class JointAttention(SelfAttention):
    """Attention of image tokens to themselves and to text tokens.

    Args:
        text: `"table"` or `"stream"`, or `None` if the block ends before its attention.
        text_queries: whether the text attends, too.
        tokens: number of text tokens.
    """

    def __init__(
        self, shape: Mapping[str, Any], projections: tuple[str, ...], text: str | None, text_queries: bool, tokens: int
    ) -> None:
        super().__init__(shape, projections, _norm_width(shape))
        self.table: Any
        width, head_width = self.heads * shape["attention_head_dim"], _norm_width(shape)
        self.text_queries = text_queries
        self.to_add_out = nn.Linear(width, width) if text_queries else None
        parts, stream = 3 if text_queries else 2, text == "stream"
        self.add_qkv = nn.Linear(width, parts * width) if stream else None
        self.register_buffer("table", torch.zeros(parts, tokens, width) if text == "table" else None)
        self.norm_added_k = RMSNorm(head_width) if head_width and stream else None
        self.norm_added_q = RMSNorm(head_width) if head_width and stream and text_queries else None

    def attend(
        self, projected: dict[str, torch.Tensor], context: torch.Tensor | None, scores: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output for the image and, if it is needed, for the text.

        Args:
            context: normalized text `(batch, tokens, width)` of a stream.
            scores: what is added to the scores of the text tokens, `(tokens,)`.
        """
        query, key, value = (self.split(projected[kind]) for kind in PROJECTIONS)
        query, key = normalized(self.norm_q, query), normalized(self.norm_k, key)
        image_tokens, mask = query.shape[2], None
        *added_query, added_key, added_value = self.added(context, query.shape[0])
        key, value = torch.cat([key, added_key], dim=2), torch.cat([value, added_value], dim=2)
        query = torch.cat([query, *added_query], dim=2)
        if scores is not None:
            mask = torch.cat([scores.new_zeros(image_tokens), scores])[None, None, None].to(query.dtype)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        assert self.to_image_out is not None
        text = None if self.to_add_out is None else self.to_add_out(found[:, image_tokens:])
        return self.to_image_out(found[:, :image_tokens]), text

    def added(self, context: torch.Tensor | None, batch: int) -> list[torch.Tensor]:
        """(Queries,) keys and values of the text, `(batch, heads, tokens, head width)`."""
        if self.table is not None:
            return [self.split(part.expand(batch, -1, -1)) for part in self.table]
        assert self.add_qkv is not None
        *query, key, value = (self.split(x) for x in self.add_qkv(context).chunk(3 if self.text_queries else 2, dim=-1))
        return [*(normalized(self.norm_added_q, x) for x in query), normalized(self.norm_added_k, key), value]


def _norm_width(shape: Mapping[str, Any]) -> int | None:
    """Queries and keys are normalized per head, or not at all."""
    return None if shape["qk_norm"] is None else shape["attention_head_dim"]


class FoldedJointBlock(FoldedBlock):
    """A block of two streams.

    Args:
        text: `"table"` in the first block, `"stream"` in later ones, `None` if the block does not attend.
        updates_text: whether a later block attends to the text.
        dual: whether the image has a second attention to itself (SD3.5).
        tokens: number of text tokens.
    """

    parts = FoldedBlock.parts | {"attn2": MLP_NORM, "norm1_context": ATTENTION}

    def __init__(
        self, shape: Mapping[str, Any], kinds: set[str], text: str | None, updates_text: bool, dual: bool, tokens: int
    ) -> None:
        width = shape["num_attention_heads"] * shape["attention_head_dim"]
        super().__init__(width, kinds)
        self.text: Any
        dual, self.updates_text = dual and self.deepest > ATTENTION, updates_text
        self.attn = JointAttention(shape, self.projections, text, updates_text, tokens) if self.projections else None
        self.attn2 = SelfAttention(shape, tuple(PROJECTIONS), _norm_width(shape)) if dual else None
        self.ff = feed_forward(width) if self.deepest >= MLP else None
        self.norm1_context = nn.LayerNorm(width, EPS, elementwise_affine=False) if text == "stream" else None
        self.register_buffer("text", torch.zeros(tokens, width) if text == "table" and updates_text else None)
        self.norm2_context = nn.LayerNorm(width, EPS, elementwise_affine=False) if updates_text else None
        self.ff_context = feed_forward(width) if updates_text else None

    def forward(
        self, image: torch.Tensor, text: torch.Tensor | None, scores: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Features by kind, and the text after the block."""
        found, normed = self.start(image)
        if self.deepest < ATTENTION:
            return found, None
        context = None if self.norm1_context is None else self.norm1_context(text)
        found["attention"], text_attention = self.attn.attend(found, context, scores)
        if self.deepest == ATTENTION:
            return found, None
        image = self.add_attention(image, found)
        if self.attn2 is not None:
            image = image + self.attn2(self.attn2.project(normed))
        self.finish(image, found)
        return found, self.next_text(text, text_attention)

    def next_text(self, text: torch.Tensor | None, attention: torch.Tensor | None) -> torch.Tensor | None:
        """The text after the block, if a later one attends to it."""
        if self.norm2_context is None or self.ff_context is None:
            return None
        assert attention is not None
        text = (self.text if text is None else text) + attention
        return text + self.ff_context(self.norm2_context(text))


class FoldedJoint(FoldedNetwork):
    """The whole folded network, from clean latents to features."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        shape, kinds, counts = config.shape, kept_kinds(config), config.merged_tokens or [1]
        attends = [max(map(KINDS.index, wanted)) >= ATTENTION for wanted in kinds]
        merged = max(counts) > 1 and any(attends)
        self.register_buffer("token_scores", torch.tensor(counts).log() if merged else None)
        self.blocks = nn.ModuleList(
            FoldedJointBlock(
                shape,
                wanted,
                text=("stream" if block else "table") if attends[block] else None,
                updates_text=block < len(kinds) - 1 and attends[block + 1],
                dual=block in shape["dual_attention_layers"],
                tokens=len(counts),
            )
            for block, wanted in enumerate(kinds)
        )

    def forward(self, latents: torch.Tensor, deepest: int) -> dict[tuple[int, str], torch.Tensor]:
        """Features `(draws * batch, tokens, width)` by block and kind, up to a block."""
        image, text = self.embed(latents), None
        features: dict[tuple[int, str], torch.Tensor] = {}
        for index, block in enumerate(self.blocks[: deepest + 1]):
            found, text = block(image, text, self.token_scores)
            features |= {(index, kind): tokens for kind, tokens in found.items()}
            image = found.get("hidden", image)
        return features

    def unused_parts(self, deepest: int, kinds: list[str]) -> list[nn.Module]:
        """The parts that these kinds of the deepest block that is read, and all blocks before it, do not depend on."""
        reached = max(map(KINDS.index, kinds))
        block: Any = self.blocks[deepest]
        unused: list[Any] = [*self.blocks[deepest + 1 :], *block.parts_after(reached)]
        last = deepest if reached >= ATTENTION else deepest - 1  # that attends to the text
        each: Any
        for each in self.blocks[max(0, last) : deepest + 1]:
            unused += [each.norm2_context, each.ff_context]
            unused += [] if each.attn is None else [each.attn.to_add_out, each.attn.norm_added_q]
        return [part for part in unused if part is not None]


# --------------------------------------------------------------------------------------------------------- the weights


def merged_tokens(model: Any) -> list[int]:
    """How many text tokens each distinct one stands for."""
    return distinct_tokens(model.conditioning_prompt_embeds)[1]


def folded_joint_state(model: Any, fixed: Any) -> State:
    """Everything in `fixed` but its VAE, computed in double precision.

    Args:
        model: the whole `ASelectDiffusionModel`; it is not changed.
        fixed: the folded one, still empty.
    """
    config, network, weight = fixed.config, model.transformer, model._weight
    timestep = config.fixed_to["timestep"]
    prompt = model.conditioning_prompt_embeds[None].to(weight)
    pooled = model.conditioning_pooled_prompt_embeds[None].to(weight)
    time = model.noise_schedule.model_time(torch.tensor([timestep], device=weight.device)).float()
    embedding = F.silu(network.time_text_embed(time, pooled))  # modulates every block
    text = exact(network.context_embedder(distinct_tokens(prompt[0])[0]))  # (tokens, width)
    state = folded_patches(model, network.pos_embed, timestep)
    if fixed.transformer.token_scores is not None:
        state["token_scores"] = torch.tensor(config.merged_tokens, dtype=torch.float64).log()
    for index, plain in enumerate(fixed.transformer.blocks):
        parts = _folded_block(network.transformer_blocks[index], embedding, plain, text)
        state |= {f"blocks.{index}.{name}": parts[name] for name in plain.state_dict()}
    return in_place_of(model, state)


def _folded_block(block: Any, embedding: torch.Tensor, plain: FoldedJointBlock, text: torch.Tensor) -> State:
    image = _modulation(block.norm1, embedding)
    context = _modulation(block.norm1_context, embedding)
    ones = torch.ones_like(image["shift"])
    state: State = {"gate": image["gate"], "mlp_gate": image["mlp_gate"], "text": text}
    state |= affine("attention_norm", image["scale"], image["shift"])
    state |= affine("mlp_norm", image["mlp_scale"], image["mlp_shift"])
    if plain.attn is not None:
        state |= image_projections(plain, block.attn, image["scale"], image["shift"])
        state |= before_gate(
            "attn.to_image_out", block.attn.to_out[0], ones if "attention" in plain.kinds else image["gate"]
        )
        state |= _text_parts(block, plain, context, text)
    if plain.attn2 is not None:
        linears = [getattr(block.attn2, name) for name in PROJECTIONS.values()]
        state |= after_norm("attn2.to_qkv", linears, image["scale2"], image["shift2"])
        state |= before_gate("attn2.to_image_out", block.attn2.to_out[0], image["gate2"])
        state |= query_norms("attn2", block.attn2)
    state |= after_norm("ff.0", [block.ff.net[0].proj], image["mlp_scale"], image["mlp_shift"])
    return state | before_gate("ff.2", block.ff.net[2], ones if "mlp" in plain.kinds else image["mlp_gate"])


def _text_parts(block: Any, plain: FoldedJointBlock, context: State, text: torch.Tensor) -> State:
    """The weights of the text in a block, or the table that they make of the first block's text."""
    names, norms = ["add_k_proj", "add_v_proj"], ["norm_added_k", ""]
    if plain.updates_text:
        names, norms = ["add_q_proj", *names], ["norm_added_q", *norms]
    linears = [getattr(block.attn, name) for name in names]
    state = after_norm("attn.add_qkv", linears, context["scale"], context["shift"])
    if plain.attn.table is not None:
        normed = F.layer_norm(text, text.shape[-1:], eps=EPS)
        added = F.linear(normed, state["attn.add_qkv.weight"], state["attn.add_qkv.bias"]).chunk(len(linears), dim=-1)
        heads = [x.unflatten(-1, (plain.attn.heads, -1)) for x in added]  # each (tokens, heads, head width)
        found = [getattr(block.attn, norm, None) for norm in norms]
        rows = [rms_normed(norm, x).flatten(-2) for norm, x in zip(found, heads, strict=True)]
        state["attn.table"] = torch.stack(rows)
    if plain.updates_text:
        state |= before_gate("attn.to_add_out", block.attn.to_add_out, context["gate"])
        state |= after_norm("ff_context.0", [block.ff_context.net[0].proj], context["mlp_scale"], context["mlp_shift"])
        state |= before_gate("ff_context.2", block.ff_context.net[2], context["mlp_gate"])
    return state


def _modulation(norm: Any, embedding: torch.Tensor) -> State:
    """Shifts, scales and gates of a block, each `(width,)`. The last block's text has a scale, then a shift, only."""
    values = exact(norm.linear(embedding)[0])
    width = norm.linear.in_features
    names = SHIFTS if len(values) > 2 * width else ("scale", "shift")
    return dict(zip(names, values.split(width), strict=False))


__all__ = ["FoldedJoint", "folded_joint_state", "merged_tokens"]
