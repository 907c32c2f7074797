"""What an `ASelectDiffusionModel` needs to know of a family of diffusion transformers.

The network itself is the class of diffusers, unchanged. A `Family` says where its features are, which inputs it takes
and how its output is read. See the page on families in the documentation for how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from packaging.version import parse

PARALLEL = ("query", "key", "value")
"""Kinds that depend on the input of the attention alone, and not on each other."""
FLOW = {"type": "flow_matching"}
SIGMA_FLOW = {"type": "flow_matching", "model_time": "noise_fraction"}

Conditioning = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Tap:
    """Where a feature is read: the input or output of a module of a block.

    Args:
        path: of the module inside the block; empty for the block itself.
        side: input (its first argument) or output.
        item: of an output that is a tuple.
        joint: where the image tokens are, if text tokens are in the same sequence.
        map: whether the tensor is a map `(batch, width, height, width)` instead of tokens.
        part: `(index, count)`: which of `count` equal parts of the last axis, if one module computes several kinds.
    """

    path: str
    side: Literal["in", "out"] = "out"
    item: int | None = None
    joint: Literal["", "first", "last"] = ""
    map: bool = False
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks.

    Args:
        blocks: attribute of the transformer that holds them.
        depth: field of its config that counts them.
        taps: kinds of features in order of computation, and where each is read; the last is the block's output.
        parts: modules of the block that a kind needs besides those of the kinds before it (see `needed`).
        text: modules that only the text's output depends on.
        skip: a block's arguments to what it would return if it did nothing.
        before_text: kinds that a block computes before image tokens meet the text.
    """

    blocks: str
    depth: str
    taps: Mapping[str, Tap]
    parts: Mapping[str, tuple[str, ...]]
    text: tuple[str, ...]
    skip: Callable[..., Any]
    before_text: tuple[str, ...] = ("attention_norm", *PARALLEL)

    def needed(self, kind: str) -> set[str]:
        """Modules of the block that a feature depends on."""
        kinds = list(self.taps)
        before = kinds[: kinds.index(kind)]
        if kind in PARALLEL:
            before = [each for each in before if each not in PARALLEL]
        return {part for each in (*before, kind) for part in self.parts.get(each, ())}

    @property
    def all_parts(self) -> set[str]:
        """Every module of the block that has weights."""
        return {*(part for parts in self.parts.values() for part in parts), *self.text}


@dataclass(frozen=True)
class Family:
    """One class of diffusers' transformers.

    Args:
        transformer_class: its name in diffusers.
        stacks: its blocks in order of computation.
        defaults: fields of its config that are read here, with the values of diffusers' class.
        schedule: fields of the `NoiseSchedule` that it is trained with.
        channels: config to channels of the latents.
        patch: config to side of a token in latents.
        sample_size: config to side of the latents at the default resolution.
        max_grid: config to the longest side of the patch grid; `None` if there is no limit.
        conditioning: names of the stored tensors, without their batch, and the config's field with the width of each
            (`None`: not checked). They are named as the arguments of the pipeline.
        text_inputs: modules that only the text passes through on its way to the first block.
        outputs: modules after the last block.
        inputs: `(config, latents, time, conditioning, guidance)` to the transformer's keyword arguments.
        prediction: its output and the latents to a prediction with the shape of the latents.
        guided: config to whether it takes a guidance scale as an input.
        checkpointing: whether the class computes the same with gradient checkpointing.
        refusal: config to why such a network is not supported; empty if it is.
        width: config to width of the tokens.
        key_width: config to width of keys and values (default: that of the tokens).
        heads: config to number of attention heads.
        tokens: config's field with the number of text tokens, for stored tensors that must have just so many.
        fold: how its timestep is fixed, a key of `folds.FOLDS`; `None` if it cannot be.
        scheduler: fields that its scheduler must have, since an adapter computes with them.
        diffusers: the first version of diffusers whose class this was written for.
    """

    transformer_class: str
    stacks: tuple[Stack, ...]
    defaults: Mapping[str, Any]
    schedule: Mapping[str, Any]
    channels: Callable[[Mapping[str, Any]], int]
    patch: Callable[[Mapping[str, Any]], int]
    sample_size: Callable[[Mapping[str, Any]], int]
    max_grid: Callable[[Mapping[str, Any]], int | None]
    conditioning: Mapping[str, str | None]
    text_inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: Callable[[Mapping[str, Any], torch.Tensor, torch.Tensor, Conditioning, float | None], dict[str, Any]]
    prediction: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    guided: Callable[[Mapping[str, Any]], bool] = lambda config: False
    refusal: Callable[[Mapping[str, Any]], str] = lambda config: ""
    checkpointing: bool = True
    width: Callable[[Mapping[str, Any]], int] = lambda config: (
        config["num_attention_heads"] * config["attention_head_dim"]
    )
    heads: Callable[[Mapping[str, Any]], int] = lambda config: config["num_attention_heads"]
    key_width: Callable[[Mapping[str, Any]], int] | None = None
    tokens: Mapping[str, str] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    fold: Literal["joint", "cross", "linear_cross"] | None = None
    diffusers: str = "0.36.0"

    def locate(self, config: Mapping[str, Any], block: int) -> tuple[Stack, int]:
        """The stack of a block, counted over all stacks, and its place there."""
        for stack in self.stacks:
            if block < config[stack.depth]:
                return stack, block
            block -= config[stack.depth]
        raise IndexError(block)

    def depth(self, config: Mapping[str, Any]) -> int:
        """Number of blocks of the whole network."""
        return sum(config[stack.depth] for stack in self.stacks)

    def stock_class(self) -> Any:
        """The class in the installed diffusers.

        Raises:
            ImportError: diffusers is missing, or older than this family needs.
        """
        try:
            import diffusers
        except ImportError as error:
            raise ImportError(
                f"a {self.transformer_class} needs diffusers {self.diffusers} or newer: {error}"
            ) from error
        if parse(diffusers.__version__).release < parse(self.diffusers).release:
            raise ImportError(
                f"a {self.transformer_class} needs diffusers {self.diffusers} or newer, but {diffusers.__version__} is "
                "installed: pip install --upgrade diffusers"
            )
        return getattr(diffusers, self.transformer_class)


