"""A DiT at one timestep, class and noise draw is a plain ViT on latents: its layers, and how they are computed (ours).

Two identities. At a fixed timestep and class the shift, scale and gate of every adaLN are constant vectors, so they go
into the linear layers around them:

    W (norm(x) * (1 + scale) + shift) + b = (W * (1 + scale)) norm(x) + (W shift + b),      gate * (W a + b) likewise

And with a fixed noise draw the noise is a constant beside the positions:

    patch(alpha z + sigma noise) + positions = (alpha W) z + (W sigma noise + b + positions)

Only what the kept features (`config.fixed_to`) depend on is left: no block after the deepest one, no part of that block
after its feature, no condition embedders, no output layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .blocks import ASelectDiTBlock, ASelectDiTLayer, ASelectDiTMLP, ASelectDiTSelfAttention
from .configuration_aselect_dit import ASelectDiTConfig
from .features import FEATURE_KINDS, parse_feature

State = dict[str, torch.Tensor]

PROJECTIONS = ("query", "key", "value")
FIRST_KINDS = {
    "attention_norm": "attention_norm",
    "qkv_proj": "query",
    "attention": "attention",
    "attention_gate": "attention_gated",
    "mlp_norm": "mlp_norm",
    "mlp": "mlp",
    "mlp_gate": "mlp_gated",
}
"""Every part of a fixed layer with the first kind of feature that depends on it; so do all kinds after that one."""


def reaches(kind: str, other: str) -> bool:
    """Whether a block that computes `kind` has computed `other` by then."""
    return FEATURE_KINDS.index(kind) >= FEATURE_KINDS.index(other)


class ASelectDiTFixedLayer(ASelectDiTBlock):
    """A plain pre-norm block that computes `kinds` and nothing after them.

    Modulation is folded into the linear layers, except where that would change one of `kinds`: a norm whose output is
    asked for is affine, and a gate whose input is asked for stays a vector. A part that is not needed is `None`.
    """

    attention_norm: Any
    qkv_proj: Any
    attention: Any
    mlp_norm: Any
    mlp: Any

    def __init__(self, config: ASelectDiTConfig, kinds: set[str]) -> None:
        super().__init__()
        width = config.hidden_size
        deepest = max(kinds, key=FEATURE_KINDS.index)
        has = {part for part, first in FIRST_KINDS.items() if reaches(deepest, first)}
        self.kinds = kinds
        self.projections = PROJECTIONS if "attention" in has else tuple(kind for kind in PROJECTIONS if kind in kinds)

        def norm(name: str, eps: float) -> nn.LayerNorm | None:
            return nn.LayerNorm(width, elementwise_affine=name in kinds, eps=eps) if name in has else None

        def gate(of: str) -> nn.Parameter | None:
            return nn.Parameter(torch.ones(width)) if of in kinds and f"{of}_gate" in has else None

        self.attention_norm = norm("attention_norm", 1e-6)
        self.qkv_proj = nn.Linear(width, len(self.projections) * width) if self.projections else None
        self.attention = ASelectDiTSelfAttention(config) if "attention" in has else None
        self.attention_gate = gate("attention")
        self.mlp_norm = norm("mlp_norm", config.mlp_norm_eps)
        self.mlp = ASelectDiTMLP(config) if "mlp" in has else None
        self.mlp_gate = gate("mlp")

    def steps(
        self, hidden_states: torch.Tensor, conditioning: Any = None, **kwargs: Any
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Compute the block one feature at a time; those that are not among `kinds` have no meaning outside of it."""
        attention_norm = self.attention_norm(hidden_states)
        yield "attention_norm", attention_norm
        projected = self.qkv_proj(attention_norm).chunk(len(self.projections), dim=-1)
        yield from zip(self.projections, projected, strict=True)
        attention, _ = self.attention(*projected, **kwargs)
        yield "attention", attention
        attention_gated = attention if self.attention_gate is None else self.attention_gate * attention
        yield "attention_gated", attention_gated
        hidden_states = hidden_states + attention_gated

        mlp_norm = self.mlp_norm(hidden_states)
        yield "mlp_norm", mlp_norm
        mlp = self.mlp(mlp_norm)
        yield "mlp", mlp
        mlp_gated = mlp if self.mlp_gate is None else self.mlp_gate * mlp
        yield "mlp_gated", mlp_gated
        yield "hidden", hidden_states + mlp_gated

    def parts_after(self, kind: str) -> list[Any]:
        """The parts that `kind` does not depend on."""
        parts = [getattr(self, part) for part, first in FIRST_KINDS.items() if not reaches(kind, first)]
        return [part for part in parts if part is not None]


