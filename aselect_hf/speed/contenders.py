"""The contenders: our model, diffusers' network and a plain ViT, each set up to compute one feature."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import nn
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer, ViTPatchEmbeddings

from aselect_hf.conversion import HOOKED, diffusers_peer, set_vae
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.modeling.noisy_backbone import NoisyBackbone

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Largest accepted difference between features relative to the greatest value, by the least precise dtype in use."""
TF32_TOLERANCE = 0.02
"""The tolerance for float32 on a GPU that rounds factors to TF32, as cuDNN does by default in convolutions."""

DIFFUSERS = "diffusers, whole network"
CUT = "diffusers, cut in the hook"
VIT = "plain ViT (limit)"
OURS = "ours"
FIXED = "ours, fixed timestep"


@dataclass
class Contender:
    """A function from an input to its feature `(batch, tokens, width)`, with the modules whose weights it uses."""

    name: str
    run: Callable[[torch.Tensor], torch.Tensor]
    modules: Sequence[nn.Module]
    tolerance: float | None
    """Largest accepted relative difference from the first contender's feature; `None`: it computes something else."""

    def timed(self, batch: torch.Tensor) -> float:
        """Seconds of one run."""
        _synchronize(batch.device)
        started = time.perf_counter()
        self.run(batch)
        _synchronize(batch.device)
        return time.perf_counter() - started


