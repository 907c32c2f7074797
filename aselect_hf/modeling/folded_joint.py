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
from transformers.modeling_layers import GradientCheckpointingLayer

State = dict[str, torch.Tensor]

EPS = 1e-6
"""Of every norm of the network."""
PROJECTIONS = {"query": "to_q", "key": "to_k", "value": "to_v"}
KINDS = ("attention_norm", *PROJECTIONS, "attention", "mlp_norm", "mlp", "hidden")
"""Kinds of features in order of computation."""
ATTENTION, MLP_NORM, MLP = KINDS.index("attention"), KINDS.index("mlp_norm"), KINDS.index("mlp")
SHIFTS = ("shift", "scale", "gate", "mlp_shift", "mlp_scale", "mlp_gate", "shift2", "scale2", "gate2")
"""Parts of what modulates a block; the last three are of a second attention (SD3.5)."""


class RMSNorm(nn.Module):
    """Over the channels of a head, with the mean square in float32, as in diffusers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.float().pow(2).mean(dim=-1, keepdim=True)
        return (x * torch.rsqrt(mean_square + EPS)).to(x.dtype) * self.weight


class Affine(nn.Module):
    """Scale and shift of a norm whose output is kept as a feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.bias


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


class FoldedAttention(nn.Module):
    """Attention of image tokens to themselves and, with `text`, to text tokens.

    Args:
        projections: those to compute, of `PROJECTIONS`; without all three, only these are computed.
        norm: whether queries and keys are normalized per head.
        text: `"table"`, `"stream"` or `None`, if there are no text tokens or they are not needed.
        text_queries: whether the text attends, too.
    """

    def __init__(
        self, shape: Mapping[str, Any], projections: tuple[str, ...], text: str | None, text_queries: bool, tokens: int
    ) -> None:
        super().__init__()
        self.heads, head_width = shape["num_attention_heads"], shape["attention_head_dim"]
        width, norm = self.heads * head_width, shape["qk_norm"] is not None
        self.projections, self.text, self.text_queries = projections, text, text_queries
        self.to_qkv = nn.Linear(width, len(projections) * width)
        self.norm_q, self.norm_k = (RMSNorm(head_width) if norm and len(projections) == 3 else None for _ in "qk")
        self.to_image_out = nn.Linear(width, width) if len(projections) == 3 else None
        self.to_add_out = nn.Linear(width, width) if text_queries else None
        parts = 3 if text_queries else 2
        self.add_qkv = nn.Linear(width, parts * width) if text == "stream" else None
        self.register_buffer("table", torch.zeros(parts, tokens, width) if text == "table" else None)
        self.norm_added_k = RMSNorm(head_width) if norm and text == "stream" else None
        self.norm_added_q = RMSNorm(head_width) if norm and text == "stream" and text_queries else None

    def project(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Queries, keys and values `(batch, tokens, width)`, those that are there."""
        return dict(zip(self.projections, self.to_qkv(x).chunk(len(self.projections), dim=-1), strict=True))

    def forward(
        self, projected: dict[str, torch.Tensor], context: torch.Tensor | None, scores: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output for the image and, if it is needed, for the text.

        Args:
            context: normalized text `(batch, tokens, width)` of a stream.
            scores: what is added to the scores of the text tokens, `(tokens,)`.
        """
        query, key, value = (self.split(projected[kind]) for kind in PROJECTIONS)
        query, key = _normalized(self.norm_q, query), _normalized(self.norm_k, key)
        image_tokens, mask = query.shape[2], None
        if self.text is not None:
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
        return [*(_normalized(self.norm_added_q, x) for x in query), _normalized(self.norm_added_k, key), value]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _normalized(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)


class FoldedJointBlock(GradientCheckpointingLayer):
    """A block that computes `kinds` and nothing after them.

    Args:
        text: `"table"` in the first block, `"stream"` in later ones, `None` if the block does not attend.
        updates_text: whether a later block attends to the text.
        dual: whether the image has a second attention to itself (SD3.5).
        tokens: number of text tokens.
    """

    def __init__(
        self, shape: Mapping[str, Any], kinds: set[str], text: str | None, updates_text: bool, dual: bool, tokens: int
    ) -> None:
        super().__init__()
        width = shape["num_attention_heads"] * shape["attention_head_dim"]
        deepest = max(map(KINDS.index, kinds))
        self.kinds, self.deepest, self.updates_text = kinds, deepest, updates_text
        projections = tuple(kind for kind in PROJECTIONS if kind in kinds or deepest >= ATTENTION)
        dual = dual and deepest > ATTENTION
        self.norm1 = nn.LayerNorm(width, EPS, elementwise_affine=False)
        self.attention_norm = Affine(width) if "attention_norm" in kinds else None
        self.attn = FoldedAttention(shape, projections, text, updates_text, tokens) if projections else None
        self.gate = nn.Parameter(torch.ones(width)) if "attention" in kinds and deepest > ATTENTION else None
        self.attn2 = FoldedAttention(shape, tuple(PROJECTIONS), None, False, 0) if dual else None
        self.norm2 = nn.LayerNorm(width, EPS, elementwise_affine=False) if deepest >= MLP_NORM else None
        self.mlp_norm = Affine(width) if "mlp_norm" in kinds else None
        self.ff = feed_forward(width) if deepest >= MLP else None
        self.mlp_gate = nn.Parameter(torch.ones(width)) if "mlp" in kinds and deepest > MLP else None
        norms_text = text == "stream"
        self.norm1_context = nn.LayerNorm(width, EPS, elementwise_affine=False) if norms_text else None
        self.register_buffer("text", torch.zeros(tokens, width) if text == "table" and updates_text else None)
        self.norm2_context = nn.LayerNorm(width, EPS, elementwise_affine=False) if updates_text else None
        self.ff_context = feed_forward(width) if updates_text else None

    def forward(
        self, image: torch.Tensor, text: torch.Tensor | None, scores: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Features by kind, and the text after the block."""
        found: dict[str, torch.Tensor] = {}
        normed = self.norm1(image)
        if self.attention_norm is not None:
            found["attention_norm"] = self.attention_norm(normed)
        if self.attn is None:
            return found, None
        found |= self.attn.project(normed)
        if self.deepest < ATTENTION:
            return found, None
        context = None if self.norm1_context is None else self.norm1_context(text)
        attention, text_attention = self.attn(found, context, scores)
        found["attention"] = attention
        if self.deepest == ATTENTION:
            return found, None
        image = image + (attention if self.gate is None else self.gate * attention)
        if self.attn2 is not None:
            image = image + self.attn2(self.attn2.project(normed), None, None)[0]
        if self.norm2 is not None:
            image = self.feed_forward(image, found)
        return found, self.next_text(text, text_attention)

    def feed_forward(self, image: torch.Tensor, found: dict[str, torch.Tensor]) -> torch.Tensor:
        """The second half of the block, for the image."""
        assert self.norm2 is not None
        normed = self.norm2(image)
        if self.mlp_norm is not None:
            found["mlp_norm"] = self.mlp_norm(normed)
        if self.ff is None:
            return image
        found["mlp"] = self.ff(normed)
        found["hidden"] = image + (found["mlp"] if self.mlp_gate is None else self.mlp_gate * found["mlp"])
        return found["hidden"]

    def next_text(self, text: torch.Tensor | None, attention: torch.Tensor | None) -> torch.Tensor | None:
        """The text after the block, if a later one attends to it."""
        if self.norm2_context is None or self.ff_context is None:
            return None
        text = (self.text if text is None else text) + attention
        return text + self.ff_context(self.norm2_context(text))


class FoldedJoint(nn.Module):
    """The whole folded network, from clean latents to features.

    Args:
        config: an `ASelectDiffusionConfig` with `fixed_to`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        shape, width = config.shape, config.hidden_size
        patch, last = config.patch_size, config.num_kept_layers - 1
        names = [config.resolve_feature(name) for name in config.list_features()]
        kinds = [{name.kind for name in names if name.block == block} for block in range(last + 1)]
        kinds = [wanted | ({"hidden"} if block < last else set()) for block, wanted in enumerate(kinds)]
        attends = [max(map(KINDS.index, wanted)) >= ATTENTION for wanted in kinds]
        counts = config.merged_tokens or [1]
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(config.num_noise_draws, config.num_patches, width))
        merged = max(counts) > 1 and any(attends)
        self.register_buffer("token_scores", torch.tensor(counts).log() if merged else None)
        self.blocks = nn.ModuleList(
            FoldedJointBlock(
                shape,
                wanted,
                text=("stream" if block else "table") if attends[block] else None,
                updates_text=block < last and attends[block + 1],
                dual=block in shape["dual_attention_layers"],
                tokens=len(counts),
            )
            for block, wanted in enumerate(kinds)
        )

    def forward(self, latents: torch.Tensor, deepest: int) -> dict[tuple[int, str], torch.Tensor]:
        """Features `(draws * batch, tokens, width)` by block and kind, up to a block."""
        patches = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        image, text = (patches[None] + self.position_embedding[:, None]).flatten(0, 1), None
        features: dict[tuple[int, str], torch.Tensor] = {}
        for index, block in enumerate(self.blocks[: deepest + 1]):
            found, text = block(image, text, self.token_scores)
            features |= {(index, kind): tokens for kind, tokens in found.items()}
            image = found.get("hidden", image)
        return features

    def unused_parts(self, deepest: int, kinds: list[str]) -> list[nn.Module]:
        """The parts that these kinds of the deepest block that is read, and all blocks before it, do not depend on."""
        block: Any = self.blocks[deepest]
        reached = max(map(KINDS.index, kinds))
        unused: list[Any] = list(self.blocks[deepest + 1 :])
        parts = {"attn": 1, "attn2": MLP_NORM, "norm2": MLP_NORM, "ff": MLP, "norm1_context": ATTENTION}
        unused += [getattr(block, part) for part, first in parts.items() if reached < first]
        if reached < ATTENTION and block.attn is not None:
            parts_of_attention = ("to_image_out", "add_qkv", "norm_q", "norm_k", "norm_added_q", "norm_added_k")
            unused += [getattr(block.attn, part) for part in parts_of_attention]
        last = deepest if reached >= ATTENTION else deepest - 1  # that attends to the text
        for each in self.blocks[max(0, last) : deepest + 1]:
            unused += [each.norm2_context, each.ff_context]
            unused += [] if each.attn is None else [each.attn.to_add_out, each.attn.norm_added_q]
        return [part for part in unused if part is not None]


# --------------------------------------------------------------------------------------------------------- the weights


def distinct_tokens(prompt: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The distinct rows of a prompt `(tokens, width)` in the order of their first appearance, and how often each is."""
    _, group, counts = prompt.unique(dim=0, return_inverse=True, return_counts=True)
    first = [int((group == index).nonzero()[0]) for index in range(len(counts))]
    order = sorted(range(len(counts)), key=first.__getitem__)
    return prompt[[first[index] for index in order]], counts[order].tolist()


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

    projection = network.pos_embed.proj
    patch, bias, noise = exact(projection.weight), exact(projection.bias), exact(model.evaluation_noise)
    side = config.sample_size
    positions = exact(network.pos_embed.cropped_pos_embed(side, side))
    alpha, sigma = model.noise_schedule.alpha(timestep), model.noise_schedule.sigma(timestep)
    embedded = F.conv2d(sigma * noise, patch, bias, stride=config.patch_size).flatten(2).transpose(1, 2)
    state = {"patch_embedding.weight": alpha * patch, "position_embedding": embedded + positions}
    if fixed.transformer.token_scores is not None:
        state["token_scores"] = torch.tensor(config.merged_tokens, dtype=torch.float64).log()
    for index, plain in enumerate(fixed.transformer.blocks):
        parts = _folded_block(network.transformer_blocks[index], embedding, plain, text)
        state |= {f"blocks.{index}.{name}": parts[name] for name in plain.state_dict()}
    return {f"transformer.{name}": tensor.to(weight).contiguous() for name, tensor in state.items()}


def _folded_block(block: Any, embedding: torch.Tensor, plain: FoldedJointBlock, text: torch.Tensor) -> State:
    image = _modulation(block.norm1, embedding)
    context = _modulation(block.norm1_context, embedding)
    ones = torch.ones_like(image["shift"])
    state: State = {"gate": image["gate"], "mlp_gate": image["mlp_gate"], "text": text}
    for norm, start in (("attention_norm", ""), ("mlp_norm", "mlp_")):
        state[f"{norm}.weight"], state[f"{norm}.bias"] = 1 + image[f"{start}scale"], image[f"{start}shift"]
    if plain.attn is not None:
        linears = [getattr(block.attn, PROJECTIONS[kind]) for kind in plain.attn.projections]
        state |= _after_norm("attn.to_qkv", linears, image["scale"], image["shift"])
        state |= _before_gate(
            "attn.to_image_out", block.attn.to_out[0], ones if "attention" in plain.kinds else image["gate"]
        )
        state |= _head_norms("attn", block.attn)
        state |= _text_parts(block, plain, context, text)
    if plain.attn2 is not None:
        linears = [getattr(block.attn2, name) for name in PROJECTIONS.values()]
        state |= _after_norm("attn2.to_qkv", linears, image["scale2"], image["shift2"])
        state |= _before_gate("attn2.to_image_out", block.attn2.to_out[0], image["gate2"])
        state |= _head_norms("attn2", block.attn2)
    state |= _after_norm("ff.0", [block.ff.net[0].proj], image["mlp_scale"], image["mlp_shift"])
    return state | _before_gate("ff.2", block.ff.net[2], ones if "mlp" in plain.kinds else image["mlp_gate"])


def _text_parts(block: Any, plain: FoldedJointBlock, context: State, text: torch.Tensor) -> State:
    """The weights of the text in a block, or the table that they make of the first block's text."""
    names, norms = ["add_k_proj", "add_v_proj"], ["norm_added_k", ""]
    if plain.updates_text:
        names, norms = ["add_q_proj", *names], ["norm_added_q", *norms]
    linears = [getattr(block.attn, name) for name in names]
    state = _after_norm("attn.add_qkv", linears, context["scale"], context["shift"])
    assert plain.attn is not None
    if plain.attn.table is not None:
        normed = F.layer_norm(text, text.shape[-1:], eps=EPS)
        added = F.linear(normed, state["attn.add_qkv.weight"], state["attn.add_qkv.bias"]).chunk(len(linears), dim=-1)
        found = [getattr(block.attn, norm, None) for norm in norms]
        rows = [_head_normed(norm, x, plain.attn.heads) for norm, x in zip(found, added, strict=True)]
        state["attn.table"] = torch.stack(rows)
    if plain.updates_text:
        state |= _before_gate("attn.to_add_out", block.attn.to_add_out, context["gate"])
        state |= _after_norm("ff_context.0", [block.ff_context.net[0].proj], context["mlp_scale"], context["mlp_shift"])
        state |= _before_gate("ff_context.2", block.ff_context.net[2], context["mlp_gate"])
    return state


def _modulation(norm: nn.Module, embedding: torch.Tensor) -> State:
    """Shifts, scales and gates of a block, each `(width,)`. The last block's text has a scale, then a shift, only."""
    values = exact(norm.linear(embedding)[0])
    width = norm.linear.in_features
    names = SHIFTS if len(values) > 2 * width else ("scale", "shift")
    return dict(zip(names, values.split(width), strict=False))


def _after_norm(name: str, linears: list[nn.Linear], scale: torch.Tensor, shift: torch.Tensor) -> State:
    weights = [exact(linear.weight) for linear in linears]
    biases = [
        weight @ shift + (0 if linear.bias is None else exact(linear.bias))
        for weight, linear in zip(weights, linears, strict=True)
    ]
    return {f"{name}.weight": torch.cat(weights) * (1 + scale), f"{name}.bias": torch.cat(biases)}


def _before_gate(name: str, linear: nn.Linear, gate: torch.Tensor) -> State:
    return {f"{name}.weight": gate[:, None] * exact(linear.weight), f"{name}.bias": gate * exact(linear.bias)}


def _head_norms(name: str, attention: Any) -> State:
    norms = {part: getattr(attention, part, None) for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
    return {f"{name}.{part}.weight": exact(norm.weight) for part, norm in norms.items() if norm is not None}


def _head_normed(norm: Any, x: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows `(tokens, width)` normalized per head, as `RMSNorm` does."""
    if norm is None:
        return x
    parts = x.unflatten(-1, (heads, -1))
    return (parts * torch.rsqrt(parts.pow(2).mean(dim=-1, keepdim=True) + EPS) * exact(norm.weight)).flatten(-2)


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision on the CPU, since not every accelerator has it."""
    return tensor.detach().cpu().double()


__all__ = ["FoldedJoint", "distinct_tokens", "folded_joint_state"]