def fixed_layers(config: ASelectDiTConfig) -> nn.ModuleList:
    """The blocks that the features of `config.fixed_to` need, the last of them cut after its feature."""
    names = [parse_feature(name, config.num_hidden_layers) for name in (config.fixed_to or {})["features"]]
    last = config.num_kept_layers - 1
    kinds = [{name.kind for name in names if name.block == block} for block in range(last + 1)]
    return nn.ModuleList(
        ASelectDiTFixedLayer(config, wanted | ({"hidden"} if block < last else set()))
        for block, wanted in enumerate(kinds)
    )


def fixed_config(
    config: ASelectDiTConfig, timestep: int, features: Sequence[str], class_label: int | None
) -> ASelectDiTConfig:
    """`config` of the same model after folding; a head's features and timesteps that are lost are not in it.

    Raises:
        ValueError: it is fixed already, or there is no such feature or class.
    """
    if config.fixed_timestep:
        raise config.fixed_error("fixing it again")
    null_class = config.num_condition_classes
    if class_label is not None and (not isinstance(class_label, int) or not 0 <= class_label <= null_class):
        raise ValueError(
            f"class_label must be an integer in 0..{null_class} ({null_class}: no class) or None, got {class_label!r}"
        )
    names = [str(parse_feature(name, config.num_hidden_layers)) for name in features]
    if not names:
        raise ValueError("feature must be a name or a non-empty list of names")
    fixed = copy.deepcopy(config)
    fixed.fixed_timestep, fixed.timestep = True, timestep
    if str(parse_feature(str(fixed.feature), fixed.num_hidden_layers)) not in names:
        fixed.feature = names[0]
    if (fixed.timestep, fixed.feature) != (config.timestep, config.feature):
        fixed.selection = None  # it chose something else
    fixed.head_timesteps = None
    if not {str(parse_feature(name, fixed.num_hidden_layers)) for name in fixed.head_features or ()} <= set(names):
        fixed.head_features = None
    fixed.fixed_to = {
        "timestep": timestep,
        "features": list(dict.fromkeys(names)),
        "class_label": class_label,
        "noise_seed": fixed.noise_seed,
        "num_noise_draws": fixed.num_noise_draws,
    }
    fixed.check_fixed()
    return fixed


@torch.no_grad()
def fold(model: Any, config: ASelectDiTConfig) -> Any:
    """A model of the class of `model`, with its weights folded for `config` (see `fixed_config`); `model` is kept."""
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    with torch.device("meta"):
        fixed = type(model)(config)
    dit, fixed_dit = (getattr(x, model.base_model_prefix, x) for x in (model, fixed))
    folded = {f"{prefix}{name}": tensor for name, tensor in _folded_state(dit, fixed_dit).items()}
    state = model.state_dict()  # of the VAE and the head
    fixed.load_state_dict({name: folded.get(name, state.get(name)).clone() for name in fixed.state_dict()}, assign=True)
    return fixed.train(model.training)


