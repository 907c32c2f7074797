"""A Diffusion Transformer (Peebles & Xie 2023) whose hidden features are its first output.

The blocks are the published ones (adaLN-Zero), written so that every intermediate has a name (`features.py`), a run
stops at the deepest feature asked for, and the network still denoises exactly like the checkpoint it came from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks import (
    MAX_PERIOD,
    ASelectDiTBlock,
    ASelectDiTConditionEmbedding,
    ASelectDiTFinalLayer,
    ASelectDiTLayer,
    ASelectDiTSelfAttention,
    ConditionLinear,
    ZeroLinear,
)
from .configuration_aselect_dit import ASelectDiTConfig
from .features import FEATURE_KINDS, FeatureName, parse_feature, tokens_to_map
from .fixed_timestep import ASelectDiTFixedLayer, check_request, fixed_config, fixed_layers, fold
from .noise_schedule import NoiseSchedule

try:
    import diffusers
except ImportError:
    diffusers = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)


def sincos_positions(hidden_size: int, grid_size: tuple[int, int], trained_grid_size: tuple[int, int]) -> torch.Tensor:
    """`(1, height * width, hidden_size)` 2-D sin-cos positions; another grid spans the trained one's coordinates."""

    def encode(positions: torch.Tensor) -> torch.Tensor:
        channels = hidden_size // 4
        frequencies = 1.0 / MAX_PERIOD ** (torch.arange(channels, dtype=torch.float64, device="cpu") / channels)
        angles = torch.outer(positions, frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    rows, columns = (
        torch.arange(size, dtype=torch.float64, device="cpu") * (trained / size)
        for size, trained in zip(grid_size, trained_grid_size, strict=True)
    )
    vertical = encode(rows)[:, None].expand(-1, len(columns), -1)
    horizontal = encode(columns)[None].expand(len(rows), -1, -1)
    return torch.cat([horizontal, vertical], dim=-1).flatten(0, 1)[None].float()


def seeded_noise(seed: int, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise that is the same on every machine: drawn on the CPU from its own generator."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), device="cpu")


class ASelectDiTPreTrainedModel(PreTrainedModel):
    config: ASelectDiTConfig
    config_class = ASelectDiTConfig
    base_model_prefix = "dit"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["ASelectDiTLayer", "ASelectDiTFixedLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ASelectDiTBlock,
        "attentions": ASelectDiTSelfAttention,
    }
    _input_embed_layer = "patch_embedding"

    @classmethod
    def from_pretrained(
        cls, *args: Any, noise_seed: int | None = None, num_noise_draws: int | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers; a `noise_seed` or `num_noise_draws` given here replaces the stored noise."""
        loaded = super().from_pretrained(*args, **kwargs)
        if noise_seed is not None or num_noise_draws is not None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            dit: Any = getattr(model, cls.base_model_prefix, model)
            if dit.config.fixed_timestep:
                raise dit.config.fixed_error("another noise_seed or num_noise_draws")
            for config in (model.config, dit.config):
                config.noise_seed = config.noise_seed if noise_seed is None else noise_seed
                config.num_noise_draws = num_noise_draws or config.num_noise_draws
            dit.evaluation_noise = dit.compute_noise((dit.config.sample_size,) * 2).to(dit.evaluation_noise)
        return loaded

    @classmethod
    def from_diffusers(cls, source: str, **kwargs: Any) -> Any:
        """Convert a diffusers DiT: a pipeline folder, a transformer folder or a Hub id; see `convert_checkpoint`."""
        try:
            from aselect_hf.conversion import load_diffusers
        except ImportError as error:
            raise ImportError("from_diffusers needs the whole package: pip install aselect-hf") from error
        return load_diffusers(source, model_class=cls, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """DiT's initialisation (adaLN-Zero: every block starts as the identity), and the derived buffers."""
        super()._init_weights(module)
        # Every Linear decides for itself: transformers never calls this on custom modules that own no parameter.
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, ConditionLinear):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, ASelectDiTModel):
            init.copy_(module.position_embedding, module.compute_positions(self.config.grid_size))
            if not self.config.fixed_timestep:
                init.copy_(module.evaluation_noise, module.compute_noise((self.config.sample_size,) * 2))
        elif isinstance(module, ASelectDiTFixedLayer):
            for gate in (module.attention_gate, module.mlp_gate):
                if gate is not None:
                    init.ones_(gate)


def average_draws(forward: Callable) -> Callable:
    """Average recorded hidden states and attentions over the noise draws, as the features are."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        output = forward(self, *args, **kwargs, return_dict=True)
        batch = max(1, len(output.last_hidden_state))
        for name in ("hidden_states", "attentions"):
            if output.get(name):
                output[name] = tuple(
                    x.unflatten(0, (-1, batch)).mean(dim=0) if x is not None and len(x) > batch else x
                    for x in output[name]
                )
        return output

    return wrapper


class ASelectDiTModel(ASelectDiTPreTrainedModel):
    """A pretrained DiT as a vision backbone: the chosen feature at the chosen timestep, in one run."""

    vae: Any
    position_embedding: torch.Tensor
    evaluation_noise: torch.Tensor

    def __init__(self, config: ASelectDiTConfig) -> None:
        super().__init__(config)
        self.noise_schedule = NoiseSchedule.from_dict(config.noise_schedule or {})
        self.vae = self._build_vae(config) if config.vae_config is not None else None
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=not config.fixed_timestep,
        )
        if config.fixed_timestep:
            config.check_fixed()  # again: `from_pretrained` changes fields after the config has checked them
            tables = torch.zeros(config.num_noise_draws, config.num_patches, config.hidden_size)
            self.position_embedding = nn.Parameter(tables)
            self.layers = fixed_layers(config)
        else:
            self._build_denoiser(config)
        self.post_init()

    def _build_denoiser(self, config: ASelectDiTConfig) -> None:
        """What a fixed timestep makes constant, and the blocks that read it."""
        device = self.patch_embedding.weight.device
        self.register_buffer("position_embedding", self.compute_positions(config.grid_size).to(device))
        self.register_buffer("evaluation_noise", self.compute_noise((config.sample_size,) * 2).to(device))
        embedders = config.num_hidden_layers if config.per_block_conditioning else 1
        self.condition_embeddings = nn.ModuleList(ASelectDiTConditionEmbedding(config) for _ in range(embedders))
        self.layers = nn.ModuleList(ASelectDiTLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer = ASelectDiTFinalLayer(config)

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
            timestep: on the axis of `NoiseSchedule`; default `config.timestep`.
            feature: `blocks.<i>.<kind>`; default `config.feature`. Several are concatenated along the width.
            noise: standard normal, broadcastable to the latents; default the stored evaluation noise, averaged over.
            class_labels: `(batch,)`; default the null class.

        Returns:
            `last_hidden_state` `(batch, tokens, width)`: the feature; `pooler_output` `(batch, width)`: its token mean.
            With `output_hidden_states` or `output_attentions` all blocks are run and returned.

        Raises:
            ValueError: wrong channels or size, NaN, unknown feature, timestep out of range; anything but the defaults
                of a model that is fixed to them, see `fix_timestep`.
        """
        names = [feature or str(self.config.feature)] if feature is None or isinstance(feature, str) else list(feature)
        if not names:
            raise ValueError("feature must be a name or a non-empty list of names")
        timestep = self.resolve_timestep(timestep)
        flags = ("output_hidden_states", "output_attentions")
        whole = any(kwargs.get(flag, getattr(self.config, flag, False)) for flag in flags)
        latents = self.prepare_latents(pixel_values, latents)
        features = self._features_at(
            latents, names, timestep, noise, class_labels, min_depth=self.config.num_hidden_layers * whole, **kwargs
        )
        tokens = torch.cat([features[name] for name in names], dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(dim=1))

    @torch.no_grad()
    def extract_features(
        self,
        pixel_values: torch.Tensor | None = None,
        *,
        latents: torch.Tensor | None = None,
        features: Sequence[str] | None = None,
        timesteps: Sequence[int] | None = None,
        noise: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        output_format: Literal["tokens", "map", "pooled"] = "tokens",
    ) -> dict[str, torch.Tensor]:
        """Any features at any timesteps, each timestep one run up to the deepest block asked for. No gradients.

        Args:
            pixel_values, latents, noise, class_labels: as in `forward`.
            features: names; default `[config.feature]`.
            timesteps: default `[config.timestep]`.
            output_format: `"tokens"` `(batch, timesteps, tokens, width)`, `"map"` `(batch, timesteps, channels, height,
                width)` of the patch grid, or `"pooled"` (token mean) `(batch, timesteps, width)`.

        Returns:
            Features by the names they were asked for, timesteps in the order asked.
        """
        if output_format not in ("tokens", "map", "pooled"):
            raise ValueError(f"output_format must be 'tokens', 'map' or 'pooled', got {output_format!r}")
        names = [str(self.config.feature)] if features is None else list(features)
        if isinstance(features, str) or not names:
            raise ValueError(f"features must be a non-empty list of names, got {features!r}")
        steps = (
            [self.default_timestep] if timesteps is None else [self.noise_schedule.check_timestep(t) for t in timesteps]
        )
        if not steps:
            raise ValueError("timesteps must not be empty")
        latents = self.prepare_latents(pixel_values, latents)
        grid_size = self.grid_size(latents)
        runs = []
        for step in steps:
            run = self._features_at(latents, names, step, noise, class_labels)
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
    ) -> dict[str, torch.Tensor]:
        """Features of inputs that are noisy already, each sample at its own timestep, in one run.

        Args:
            noisy_latents: `(batch, num_channels, height, width)`, see `noise_schedule.add_noise`.
            timesteps: `(batch,)`.

        Returns:
            `(batch, tokens, width)` by name.
        """
        self._check_input(noisy_latents, "noisy_latents")
        return self._run_blocks(noisy_latents, timesteps, class_labels, features)[0]

    def denoise(
        self,
        noisy_latents: torch.Tensor,
        timestep: int | torch.Tensor,
        class_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The diffusion model itself: its prediction (see `noise_schedule.prediction_type`), learned sigma cut off.

        Args:
            noisy_latents: `(batch, num_channels, height, width)`, not noised any further.
            timestep: one for all, or `(batch,)`.
            class_labels: `(batch,)`; default the null class.

        Returns:
            `(batch, num_channels, height, width)`.
        """
        self._check_input(noisy_latents, "noisy_latents")
        if not isinstance(timestep, torch.Tensor):
            timestep = self.noise_schedule.check_timestep(timestep)
        timestep = torch.as_tensor(timestep, device=noisy_latents.device).expand(len(noisy_latents))
        return self._predict(noisy_latents, timestep, class_labels, **kwargs)[:, : self.config.num_channels]

    def denoise_with_features(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        features: Sequence[str],
        class_labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`denoise` and `features_of_noisy` of the same run: a joint loss costs no extra pass.

        Args:
            timesteps: `(batch,)`.

        Returns:
            The prediction `(batch, num_channels, height, width)`, and `(batch, tokens, width)` by name.
        """
        self._check_input(noisy_latents, "noisy_latents")
        last = "blocks.-1.hidden"
        found, conditioning = self._run_blocks(noisy_latents, timesteps, class_labels, [*features, last])
        prediction = self._project(found[last], conditioning, self.grid_size(noisy_latents))
        return prediction[:, : self.config.num_channels], {name: found[name] for name in features}

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] to what the DiT sees: the VAE's posterior mean, shifted and scaled, or the pixels."""
        return self.encode_posterior(pixel_values)[0]

    def encode_posterior(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and log-variance of the VAE's posterior over what the DiT sees, both of the shifted and scaled latents.

        Args:
            pixel_values: `(batch, channels, height, width)` in [-1, 1].

        Returns:
            Two `(batch, num_channels, height, width)`; `None` for the second where nothing is random: in pixel space
            and with an `AutoencoderTiny`.

        Raises:
            ValueError: wrong channels or size, NaN.
        """
        channels = self.config.num_channels if self.vae is None else self.vae.config.in_channels
        self._check_input(pixel_values, "pixel_values", channels, self.config.vae_downsampling)
        if self.vae is None:
            return pixel_values, None
        shift, scale = self.vae.config.get("shift_factor") or 0.0, self.vae.config.scaling_factor
        encoded = self.vae.encode(pixel_values.to(self.vae.dtype))
        if hasattr(encoded, "latents"):
            return (encoded.latents - shift) * scale, None
        posterior = encoded.latent_dist
        return (posterior.mean - shift) * scale, posterior.logvar + 2 * math.log(abs(scale))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents back to pixels in [-1, 1]; needs a checkpoint that kept its decoder (`config.vae_decoder`)."""
        if self.vae is None:
            return latents
        if not self.config.vae_decoder:
            raise ValueError("this checkpoint keeps only the VAE's encoder; convert it with vae_decoder=True to decode")
        shift = self.vae.config.get("shift_factor") or 0.0
        return self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor + shift).sample

    def prepare_latents(
        self, pixel_values: torch.Tensor | None = None, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Check one of the two inputs and return what the DiT sees."""
        if (pixel_values is None) == (latents is None):
            raise ValueError("give exactly one of pixel_values and latents")
        if pixel_values is not None:
            return self.encode(pixel_values)
        assert latents is not None
        self._check_input(latents, "latents")
        return latents

    def fix_timestep(
        self, timestep: int | None = None, feature: str | Sequence[str] | None = None, class_label: int | None = None
    ) -> ASelectDiTModel:
        """The same model for one timestep and feature only: a plain ViT on latents, smaller and faster.

        The timestep, the class and the stored noise are folded into the weights, and what the feature does not depend
        on is left out (see `fixed_timestep.py`). The result is a checkpoint like any other (same classes, pipelines,
        heads, ONNX export) that cannot denoise, and refuses other timesteps, features, classes, noises and resolutions.

        Args:
            timestep: default `config.timestep`.
            feature: one or several names to keep; default `config.feature`.
            class_label: class it is conditioned on; default the null class.

        Returns:
            A new model; this one is unchanged.

        Raises:
            ValueError: no such timestep, feature or class, or the model is fixed already.
        """
        names = [feature or str(self.config.feature)] if feature is None or isinstance(feature, str) else feature
        return fold(self, fixed_config(self.config, self.resolve_timestep(timestep), names, class_label))

    def resolve_timestep(self, timestep: int | None) -> int:
        """`timestep` checked, or the default one."""
        return self.default_timestep if timestep is None else self.noise_schedule.check_timestep(timestep)

    @property
    def default_timestep(self) -> int:
        """`config.timestep`, or a tenth of the schedule (with a warning) where none has been selected."""
        if self.config.timestep is not None:
            return self.config.timestep
        timestep = self.noise_schedule.num_train_timesteps // 10
        logger.warning_once(
            f"No timestep has been selected for this model: using t={timestep}, a tenth of its noise schedule. "
            "Choose one with aselect_hf.select_timestep(...).apply(model)."
        )
        return timestep

    def compute_positions(self, grid_size: tuple[int, int]) -> torch.Tensor:
        return sincos_positions(self.config.hidden_size, grid_size, self.config.grid_size)

    def compute_noise(self, size: tuple[int, int]) -> torch.Tensor:
        """The evaluation noise `(draws, channels, height, width)` of `config.noise_seed` for inputs of this size."""
        return seeded_noise(self.config.noise_seed, (self.config.num_noise_draws, self.config.num_channels, *size))

    def _features_at(
        self,
        latents: torch.Tensor,
        names: Sequence[str],
        timestep: int,
        noise: torch.Tensor | None,
        class_labels: torch.Tensor | None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Features `(batch, tokens, width)` at one timestep, averaged over the stored noise draws."""
        if self.config.fixed_timestep:
            check_request(self.config, latents, names, timestep, noise, class_labels)
            return self._fixed_features(latents, names, **kwargs)
        draws = self.stored_noise(latents) if noise is None else noise.to(latents).expand_as(latents)[None]
        noisy = self.noise_schedule.add_noise(latents[None].float(), draws.float(), timestep).flatten(0, 1)
        if class_labels is not None:
            self._check_labels(class_labels, len(latents))
            class_labels = class_labels.repeat(len(draws))
        steps = torch.full((len(noisy),), timestep, device=noisy.device)
        features, _ = self._run_blocks(noisy, steps, class_labels, names, **kwargs)
        return self._average(features, len(draws))

    def _fixed_features(
        self, latents: torch.Tensor, names: Sequence[str], min_depth: int = 0, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """`_features_at` of a fixed model: noise and positions are one table per draw; `min_depth` runs all of it."""
        hidden_states = (self._patches(latents)[None] + self.position_embedding[:, None]).flatten(0, 1)
        kept = (self.config.fixed_to or {})["features"] if min_depth else []
        features = self._read_blocks(hidden_states, [None], [*names, *kept], **kwargs)
        return self._average({name: features[name] for name in names}, len(self.position_embedding))

    @staticmethod
    def _average(features: dict[str, torch.Tensor], draws: int) -> dict[str, torch.Tensor]:
        if draws == 1:
            return features
        return {name: x.unflatten(0, (draws, -1)).mean(dim=0) for name, x in features.items()}

    def _run_blocks(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor | None,
        names: Sequence[str],
        min_depth: int = 0,
        **kwargs: Any,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Features of noisy latents, and the (first) conditioning vector; `min_depth` as in `_read_blocks`."""
        if self.config.fixed_timestep:
            raise self.config.fixed_error("denoising, or features of inputs that are noisy already,")
        conditions = self._conditions(timesteps, class_labels, len(noisy_latents))
        return self._read_blocks(self._embed(noisy_latents), conditions, names, min_depth, **kwargs), conditions[0]

    def _read_blocks(
        self,
        hidden_states: torch.Tensor,
        conditions: Sequence[torch.Tensor | None],
        names: Sequence[str],
        min_depth: int = 0,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Run blocks up to the deepest name asked for; `min_depth` whole blocks at least."""
        resolved = {name: parse_feature(name, self.config.num_hidden_layers) for name in names}
        wanted: dict[int, set[str]] = {}
        for block, kind in resolved.values():
            wanted.setdefault(block, set()).add(kind)
        last = max(wanted)
        features: dict[FeatureName, torch.Tensor] = {}
        for index, layer in enumerate(self.layers[: max(last + 1, min_depth)]):
            kinds = wanted.get(index, set())
            if index < last or index < min_depth:
                kinds = kinds | {"hidden"}
            hidden_states, *others = layer(hidden_states, conditions[index % len(conditions)], kinds=kinds, **kwargs)
            recorded = dict(zip(sorted(kinds - {"hidden"}, key=FEATURE_KINDS.index), others, strict=True))
            recorded["hidden"] = hidden_states
            features |= {FeatureName(index, kind): recorded[kind] for kind in wanted.get(index, ())}
        return {name: features[feature] for name, feature in resolved.items()}

    def _predict(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        """The network's whole output, learned sigma included."""
        name = "blocks.-1.hidden"
        features, conditioning = self._run_blocks(noisy_latents, timesteps, class_labels, [name], **kwargs)
        return self._project(features[name], conditioning, self.grid_size(noisy_latents))

    def _project(
        self, hidden_states: torch.Tensor, conditioning: torch.Tensor, grid_size: tuple[int, int]
    ) -> torch.Tensor:
        """The last block's tokens to the network's output, `(batch, channels, height, width)`."""
        patches = self.final_layer(hidden_states, conditioning)
        side = self.config.patch_size
        patches = patches.unflatten(-1, (side, side, -1)).unflatten(1, grid_size)
        return torch.einsum("bhwpqc->bchpwq", patches).flatten(4, 5).flatten(2, 3)

    def _conditions(
        self, timesteps: torch.Tensor, class_labels: torch.Tensor | None, batch_size: int
    ) -> list[torch.Tensor]:
        if class_labels is None:
            class_labels = torch.full((batch_size,), self.config.num_condition_classes, device=timesteps.device)
        self._check_labels(class_labels, batch_size)
        model_time = self.noise_schedule.model_time(timesteps)
        return [embedding(model_time, class_labels) for embedding in self.condition_embeddings]

    def _check_labels(self, class_labels: torch.Tensor, batch_size: int) -> None:
        null_class = self.config.num_condition_classes
        if class_labels.shape != (batch_size,) or not (
            torch.compiler.is_compiling() or 0 <= class_labels.min() <= class_labels.max() <= null_class
        ):
            raise ValueError(
                f"class_labels must be {batch_size} integers in 0..{null_class} ({null_class}: no class), "
                f"got {class_labels.tolist()}"
            )

    def _patches(self, latents: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        return patches.contiguous()  # else every block computes on transposed memory, and every norm copies

    def _embed(self, noisy_latents: torch.Tensor) -> torch.Tensor:
        patches = self._patches(noisy_latents)
        return patches + self._positions(self.grid_size(noisy_latents)).to(patches.dtype)

    def _positions(self, grid_size: tuple[int, int]) -> torch.Tensor:
        if grid_size == self.config.grid_size:
            return self.position_embedding
        logger.warning_once(
            f"The patch grid is {grid_size[0]}x{grid_size[1]}; the model was trained on "
            f"{self.config.grid_size[0]}x{self.config.grid_size[1]}: its positions are interpolated."
        )
        return self.compute_positions(grid_size).to(self.position_embedding.device)

    def stored_noise(self, latents: torch.Tensor) -> torch.Tensor:
        """`(draws, 1, channels, height, width)`; for another resolution, drawn for it from the same seed."""
        if self.config.fixed_timestep:
            raise self.config.fixed_error("stored noise")
        size = (latents.shape[-2], latents.shape[-1])
        noise = self.evaluation_noise
        if noise.shape[-2:] != size:
            noise = self.compute_noise(size).to(latents.device)
        return noise[:, None]

    def grid_size(self, latents: torch.Tensor) -> tuple[int, int]:
        """Height and width of the patch grid of what the DiT sees."""
        return latents.shape[-2] // self.config.patch_size, latents.shape[-1] // self.config.patch_size

    def _check_input(self, images: torch.Tensor, name: str, channels: int | None = None, downsampling: int = 1) -> None:
        channels = channels or self.config.num_channels
        multiple = self.config.patch_size * downsampling
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"{name} must be (batch, {channels}, height, width), got {tuple(images.shape)}")
        if images.shape[-2] % multiple or images.shape[-1] % multiple:
            raise ValueError(f"{name} height and width must be multiples of {multiple}, got {tuple(images.shape[-2:])}")
        if not torch.compiler.is_compiling() and not torch.isfinite(images).all():
            raise ValueError(f"{name} holds NaN or infinite values")

    @staticmethod
    def _build_vae(config: ASelectDiTConfig) -> Any:
        if diffusers is None:
            raise ImportError("this checkpoint carries a VAE, which needs diffusers: pip install diffusers")
        description = config.vae_config or {}
        tiny = description.get("_class_name") == "AutoencoderTiny"
        vae: Any = (diffusers.AutoencoderTiny if tiny else diffusers.AutoencoderKL).from_config(description)
        if not config.vae_decoder:
            vae.decoder = None
            if not tiny:
                vae.post_quant_conv = None
        return vae


__all__ = ["ASelectDiTModel", "ASelectDiTPreTrainedModel"]
