"""Models of any family that are fixed to one timestep, class and noise draw: their config, requests and weights.

Each family folds its own weights, see `NoisyBackbone.folded_state`; the equations for a DiT are in `fixed_timestep.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .features import FeatureName, list_features

FIXED = ("timestep", "noise_seed", "num_noise_draws")
"""Fields that `fixed_to` repeats, since they describe folded weights and cannot be changed."""


class FixedTimestepMixin:
    """The part of a config for `fixed_timestep` and `fixed_to`, see `NoisyBackboneConfig`."""

    def list_features(self: Any) -> list[str]:
        """Names of all features in order of computation or, with a fixed timestep, those kept."""
        if self.fixed_to is not None:
            return list(self.fixed_to["features"])
        return list_features(self.num_hidden_layers, self.feature_kinds)

    @property
    def num_kept_layers(self: Any) -> int:
        """Number of blocks: all or, with a fixed timestep, those up to the deepest kept feature."""
        return 1 + max(self.resolve_feature(name).block for name in self.list_features())

    @property
    def num_whole_layers(self: Any) -> int:
        """Number of blocks that compute their output: all but a last one that ends earlier."""
        last = self.num_kept_layers - 1
        whole = FeatureName(last, self.feature_kinds[-1]) in map(self.resolve_feature, self.list_features())
        return last + 1 if whole else last

    def has_class(self: Any, label: Any) -> bool:
        """Whether `label` is a class or the null class."""
        return isinstance(label, int) and self.null_class is not None and 0 <= label <= self.null_class

    def check_fixed(self: Any) -> None:
        """Refuse fields that contradict what the weights were folded for."""
        if not self.fixed_timestep and self.fixed_to is None:
            return
        fixed = self.fixed_to
        if not self.fixed_timestep or not isinstance(fixed, dict) or set(fixed) != {*FIXED, "features", "class_label"}:
            raise ValueError("fixed_timestep and fixed_to are written together, by model.fix_timestep(); set neither")
        if not isinstance(fixed["features"], list) or not fixed["features"]:
            raise ValueError(f"fixed_to needs a non-empty list of features, got {fixed['features']!r}")
        kept = [self.resolve_feature(name) for name in fixed["features"]]
        label = fixed["class_label"]
        if label is not None and not self.has_class(label):
            raise ValueError(f"fixed_to must have a class_label in 0..{self.null_class}, got {label!r}")
        for name in FIXED:
            if getattr(self, name) != fixed[name]:
                raise self.fixed_error(f"{name}={getattr(self, name)}")
        if self.head_timesteps not in (None, [fixed["timestep"]]):
            raise self.fixed_error(f"head_timesteps={self.head_timesteps}")
        for name in (str(self.feature), *(self.head_features or ())):
            if self.resolve_feature(name) not in kept:
                raise self.fixed_error(f"feature {name!r}")

    def fixed_error(self: Any, what: str) -> ValueError:
        """The error for what a model with a fixed timestep cannot do."""
        fixed = self.fixed_to or {}
        names = ", ".join(fixed["features"][:4]) + (" and others" if len(fixed["features"]) > 4 else "")
        return ValueError(
            f"{what} is not possible: this model is fixed to timestep {fixed['timestep']} and {names}, "
            "with its noise, class and resolution; use the checkpoint it was made from"
        )


def fixed_config(config: Any, timestep: int, features: Sequence[str], class_label: int | None) -> Any:
    """The config of the folded model, without features and timesteps of a head that are not kept.

    Raises:
        ValueError: it is already fixed, or there is no such feature or class.
    """
    if config.fixed_timestep:
        raise config.fixed_error("fixing it again")
    null_class = config.null_class
    if class_label is not None and not config.has_class(class_label):
        raise ValueError(
            f"class_label must be an integer in 0..{null_class} ({null_class}: no class) or None, got {class_label!r}"
        )
    names = [str(config.resolve_feature(name)) for name in features]
    if not names:
        raise ValueError("feature must be a name or a non-empty list of names")
    fixed = copy.deepcopy(config)
    fixed.fixed_timestep, fixed.timestep = True, timestep
    if str(config.resolve_feature(str(fixed.feature))) not in names:
        fixed.feature = names[0]
    if (fixed.timestep, fixed.feature) != (config.timestep, config.feature):
        fixed.selection = None  # it chose something else
    fixed.head_timesteps = None
    if not {str(config.resolve_feature(name)) for name in fixed.head_features or ()} <= set(names):
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
def fold(model: Any, config: Any) -> Any:
    """A model of the class of `model`, with its weights folded for `config` (see `fixed_config`); `model` is kept.

    Raises:
        ValueError: its family has no fold, or the weights are quantized.
    """
    backbone = model.base_model
    if not backbone.can_fix_timestep:
        raise ValueError(f"the timestep of a {type(backbone).__name__} cannot be fixed: {backbone.no_fold}")
    check_weights(model)
    config = backbone.folded_config(config)
    prefix = "" if backbone is model else f"{model.base_model_prefix}."
    with torch.device("meta"):
        fixed = type(model)(config)
    folded = {f"{prefix}{name}": tensor for name, tensor in backbone.folded_state(fixed.base_model).items()}
    state = model.state_dict()  # of the VAE and the head
    state = {name: folded[name] if name in folded else state[name].clone() for name in fixed.state_dict()}
    fixed.load_state_dict(state, assign=True)
    fixed.license_files = model.license_files
    return fixed.train(model.training)


def check_weights(model: nn.Module) -> None:
    """Refuse quantized weights, since folding into them would round twice."""
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor or not parameter.is_floating_point():
            raise ValueError(
                f"fix_timestep needs weights that are not quantized, but {name} is a {type(parameter.data).__name__}: "
                "fix the timestep of the original checkpoint, then quantize the result"
            )


def check_request(
    config: Any,
    latents: torch.Tensor,
    features: Sequence[str],
    timestep: int,
    noise: torch.Tensor | None,
    class_labels: torch.Tensor | None,
) -> None:
    """Refuse another timestep, feature or resolution than a model is fixed to, and any noise or class."""
    side = config.sample_size
    kept = [config.resolve_feature(name) for name in config.list_features()]
    for name in features:
        if config.resolve_feature(name) not in kept:
            raise config.fixed_error(f"feature {name!r}")
    if timestep != config.timestep:
        raise config.fixed_error(f"timestep={timestep}")
    if noise is not None:
        raise config.fixed_error("noise of your own")
    if class_labels is not None:
        raise config.fixed_error("class_labels")
    if latents.shape[-2:] != (side, side):
        raise config.fixed_error(f"an input of {latents.shape[-2]} x {latents.shape[-1]} instead of {side} x {side}")


__all__ = ["FixedTimestepMixin"]