def _folded_state(dit: Any, fixed: Any) -> State:
    """Everything in `fixed` but its VAE, computed in double precision."""
    config, weight = fixed.config, dit.patch_embedding.weight
    timestep, class_label = config.fixed_to["timestep"], config.fixed_to["class_label"]
    label = None if class_label is None else torch.tensor([class_label], device=weight.device)
    conditions = dit._conditions(torch.tensor([timestep], device=weight.device), label, 1)

    patch, bias, noise, positions = map(
        _exact, (weight, dit.patch_embedding.bias, dit.evaluation_noise, dit.position_embedding)
    )
    alpha, sigma = dit.noise_schedule.alpha(timestep), dit.noise_schedule.sigma(timestep)
    embedded = nn.functional.conv2d(sigma * noise, patch, bias, stride=config.patch_size).flatten(2).transpose(1, 2)
    state = {"patch_embedding.weight": alpha * patch, "position_embedding": embedded + positions}
    for index, (layer, plain) in enumerate(zip(dit.layers, fixed.layers, strict=False)):
        parts = _folded_layer(layer, conditions[index % len(conditions)], plain)
        state |= {f"layers.{index}.{name}": tensor for name, tensor in parts.items()}
    return {name: tensor.to(weight).contiguous() for name, tensor in state.items()}


def _folded_layer(layer: ASelectDiTLayer, conditioning: torch.Tensor, plain: ASelectDiTFixedLayer) -> State:
    """The state of `plain`, at one conditioning vector `(1, width)`."""
    modulation = _exact(layer.modulation(nn.functional.silu(conditioning))[0])
    attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6)
    state: State = {"attention_gate": attention_gate, "mlp_gate": mlp_gate}

    def norm(name: str, scale: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left for the linear layer after the norm: nothing, where the norm itself is affine."""
        if name not in plain.kinds:
            return scale, shift
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + scale, shift
        return torch.zeros_like(scale), torch.zeros_like(shift)

    def after_norm(name: str, linears: list[nn.Linear], scale: torch.Tensor, shift: torch.Tensor) -> None:
        weights = [_exact(linear.weight) for linear in linears]
        biases = [
            weight @ shift + (0 if linear.bias is None else _exact(linear.bias))
            for weight, linear in zip(weights, linears, strict=True)
        ]
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.cat(weights) * (1 + scale), torch.cat(biases)

    def before_gate(name: str, linear: nn.Linear, gate: torch.Tensor) -> None:
        state[f"{name}.weight"] = gate[:, None] * _exact(linear.weight)
        state[f"{name}.bias"] = gate * _exact(linear.bias)

    attention, mlp, ones = layer.attention, layer.mlp, torch.ones_like(attention_gate)
    scale, shift = norm("attention_norm", attention_scale, attention_shift)
    if plain.projections:
        linears: list[nn.Linear] = [getattr(attention, f"{kind[0]}_proj") for kind in plain.projections]
        after_norm("qkv_proj", linears, scale, shift)
    before_gate("attention.o_proj", attention.o_proj, ones if "attention" in plain.kinds else attention_gate)
    after_norm("mlp.fc1", [mlp.fc1], *norm("mlp_norm", mlp_scale, mlp_shift))
    before_gate("mlp.fc2", mlp.fc2, ones if "mlp" in plain.kinds else mlp_gate)
    return {name: state[name] for name in plain.state_dict()}


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision, on the CPU: not every accelerator has it."""
    return tensor.detach().cpu().double()


def check_request(
    config: ASelectDiTConfig,
    latents: torch.Tensor,
    features: Sequence[str],
    timestep: int,
    noise: torch.Tensor | None,
    class_labels: torch.Tensor | None,
) -> None:
    """Refuse what a fixed model cannot compute.

    Raises:
        ValueError: another timestep, feature or resolution than it is fixed to, a noise or a class.
    """
    fixed = config.fixed_to or {}
    side = config.sample_size
    kept = [parse_feature(name, config.num_hidden_layers) for name in fixed["features"]]
    for name in features:
        if parse_feature(name, config.num_hidden_layers) not in kept:
            raise config.fixed_error(f"feature {name!r}")
    if timestep != fixed["timestep"]:
        raise config.fixed_error(f"timestep={timestep}")
    if noise is not None:
        raise config.fixed_error("noise of your own")
    if class_labels is not None:
        raise config.fixed_error("class_labels")
    if latents.shape[-2:] != (side, side):
        raise config.fixed_error(f"an input of {latents.shape[-2]} x {latents.shape[-1]} instead of {side} x {side}")


__all__ = ["ASelectDiTFixedLayer"]
