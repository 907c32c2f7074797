"""What backbones of all families and the models around them share: how they are loaded and saved."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_noisy_backbone import NoisyBackboneConfig

READERS: dict[str, Callable[..., Any]] = {}
"""Readers of other libraries' checkpoints by library. The package registers them, a saved folder does not."""


@contextlib.contextmanager
def readable_by_torchao(quantizer: Any) -> Iterator[None]:
    """Keep names without a dot out of the metadata that `quantizer` saves.

    torchao 0.18 splits every name there at its last dot. It fails at `position_embedding` and `evaluation_noise`, which
    transformers loads without it.
    """
    describe = quantizer.get_state_dict_and_metadata

    def describe_dotted(model: nn.Module) -> tuple[Any, dict[str, str]]:
        state, metadata = describe(model)
        if "tensor_names" in metadata:
            names = json.loads(metadata["tensor_names"])
            metadata["tensor_names"] = json.dumps([name for name in names if "." in name])
        return state, metadata

    quantizer.get_state_dict_and_metadata = describe_dotted
    try:
        yield
    finally:
        del quantizer.get_state_dict_and_metadata


class NoisyPreTrainedModel(PreTrainedModel):
    """A `NoisyBackbone`, or a model with one as its `base_model`."""

    config: NoisyBackboneConfig
    config_class = NoisyBackboneConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    license_files: Mapping[str, bytes] = MappingProxyType({})
    """Files with the license of the base model and its notices, by name; `save_pretrained` writes them."""

    @classmethod
    def from_pretrained(
        cls, *args: Any, noise_seed: int | None = None, num_noise_draws: int | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers. A `noise_seed` or `num_noise_draws` replaces the stored noise."""
        loaded = super().from_pretrained(*args, **kwargs)
        if noise_seed is not None or num_noise_draws is not None:
            model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
            backbone = model.base_model
            if backbone.config.fixed_timestep:
                raise backbone.config.fixed_error("another noise_seed or num_noise_draws")
            for config in (model.config, backbone.config):
                config.noise_seed = config.noise_seed if noise_seed is None else noise_seed
                config.num_noise_draws = num_noise_draws or config.num_noise_draws
            backbone.evaluation_noise = backbone.compute_noise().to(backbone.evaluation_noise)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        quantizer = getattr(self, "hf_quantizer", None)
        with contextlib.nullcontext() if quantizer is None else readable_by_torchao(quantizer):
            super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.write_license(save_directory)

    def write_license(self, folder: Any) -> None:
        """Write `license_files` to a folder, which exists."""
        for name, content in self.license_files.items():
            Path(folder, name).write_bytes(content)

    @classmethod
    def from_diffusers(cls, source: Any, **kwargs: Any) -> Any:
        """Convert a network of diffusers to a model of this class.

        Args:
            source: a pipeline or transformer, as a folder, a Hub id, or an object.
            kwargs: see `aselect_hf.from_diffusers`: `vae`, `vae_decoder`, `scheduler`; `token`, `revision`,
                `cache_dir`, `local_files_only`, `force_download`, `subfolder`, `variant`, `dtype`, `allow_pickle`; and
                fields of the config. Anything else is a `TypeError`.

        Raises:
            ImportError: this class is from the code of a saved folder, not from the package.
        """
        if "diffusers" not in READERS:
            raise ImportError(
                "from_diffusers needs the whole package: pip install aselect-hf, and call it on the package's class"
            )
        return READERS["diffusers"](source, model_class=cls, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(getattr(module, "evaluation_noise", None), torch.Tensor):
            init.copy_(module.evaluation_noise, module.compute_noise())  # type: ignore[arg-type, operator]


__all__ = ["NoisyPreTrainedModel"]
