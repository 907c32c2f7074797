"""The autoencoder in a checkpoint, between pixels and what the network sees."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .configuration_noisy_backbone import VAE_PACKED, NoisyBackboneConfig
from .finite import check_finite


def build_vae(config: NoisyBackboneConfig) -> Any:
    """The autoencoder of `config`, with its decoder only if that is kept; `None` in pixel space."""
    if config.vae_config is None:
        return None
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("this checkpoint carries a VAE, which needs diffusers: pip install diffusers") from error
    vae: Any = getattr(diffusers, config.vae_config.get("_class_name", "AutoencoderKL")).from_config(config.vae_config)
    if not config.vae_decoder:
        drop_decoder(vae)
    return vae


def drop_decoder(vae: Any) -> None:
    """Leave an autoencoder's decoder out; that of films counts the layers of what stands in its place."""
    vae.decoder = torch.nn.Identity()
    if hasattr(vae, "post_quant_conv"):
        vae.post_quant_conv = None


class VaeMixin:
    """Methods of a model with a `vae` (`None` in pixel space) and a `config`."""

    vae: Any
    config: Any

    @property
    def has_posterior(self) -> bool:
        """Whether the autoencoder gives a distribution of latents, and not only one value of each."""
        return type(self.vae).__name__.startswith("AutoencoderKL")

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] to what the network sees: the VAE's posterior mean, shifted and scaled, or the pixels."""
        return self.encode_posterior(pixel_values)[0]

    def encode_posterior(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and log-variance of the VAE's posterior over what the network sees, of the shifted and scaled latents.

        The VAE may have a dtype and memory format of its own: `model.base_model.vae.to(torch.bfloat16,
        memory_format=torch.channels_last)` encodes faster and nearly as well.

        Args:
            pixel_values: `(batch, channels, height, width)` in [-1, 1].

        Returns:
            Two `(batch, num_channels, height, width)`, float32 for a VAE of any precision. The second is `None` if
            nothing is random: in pixel space, and with an `AutoencoderTiny` or `AutoencoderDC`.

        Raises:
            ValueError: wrong channels or size, NaN, or the VAE overflows.
        """
        self._check_input(pixel_values, "pixel_values", self.config.image_channels, self.config.vae_downsampling)
        if self.vae is None:
            return pixel_values, None
        mean, log_variance = self._posterior(pixel_values.to(self.vae.dtype))
        check_finite(
            [mean] if log_variance is None else [mean, log_variance],
            "the VAE gives NaN or infinite latents",
            next(self.vae.parameters()),
            ", or the VAE alone in float32: model.vae.float()",
        )
        shift, scale = self._latent_scale(mean.device)
        mean = (self._packed(mean.float()) - shift) * scale
        return mean, None if log_variance is None else self._packed(log_variance.float()) + 2 * scale.abs().log()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents back to pixels in [-1, 1]; needs a checkpoint that kept its decoder (`config.vae_decoder`)."""
        if self.vae is None:
            return latents
        if not self.config.vae_decoder:
            raise ValueError("this checkpoint keeps only the VAE's encoder; convert it with vae_decoder=True to decode")
        shift, scale = self._latent_scale(latents.device)
        side = VAE_PACKED.get(type(self.vae).__name__, 1)
        unpacked = F.pixel_shuffle(latents / scale + shift, side)
        unpacked = unpacked.to(self.vae.dtype)
        if self._films:
            return self.vae.decode(unpacked[:, :, None]).sample[:, :, 0]
        return self.vae.decode(unpacked).sample

    def _posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The autoencoder's own mean and log-variance; the latter is `None` if it has no posterior.

        An autoencoder of films keeps the frames before in one place, which threads cannot share. A film of one frame
        has none before, so that its encoder is called without them.
        """
        if self._films:
            both = self.vae.quant_conv(self.vae.encoder(pixels[:, :, None]))[:, :, 0]
            mean, log_variance = both.chunk(2, dim=1)
            return mean, log_variance.clamp(-30, 20)  # as diffusers does
        encoded = self.vae.encode(pixels)
        posterior = getattr(encoded, "latent_dist", None)
        if posterior is None:
            return next(iter(encoded.values())), None
        return posterior.mean, posterior.logvar

    @property
    def _films(self) -> bool:
        """Whether the autoencoder is one of films; an image is a film of one frame."""
        return type(self.vae).__name__ == "AutoencoderKLQwenImage"

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents with squares of them as channels, where the autoencoder's pipeline packs them."""
        return F.pixel_unshuffle(latents, VAE_PACKED.get(type(self.vae).__name__, 1))

    def _latent_scale(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """What is subtracted from the autoencoder's latents, and what the rest is multiplied by, float32."""
        if (norm := getattr(self.vae, "bn", None)) is not None:
            mean, variance = (x.float().to(device)[:, None, None] for x in (norm.running_mean, norm.running_var))
            return mean, (variance + self.vae.config.batch_norm_eps).rsqrt()
        config = self.vae.config
        if self._films:
            mean, deviation = (
                torch.tensor(config[name], device=device)[:, None, None] for name in ("latents_mean", "latents_std")
            )
            return mean, 1 / deviation
        return torch.tensor(config.get("shift_factor") or 0.0), torch.tensor(float(config.scaling_factor))

    def prepare_latents(
        self, pixel_values: torch.Tensor | None = None, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Check one of the two inputs and return what the network sees."""
        if (pixel_values is None) == (latents is None):
            raise ValueError("give exactly one of pixel_values and latents")
        if pixel_values is not None:
            return self.encode(pixel_values)
        assert latents is not None
        self._check_input(latents, "latents", self.config.num_channels)
        return latents

    def _check_input(self, images: torch.Tensor, name: str, channels: int, downsampling: int = 1) -> None:
        multiple = self.config.patch_side * downsampling
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"{name} must be (batch, {channels}, height, width), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"{name} must be floats, got {images.dtype}: convert 8-bit pixels by x / 127.5 - 1")
        if images.shape[-2] % multiple or images.shape[-1] % multiple:
            raise ValueError(f"{name} height and width must be multiples of {multiple}, got {tuple(images.shape[-2:])}")
        if not torch.compiler.is_compiling() and not torch.isfinite(images).all():
            raise ValueError(f"{name} holds NaN or infinite values")


__all__ = ["VaeMixin", "build_vae", "drop_decoder"]
