"""Runs of a diffusion network of any family: stored noise, timesteps, and checks of inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from .configuration_noisy_backbone import NoisyBackboneConfig
from .finite import all_finite, is_checked, overflow_error
from .fixing import check_request
from .noise_schedule import NoiseSchedule
from .noisy_pretrained import NoisyPreTrainedModel
from .vae import VaeMixin, build_vae

logger = logging.get_logger(__name__)

Features = dict[str, torch.Tensor]


class NoisyNetwork(NoisyPreTrainedModel, VaeMixin):
    """A diffusion network, its VAE, and the noise with which features are read."""

    evaluation_noise: torch.Tensor

    def __init__(self, config: NoisyBackboneConfig) -> None:
        super().__init__(config)
        self.noise_schedule = NoiseSchedule.from_dict(config.noise_schedule or {})
        self.vae = build_vae(config)
        if not config.fixed_timestep:
            device = torch.empty(0).device  # of the context, possibly "meta"
            self.register_buffer("evaluation_noise", self.compute_noise().to(device))

    def run(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor | None,
        class_labels: torch.Tensor | None,
        names: Sequence[str],
        *,
        predict: bool = False,
        whole: bool = False,
        **kwargs: Any,
    ) -> tuple[Features, torch.Tensor | None]:
        """Run the network once, up to the deepest requested feature.

        Args:
            inputs: `(batch, num_channels, height, width)`, noisy; with a fixed timestep, clean.
            timesteps: `(batch,)` training indices; `None` with a fixed timestep.
            class_labels: `(batch,)`, checked; `None` for the null class.
            names: of features.
            predict: also return the prediction; the output of the last block must then be among `names`.
            whole: run every block, so that transformers can record all of them.
            kwargs: of transformers' attention functions.

        Returns:
            `(batch, tokens, width)` by name, and with `predict` `(batch, channels, height, width)`, the first
            `num_channels` of which are the prediction. With a fixed timestep, `batch` is `draws * batch`.
        """
        raise NotImplementedError

    def resolve_timestep(self, timestep: int | None) -> int:
        """`timestep` checked, or the default one."""
        return self.default_timestep if timestep is None else self.noise_schedule.check_timestep(timestep)

    @property
    def default_timestep(self) -> int:
        """`config.timestep` or, if none has been selected, a tenth of the schedule, with a warning."""
        if self.config.timestep is not None:
            return self.config.timestep
        timestep = self.noise_schedule.num_train_timesteps // 10
        logger.warning_once(
            f"No timestep has been selected for this model: using t={timestep}, a tenth of its noise schedule. "
            "Choose one with aselect_hf.select_timestep(...).apply(model)."
        )
        return timestep

    def grid_size(self, latents: torch.Tensor) -> tuple[int, int]:
        """Height and width of the patch grid of what the network sees."""
        return latents.shape[-2] // self.config.patch_side, latents.shape[-1] // self.config.patch_side

    def compute_noise(self, size: tuple[int, int] | None = None) -> torch.Tensor:
        """The evaluation noise `(draws, channels, height, width)` of `config.noise_seed` for inputs of this size.

        It is standard normal, and the same on every machine, since a separate CPU generator draws it. The default size
        is the trained one.
        """
        config = self.config
        height, width = size or (config.sample_size, config.sample_size)
        generator = torch.Generator().manual_seed(config.noise_seed)
        shape = (config.num_noise_draws, config.num_channels, height, width)
        return torch.randn(shape, generator=generator, device="cpu")

    def stored_noise(self, latents: torch.Tensor) -> torch.Tensor:
        """`(draws, 1, channels, height, width)`; for another resolution, drawn for it from the same seed."""
        if self.config.fixed_timestep:
            raise self.config.fixed_error("stored noise")
        size = (latents.shape[-2], latents.shape[-1])
        noise = self.evaluation_noise
        if noise.shape[-2:] != size:
            noise = self.compute_noise(size).to(latents.device)
        return noise[:, None]

    def _features_at(
        self,
        latents: torch.Tensor,
        names: Sequence[str],
        timestep: int,
        noise: torch.Tensor | None,
        class_labels: torch.Tensor | None,
        **kwargs: Any,
    ) -> Features:
        """Features `(batch, tokens, width)` at one timestep, averaged over the stored noise draws."""
        if self.config.fixed_timestep:
            check_request(self.config, latents, names, timestep, noise, class_labels)
            features, _ = self._checked_run(latents, None, None, names, **kwargs)
            return _mean_of_draws(features, self.config.num_noise_draws)
        if class_labels is not None:
            self._check_labels(class_labels, latents.shape[0])
        # (draws, 1, channels, height, width), or for given noise (1, batch, channels, height, width)
        draws = self.stored_noise(latents) if noise is None else noise.to(latents).expand_as(latents)[None]
        num_draws = self.config.num_noise_draws if noise is None else 1
        noisy = self.noise_schedule.add_noise(latents[None].float(), draws.float(), timestep).flatten(0, 1)
        steps = torch.full((noisy.shape[0],), timestep, device=noisy.device)  # (draws * batch,)
        labels = None if class_labels is None else class_labels.repeat(num_draws)
        features, _ = self._checked_run(noisy, steps, labels, names, **kwargs)
        return _mean_of_draws(features, num_draws)

    def _run_noisy(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
        names: Sequence[str],
        **kwargs: Any,
    ) -> tuple[Features, torch.Tensor | None]:
        """`run` for inputs that are already noisy."""
        self._check_input(noisy_latents, "noisy_latents", self.config.num_channels)
        if self.config.fixed_timestep:
            raise self.config.fixed_error("denoising, or reading features of noisy inputs,")
        if class_labels is not None:
            self._check_labels(class_labels, noisy_latents.shape[0])
        return self._checked_run(noisy_latents, timesteps, class_labels, names, **kwargs)

    def _checked_run(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor | None,
        class_labels: torch.Tensor | None,
        names: Sequence[str],
        **kwargs: Any,
    ) -> tuple[Features, torch.Tensor | None]:
        """`run`, with a check that features are finite, unless in training, where the loss shows it."""
        features, prediction = self.run(inputs, timesteps, class_labels, names, **kwargs)
        features = {name: self._without_discarded(name, tokens) for name, tokens in features.items()}
        if self.training or not is_checked() or all_finite(features.values()):
            return features, prediction
        finite = torch.stack([x.isfinite().flatten(1).all(dim=1) for x in features.values()]).all(dim=0)
        first = finite.int().argmin()[None] % inputs.shape[0]
        step, label = (None if x is None else x[first] for x in (timesteps, class_labels))
        part = self.first_overflow(inputs[first], step, label, names)
        raise overflow_error(f"{part} gives NaN or infinite values", self._weight)

    def _without_discarded(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """A feature with the channels of `config.channel_discard` set to 0."""
        discarded = self.config.channel_discard
        channels = discarded.get(str(self.config.resolve_feature(name))) if discarded else None
        if not channels:
            return tokens
        return tokens.index_fill(-1, torch.tensor(channels, device=tokens.device), 0.0)

    def first_overflow(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor | None,
        class_labels: torch.Tensor | None,
        names: Sequence[str],
    ) -> str:
        """The first part of the network with values that are not finite, in a run of one sample."""
        deepest = max(self.config.resolve_feature(name).block for name in names)
        outputs = [f"blocks.{block}.{self.config.feature_kinds[-1]}" for block in range(deepest)]
        found = self.run(inputs, timesteps, class_labels, outputs)[0] if outputs else {}
        broken = (block for block, output in enumerate(found.values()) if not all_finite([output]))
        return f"blocks.{next(broken, deepest)}"

    def _check_labels(self, class_labels: torch.Tensor, batch_size: int) -> None:
        null_class = self.config.null_class
        if null_class is None:
            raise ValueError("class_labels: this network was not conditioned on classes; leave them out")
        if class_labels.shape != (batch_size,) or not (
            torch.compiler.is_compiling() or 0 <= class_labels.min() <= class_labels.max() <= null_class
        ):
            raise ValueError(
                f"class_labels must be {batch_size} integers in 0..{null_class} ({null_class}: no class), "
                f"got {class_labels.tolist()}"
            )

    @property
    def _weight(self) -> torch.Tensor:
        """A weight of the network, not of the VAE, in the precision of the computation."""
        return next(weight for name, weight in self.named_parameters() if not name.startswith("vae."))


def _mean_of_draws(features: Features, draws: int) -> Features:
    """`(draws * batch, tokens, width)` to `(batch, tokens, width)`."""
    if draws == 1:
        return features
    return {name: x.view(draws, x.shape[0] // draws, *x.shape[1:]).mean(dim=0) for name, x in features.items()}


__all__ = ["NoisyNetwork"]