class Peers:
    """The networks that the contenders run, all built from one model."""

    def __init__(self, model: NoisyBackbone, feature: str) -> None:
        config = model.config
        self.model, self.feature, self.timestep = model, feature, model.default_timestep
        self.fixed = model if config.fixed_timestep else model.fix_timestep(self.timestep, feature).eval()
        self.vit = PlainViT(config, feature).to(model.device, model.dtype).eval()
        self.transformer: Any = None
        self.no_diffusers = ""
        try:
            self.transformer, self.scheduler, self.hooked = diffusers_peer(model, feature)
        except ValueError as error:
            self.no_diffusers = str(error)

    def from_latents(self) -> list[Contender]:
        """Contenders that start from latents."""
        tolerance = tolerance_of(self.model)
        contenders = []
        if self.transformer is not None:
            for name, cut in ((DIFFUSERS, False), (CUT, True)):
                contenders.append(Contender(name, self._hooked(cut), [self.transformer], tolerance))
        if self.fixed is not self.model:
            dit = _with_vae(self.model, None)
            contenders.append(Contender(OURS, self._ours(dit, "latents"), [dit], tolerance))
        dit = _with_vae(self.fixed, None)
        contenders.append(Contender(FIXED, self._ours(dit, "latents"), [dit], tolerance))
        return [*contenders, Contender(VIT, self.vit, [self.vit], None)]

    def from_pixels(self) -> list[Contender]:
        """Contenders that start from pixels: diffusers with the model's own VAE, ours with several VAEs."""
        config, vae = self.model.config, self.model.vae
        contenders = []
        if self.transformer is not None:
            hooked, tolerance = self._hooked(cut=False), tolerance_of(self.model)
            name = f"{DIFFUSERS}, VAE {dtype_name(vae)}"
            run = lambda pixels: hooked(self.model.encode(pixels))  # noqa: E731
            contenders.append(Contender(name, run, [self.transformer, vae], tolerance))
        fast = copy.deepcopy(vae).to(torch.bfloat16, memory_format=torch.channels_last)
        vaes = {"VAE float32": copy.deepcopy(vae).float(), "VAE bfloat16 channels-last": fast}
        if config.vae_downsampling == 8 and not isinstance(vae, AutoencoderTiny):
            tiny: Any = AutoencoderTiny(latent_channels=config.num_channels)
            vaes["AutoencoderTiny (random weights)"] = tiny.to(self.model.device, self.model.dtype)
        for name, each in vaes.items():
            dit, same = _with_vae(self.fixed, each), type(each) is type(vae)
            tolerance = max(map(tolerance_of, (self.model, vae, each)))
            run = self._ours(dit, "pixel_values")
            contenders.append(Contender(f"{FIXED}, {name}", run, [dit], tolerance if same else None))
        return contenders

    def _ours(self, model: NoisyBackbone, argument: str) -> Callable[[torch.Tensor], torch.Tensor]:
        chosen: dict[str, Any] = {"feature": self.feature, "timestep": self.timestep}
        return lambda batch: model(**{argument: batch}, **chosen).last_hidden_state

    def _hooked(self, cut: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        """Read the feature with a forward hook on diffusers' DiT; `cut` stops the network in the hook."""

        null_class = self.model.config.null_class or 0

        def run(latents: torch.Tensor) -> torch.Tensor:
            found: list[torch.Tensor] = []

            def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
                found.append(output)
                if cut:
                    raise FoundError

            draws = self.model.stored_noise(latents).float()
            noise = draws.expand(-1, len(latents), -1, -1, -1)
            steps = torch.full((len(latents),), self.timestep, device=latents.device)
            noisy = torch.cat([self.scheduler.add_noise(latents.float(), each, steps) for each in noise])
            steps = steps.repeat(len(draws))
            labels = torch.full_like(steps, null_class)
            handle = self.hooked.register_forward_hook(hook)
            try:
                self.transformer(noisy.to(self.transformer.dtype), timestep=steps, class_labels=labels)
            except FoundError:
                pass
            finally:
                handle.remove()
            return found[0] if len(draws) == 1 else found[0].unflatten(0, (len(draws), -1)).mean(dim=0)

        return run


class FoundError(Exception):
    """Raised in a hook to stop the network."""


class PlainViT(nn.Module):
    """transformers' ViT layers on the same tokens: as many whole blocks as the feature needs, and no class token."""

    def __init__(self, config: NoisyBackboneConfig, feature: str) -> None:
        super().__init__()
        block, kind = config.resolve_feature(feature)
        attends = config.feature_kinds.index(kind) > config.feature_kinds.index("value")
        vit = ViTConfig(**config.vit_fields())
        vit._attn_implementation = "sdpa"
        self.num_noise_draws = config.num_noise_draws
        self.patch_embeddings = ViTPatchEmbeddings(vit)
        self.position_embeddings = nn.Parameter(torch.randn(1, config.num_patches, config.feature_width(feature)))
        self.layers = nn.ModuleList(ViTLayer(vit) for _ in range(block + 1 if attends else block))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Return `(batch * draws, tokens, width)`: each noise draw of the DiT counts as another image for the ViT."""
        latents = latents.repeat(self.num_noise_draws, 1, 1, 1).to(self.position_embeddings.dtype)
        hidden_states = self.position_embeddings + self.patch_embeddings(latents)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def checked_feature(config: NoisyBackboneConfig, feature: str | None) -> str:
    """Check the feature to measure, or choose the default (see `benchmark_model`)."""
    middle = f"blocks.{max(0, config.num_hidden_layers // 2 - 1)}.hidden"
    default = str(config.feature) if config.fixed_timestep else middle
    name = config.resolve_feature(feature or default)
    if config.fixed_timestep and str(name) not in config.list_features():
        raise config.fixed_error(f"feature {feature!r}")
    if not config.fixed_timestep and name.kind not in HOOKED:
        raise ValueError(f"feature must be of a kind that a hook can read ({', '.join(HOOKED)}), got {feature!r}")
    return str(name)


def _with_vae(model: NoisyBackbone, vae: Any) -> NoisyBackbone:
    """A copy of a model that shares all weights but has another VAE (`None`: no VAE)."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.config = copy.deepcopy(model.config)
    if vae is None:
        twin.vae = None
    else:
        set_vae(twin, vae, decoder=False)
    return twin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def tolerance_of(model: Any) -> float:
    """Largest accepted relative difference of a feature of this model from a peer's."""
    rounded = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    tf32 = model.dtype == torch.float32 and model.device.type == "cuda" and rounded
    return TF32_TOLERANCE if tf32 else TOLERANCES[model.dtype]


def dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
