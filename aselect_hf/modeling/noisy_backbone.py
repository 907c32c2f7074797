"""A diffusion network of any family as a vision backbone, the type that the rest of the library uses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .arguments import known_arguments
from .features import tokens_to_map
from .fixing import fixed_config, fold
from .noisy_network import Features, NoisyNetwork

FORMATS = ("tokens", "map", "pooled")


def average_draws(forward: Callable) -> Callable:
    """Average recorded hidden states and attentions over the noise draws, as the features are."""

    @functools.wraps(forward)
    def wrapper(self: NoisyBackbone, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        output = forward(self, *args, **kwargs, return_dict=True)
        batch = output.last_hidden_state.shape[0]
        if output.get("hidden_states"):  # a last block that ends early returns something else
            output["hidden_states"] = output["hidden_states"][: 1 + self.config.num_whole_layers]
        for name in ("hidden_states", "attentions"):
            if output.get(name):
                output[name] = tuple(
                    x.view(-1, batch, *x.shape[1:]).mean(dim=0) if x is not None and x.shape[0] > batch else x
                    for x in output[name]
                )
        return output

    return wrapper


class NoisyBackbone(NoisyNetwork):
    """A pretrained diffusion network whose features are read at a timestep, from inputs mixed with stored noise.

    A family implements `run` and `unused_parts`, sets `projection_names`, and names its features in its config (a
    `NoisyBackboneConfig`). If its timestep can be fixed, it also sets `can_fix_timestep` and implements `folded_state`.
    Everything else is the same for all families.
    """

    projection_names: ClassVar[tuple[str, ...]]
    """Suffixes of the names of the attention's linear layers in `named_modules`."""
    can_fix_timestep: ClassVar[bool] = False
    no_fold = "this family has no fold"
    """Why not, for the error."""

    def unused_parts(self, features: Sequence[str]) -> list[nn.Module]:
        """The parts, besides the VAE, that none of `features` depends on."""
        raise NotImplementedError

    def folded_state(self, fixed: Any) -> dict[str, torch.Tensor]:
        """Weights, except the VAE's, for `fixed`: the same model, still empty, with `fixed.config.fixed_to`."""
        raise NotImplementedError

    def folded_config(self, config: Any) -> Any:
        """The config of the folded model, with the fields that depend on weights."""
        return config

    def fingerprint_fields(self) -> dict[str, Any]:
        """JSON values, besides the weights, that features depend on: they become part of the names of caches."""
        config = self.config
        return {
            "image_size": config.image_size,
            "noise_seed": config.noise_seed,
            "schedule": config.noise_schedule,
            "vae": config.vae_config,
        }

    @known_arguments()
    @can_return_tuple
    @average_draws
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        timestep: int | None = None,
        feature: str | Sequence[str] | None = None,
        noise: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        r"""The chosen feature at the chosen timestep.

        Args:
            pixel_values: `(batch, channels, height, width)` in [-1, 1]; or
            latents: `(batch, num_channels, height, width)` scaled latents, in place of pixels.
            timestep: on the axis of `NoiseSchedule` (default: `config.timestep`).
            feature: `blocks.<i>.<kind>` (default: `config.feature`). Several are concatenated along the width.
            noise: standard normal, broadcastable to the latents (default: the stored noise draws, averaged over).
            class_labels: `(batch,)` (default: the null class).

        Returns:
            `last_hidden_state` `(batch, tokens, width)`: the feature; `pooler_output` `(batch, width)`: its token mean.
            With `output_hidden_states` or `output_attentions` all blocks are run and returned.

        Raises:
            ValueError: wrong channels or size, NaN, unknown feature, timestep out of range; anything but the defaults
                of a model with a fixed timestep; in evaluation mode, a part overflows its precision (not checked in
                compiled and exported models).
            TypeError: an unknown keyword argument.
        """
        names = self._names(feature)
        timestep = self.resolve_timestep(timestep)
        flags = ("output_hidden_states", "output_attentions")
        whole = any(kwargs.get(flag, getattr(self.config, flag, False)) for flag in flags)
        latents = self.prepare_latents(pixel_values, latents)
        features = self._features_at(latents, names, timestep, noise, class_labels, whole=whole, **kwargs)
        tokens = torch.cat([features[name] for name in names], dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(dim=1))

    @torch.no_grad()
    @known_arguments()
    def extract_features(
        self,
        pixel_values: torch.Tensor | None = None,
        *,
        latents: torch.Tensor | None = None,
        feature: str | Sequence[str] | None = None,
        timestep: int | Sequence[int] | None = None,
        noise: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        output_format: Literal["tokens", "map", "pooled"] = "tokens",
        features: Sequence[str] | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> Features:
        """Features at one or several timesteps, without gradients: one run per timestep, up to the deepest feature.

        Args:
            pixel_values, latents, noise, class_labels: as in `forward`.
            feature: one or several names (default: `config.feature`).
            timestep: one or several (default: `config.timestep`).
            features, timesteps: alternative spellings, for lists.
            output_format: `"tokens"` `(batch, timesteps, tokens, width)`, `"map"` `(batch, timesteps, channels, height,
                width)` of the patch grid, or `"pooled"` (token mean) `(batch, timesteps, width)`.

        Returns:
            Features by the requested names, with timesteps in the requested order.

        Raises:
            ValueError: as `forward`.
            TypeError: an unknown keyword argument, or both spellings of one.
        """
        pairs = ((feature, features), (timestep, timesteps))
        if any(one is not None and other is not None for one, other in pairs):
            raise TypeError("extract_features() takes feature or features, and timestep or timesteps, not both")
        if output_format not in FORMATS:
            raise ValueError(f"output_format must be 'tokens', 'map' or 'pooled', got {output_format!r}")
        if features is not None and (isinstance(features, str) or not features):
            raise ValueError(f"features must be a non-empty list of names, got {features!r}")
        names = self._names(feature if features is None else features)
        several = isinstance(timestep, Sequence) or getattr(timestep, "ndim", 0) > 0
        asked: Any = timestep if several or timestep is None else [timestep]
        asked = timesteps if asked is None else asked
        steps = [self.default_timestep] if asked is None else [self.noise_schedule.check_timestep(t) for t in asked]
        if not steps:
            raise ValueError("timesteps must not be empty")
        latents = self.prepare_latents(pixel_values, latents)
        grid_size = self.grid_size(latents)
        runs = []
        for step in steps:
            run = self._features_at(latents, names, step, noise, class_labels)  # each (batch, tokens, width)
            if output_format == "pooled":
                run = {name: tokens.mean(dim=1) for name, tokens in run.items()}
            elif output_format == "map":
                run = {name: tokens_to_map(tokens, grid_size) for name, tokens in run.items()}
            runs.append(run)
        return {name: torch.stack([run[name] for run in runs], dim=1) for name in names}

    def features_of_noisy(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        features: Sequence[str],
        class_labels: torch.Tensor | None = None,
    ) -> Features:
        """Features of inputs that are already noisy, each sample at its own timestep, in one run.

        Args:
            noisy_latents: `(batch, num_channels, height, width)`, see `noise_schedule.add_noise`.
            timesteps: `(batch,)`.

        Returns:
            `(batch, tokens, width)` by name.
        """
        return self._run_noisy(noisy_latents, timesteps, class_labels, features)[0]

    def denoise(
        self,
        noisy_latents: torch.Tensor,
        timestep: int | torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The diffusion model itself: its prediction (see `noise_schedule.prediction_type`), learned sigma cut off.

        Args:
            noisy_latents: `(batch, num_channels, height, width)`, not noised any further.
            timestep: one for all, or `(batch,)`.
            class_labels: `(batch,)` (default: the null class).

        Returns:
            `(batch, num_channels, height, width)`.
        """
        if not isinstance(timestep, torch.Tensor):
            timestep = self.noise_schedule.check_timestep(timestep)
        timesteps = torch.as_tensor(timestep, device=noisy_latents.device).expand(noisy_latents.shape[0])
        return self.denoise_with_features(noisy_latents, timesteps, [], class_labels)[0]

    def denoise_with_features(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        features: Sequence[str],
        class_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Features]:
        """`denoise` and `features_of_noisy` in one run, so that a joint loss costs no extra pass.

        Args:
            timesteps: `(batch,)`.

        Returns:
            The prediction `(batch, num_channels, height, width)`, and `(batch, tokens, width)` by name.
        """
        names = [*features, self.last_output]
        found, prediction = self._run_noisy(noisy_latents, timesteps, class_labels, names, predict=True)
        assert prediction is not None
        return prediction[:, : self.config.num_channels], {name: found[name] for name in features}

    def fix_timestep(
        self, timestep: int | None = None, feature: str | Sequence[str] | None = None, class_label: int | None = None
    ) -> Any:
        """The same model for one timestep only: a plain ViT on latents, smaller and faster.

        The timestep, the class and the stored noise are folded into the weights, and what the features do not depend
        on is left out (see `fixed_timestep.py`). The result is an ordinary model (same classes, pipelines, heads, ONNX
        export), but it cannot denoise, and refuses other timesteps, features, classes, noises and resolutions.

        Args:
            timestep: timestep to keep (default: `config.timestep`).
            feature: one or several names to keep (default: `config.feature`).
            class_label: class that it is conditioned on (default: the null class).

        Returns:
            A new model; this one is unchanged.

        Raises:
            ValueError: no such timestep, feature or class; or the model is already fixed, is quantized, or is of a
                family that cannot be fixed.
        """
        names = self._names(feature)
        return fold(self, fixed_config(self.config, self.resolve_timestep(timestep), names, class_label))

    def attention_projections(self, features: Sequence[str] | None = None) -> list[str]:
        """Names of the attention's linear layers that `features` depend on (default: `config.feature`), for LoRA.

        Blocks after the features do not run, so an adapter there gets no gradient. With peft:
        `LoraConfig(target_modules=model.attention_projections())`.
        """
        unused = {id(x) for part in self.unused_parts(features or [str(self.config.feature)]) for x in part.modules()}
        return [
            name
            for name, module in self.named_modules()
            if name.endswith(self.projection_names) and not name.startswith("vae.") and id(module) not in unused
        ]

    def untrained_twin(self) -> Any:
        """The same network, stored noise and VAE, with random weights, to see what features owe to the architecture."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            twin: Any = type(self)(copy.deepcopy(self.config))
        twin.to(self.device, self._weight.dtype)  # the VAE may have another dtype
        twin.vae = self.vae
        return twin.eval()

    @property
    def last_output(self) -> str:
        """The feature that is the output of the last block."""
        return f"blocks.{self.config.num_hidden_layers - 1}.{self.config.feature_kinds[-1]}"

    def _names(self, feature: str | Sequence[str] | None) -> list[str]:
        names = [feature or str(self.config.feature)] if feature is None or isinstance(feature, str) else list(feature)
        if not names:
            raise ValueError("feature must be a name or a non-empty list of names")
        return names


__all__ = ["NoisyBackbone"]