def pass_both(
    hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Stack.skip` of blocks that return the text and the image."""
    return encoder_hidden_states, hidden_states


def pass_one(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """`Stack.skip` of blocks that return one tensor."""
    return hidden_states


def same(output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """`Family.prediction` of networks whose output has the shape of the latents, apart from a learned sigma."""
    return output[:, : latents.shape[1]]


def dual_stream(norm: str = "norm1", extra: tuple[str, ...] = ()) -> Stack:
    """Blocks with separate weights for image and text, which attend to each other (MM-DiT, arXiv 2403.03206).

    Args:
        norm: module that modulates the image tokens.
        extra: modules between the joint attention and the MLP.
    """
    return Stack(
        blocks="transformer_blocks",
        depth="num_layers",
        taps={
            "attention_norm": Tap(norm, item=0),
            "query": Tap("attn.to_q"),
            "key": Tap("attn.to_k"),
            "value": Tap("attn.to_v"),
            "attention": Tap("attn.to_out.0"),
            "mlp_norm": Tap("ff", side="in"),
            "mlp": Tap("ff"),
            "hidden": Tap("", item=1),
        },
        parts={
            "attention_norm": (norm,),
            "query": ("attn.to_q",),
            "key": ("attn.to_k",),
            "value": ("attn.to_v",),
            "attention": (
                *("attn.norm_q", "attn.norm_k", f"{norm}_context"),
                *("attn.add_k_proj", "attn.add_v_proj", "attn.norm_added_k", "attn.to_out"),
            ),
            "mlp_norm": extra,
            "mlp": ("ff",),
        },
        text=("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context"),
        skip=pass_both,
    )


def single_stream(
    blocks: str,
    depth: str,
    attention: str,
    mlp: str,
    norm: Tap,
    place: Literal["first", "last"],
    before: tuple[str, ...],
    between: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
) -> Stack:
    """Blocks of attention, then an MLP, on image and text in one sequence.

    Args:
        blocks, depth: as in `Stack`.
        attention, mlp: modules of a block.
        norm: where the input of the attention is.
        place: where the image is in the sequence.
        before, between, after: modules before the attention, between its output and the MLP, and after the MLP.
    """
    return Stack(
        blocks=blocks,
        depth=depth,
        taps={
            "attention_norm": norm,
            "query": Tap(f"{attention}.to_q", joint=place),
            "key": Tap(f"{attention}.to_k", joint=place),
            "value": Tap(f"{attention}.to_v", joint=place),
            "attention": Tap(f"{attention}.to_out.0", joint=place),
            "mlp_norm": Tap(mlp, side="in", joint=place),
            "mlp": Tap(mlp, joint=place),
            "hidden": Tap("", joint=place),
        },
        parts={
            "attention_norm": before,
            "query": (f"{attention}.to_q",),
            "key": (f"{attention}.to_k",),
            "value": (f"{attention}.to_v",),
            "attention": (f"{attention}.norm_q", f"{attention}.norm_k", f"{attention}.to_out"),
            "mlp_norm": between,
            "mlp": (mlp,),
            "hidden": after,
        },
        text=(),
        skip=pass_one,
    )


__all__ = ["Family", "Stack", "Tap", "dual_stream", "pass_both", "pass_one", "same", "single_stream"]
