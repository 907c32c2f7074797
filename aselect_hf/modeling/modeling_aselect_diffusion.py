"""A pretrained diffusion transformer of diffusers whose hidden features are its first output.

The network is the class of diffusers, unchanged. Its features are read where `families.py` says, and a run stops at the
deepest one. The prompt is encoded once, at conversion, and stored, so that no text encoder is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import initialization as init

from .configuration_aselect_diffusion import ASelectDiffusionConfig
from .families import FAMILIES
from .family import Stack
from .feature_taps import Collector, StopForwardError, collecting, register, unregister
from .folds import FOLDS
from .noisy_backbone import NoisyBackbone
from .noisy_network import Features
from .noisy_pretrained import NoisyPreTrainedModel

STORED = "conditioning_"
"""Start of the names of the buffers that hold the prompt."""


class SkippedBlock(nn.Module):
    """In place of a block that is not run or not there: returns its inputs."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.skip = stack.skip

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.skip(*args, **kwargs)


class ASelectDiffusionPreTrainedModel(NoisyPreTrainedModel):
    config: ASelectDiffusionConfig
    config_class = ASelectDiffusionConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if (
            isinstance(module, ASelectDiffusionModel) and not module.config.fixed_timestep
        ):  # a prompt that is missing must not give numbers
            for name in self.config.conditioning or ():
                init.constant_(getattr(module, f"{STORED}{name}"), float("nan"))


class ASelectDiffusionModel(ASelectDiffusionPreTrainedModel, NoisyBackbone):
    """A pretrained diffusion transformer as a vision backbone: the chosen feature at the chosen timestep, in one run.

    `early_exit` says how a run ends: `"raise"` stops in the middle of the deepest block, and `"block"` runs that block
    to its end and skips the others, without an exception. Sharded training (FSDP, DeepSpeed) needs the latter. It
    replaces modules during a run, so it is for one thread at a time.

    With a fixed timestep the network is not that of diffusers but a plain one, see `folds.py`.
    """

    projection_names = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_qkv_proj", "txt_kv_proj", "to_qkv_mlp_proj"),  # of PRX and FLUX.2
        *("to_qkv", "add_qkv", "to_image_out"),  # with a fixed timestep
    )
    early_exit: Literal["raise", "block"] = "raise"
    transformer: Any

    def __init__(self, config: ASelectDiffusionConfig) -> None:
        super().__init__(config)
        self._tapped: dict[str, nn.Module] = {}
        if config.fixed_timestep:
            config.check_fixed()  # again, since `from_pretrained` may change fields
            fold = FOLDS[config.family.fold or ""]
            self.transformer = fold.network(config)
            self._no_split_modules = [fold.block.__name__]
        else:
            self.transformer = build_transformer(config)
            self._no_split_modules = list(self.transformer._no_split_modules or ())
            for name, shape in (config.conditioning or {}).items():
                self.register_buffer(f"{STORED}{name}", torch.full(shape, float("nan")))
            self.follow_modules()
        self.post_init()

    @property
    def can_fix_timestep(self) -> bool:  # type: ignore[override]
        return self.config.family.fold is not None

    @property
    def no_fold(self) -> str:  # type: ignore[override]
        known = [name for name, family in FAMILIES.items() if family.fold is not None]
        return f"{self.config.transformer_class} has no fold; there is one for {', '.join(known)} and DiT"

    def follow_modules(self) -> None:
        """Read features where the modules are now: peft and quantizers put others in their place.

        Raises:
            RuntimeError: modules were replaced and the model is being compiled.
        """
        for block, (stack, module) in enumerate(self.blocks()):
            for kind, tap in stack.taps.items():
                name, current = f"blocks.{block}.{kind}", module.get_submodule(tap.path)
                if (before := self._tapped.get(name)) is current:
                    continue
                if torch.compiler.is_compiling():
                    raise RuntimeError("modules of this model were replaced: run it once before you compile it")
                if before is not None:
                    unregister(before, name)
                register(module, name, tap)
                self._tapped[name] = current

    def blocks(self) -> Iterator[tuple[Stack, nn.Module]]:
        """The blocks that are there, in order of computation, with the stack of each."""
        shape = self.config.shape
        for block in range(self.config.num_hidden_layers):
            stack, index = self.config.family.locate(shape, block)
            yield stack, getattr(self.transformer, stack.blocks)[index]

    def set_conditioning(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store the encoded prompt.

        Args:
            tensors: as the pipeline names its arguments, each with a batch of 1 or without a batch.

        Raises:
            ValueError: a name or shape is not that of `config.conditioning`, or the timestep is fixed.
        """
        if self.config.fixed_timestep:
            raise self.config.fixed_error("another prompt")
        shapes = self.config.conditioning or {}
        if set(tensors) != set(shapes):
            raise ValueError(f"conditioning must have the tensors {sorted(shapes)}, got {sorted(tensors)}")
        for name, tensor in tensors.items():
            buffer = getattr(self, f"{STORED}{name}")
            if tensor.ndim == buffer.ndim + 1 and tensor.shape[0] == 1:
                tensor = tensor[0]
            if tensor.shape != buffer.shape:
                raise ValueError(f"conditioning {name} must be {tuple(buffer.shape)}, got {tuple(tensor.shape)}")
            buffer.copy_(tensor)

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
        """As `NoisyNetwork.run`.

        Raises:
            ValueError: hidden states or attentions of all blocks are asked for, a prediction without all blocks, or
                gradient checkpointing of a class that does not support it.
        """
        if whole:
            raise ValueError(
                "output_hidden_states and output_attentions are not there for a network of diffusers: "
                "read blocks.<i>.hidden with extract_features"
            )
        if self.config.fixed_timestep:
            return self._run_folded(inputs, names), None
        if predict and not self.config.is_whole:
            raise ValueError(
                f"this model keeps only {self.config.num_hidden_layers} blocks, so it cannot denoise: "
                'convert its source with keep="all"'
            )
        if torch.is_grad_enabled() and self.transformer.gradient_checkpointing and not self.config.family.checkpointing:
            raise ValueError(
                f"a {self.config.transformer_class} has no gradient checkpointing, or computes something else with it: "
                "call gradient_checkpointing_disable()"
            )
        self.follow_modules()
        assert timesteps is not None
        resolved = {name: str(self.config.resolve_feature(name)) for name in names}
        height, width = self.grid_size(inputs)
        deepest = max(self.config.resolve_feature(name).block for name in names)
        stop = not predict and self.early_exit == "raise"
        collector = Collector(list(resolved.values()), height * width, stop)
        arguments = self.inputs(inputs, timesteps)
        output: Any = None
        with collecting(collector), self.without_blocks_after(deepest if not (predict or stop) else None):
            try:  # noqa: SIM105 (torch.compile cannot trace contextlib.suppress)
                output = self.transformer(**arguments, return_dict=False)[0]
            except StopForwardError:
                pass
        for feature, tokens in collector.found.items():
            if tokens.shape[1] != height * width:
                raise ValueError(f"{feature} has {tokens.shape[1]} tokens, but the patch grid is {height}x{width}")
        features = {name: collector.found[feature] for name, feature in resolved.items()}
        return features, self.config.family.prediction(output, inputs) if predict else None

    def _run_folded(self, latents: torch.Tensor, names: Sequence[str]) -> Features:
        resolved = {name: self.config.resolve_feature(name) for name in names}
        found = self.transformer(latents, max(feature.block for feature in resolved.values()))
        return {name: found[tuple(feature)] for name, feature in resolved.items()}

    def inputs(self, noisy: torch.Tensor, timesteps: torch.Tensor) -> dict[str, Any]:
        """What the transformer receives for noisy latents at these timesteps `(batch,)`."""
        most = self.config.family.max_grid(self.config.shape)
        if most is not None and max(self.grid_size(noisy)) > most:
            raise ValueError(
                f"latents of {noisy.shape[-2]}x{noisy.shape[-1]} are too large: "
                f"{self.config.position_limit} {most}x{most}"
            )
        dtype = self._weight.dtype
        stored = {name: getattr(self, f"{STORED}{name}") for name in self.config.conditioning or ()}
        repeated = {
            name: (x.to(dtype) if x.is_floating_point() else x)[None].repeat(noisy.shape[0], *[1] * x.ndim)
            for name, x in stored.items()
        }
        time = self.noise_schedule.model_time(timesteps).float()
        return self.config.family.inputs(self.config.shape, noisy.to(dtype), time, repeated, self.config.guidance)

    @contextlib.contextmanager
    def without_blocks_after(self, deepest: int | None) -> Iterator[None]:
        """Skip the blocks after this one for a while; `None` skips nothing."""
        if deepest is None:
            yield
            return
        shape, family = self.config.shape, self.config.family
        replaced: list[tuple[nn.ModuleList, int, nn.Module]] = []
        for block in range(deepest + 1, family.depth(shape)):
            stack, index = family.locate(shape, block)
            modules = getattr(self.transformer, stack.blocks)
            replaced.append((modules, index, modules[index]))
            modules[index] = SkippedBlock(stack)
        try:
            yield
        finally:
            for modules, index, module in replaced:
                modules[index] = module

    def unused_parts(self, features: Sequence[str]) -> list[nn.Module]:
        resolved = [self.config.resolve_feature(name) for name in features]
        deepest = max(feature.block for feature in resolved)
        if self.config.fixed_timestep:
            return self.transformer.unused_parts(deepest, [each.kind for each in resolved if each.block == deepest])
        kinds = [feature.kind for feature in resolved if feature.block == deepest]
        blocks = list(self.blocks())
        unused = [module for _, module in blocks[deepest + 1 :]]
        stack, module = blocks[deepest]
        needed = {part for kind in kinds for part in stack.needed(kind)}
        unused += _parts(module, stack.all_parts - needed)
        if set(kinds) <= set(stack.before_text):  # the text has not been met yet
            if deepest == 0:
                unused += _parts(self.transformer, self.config.family.text_inputs)
            else:
                before, module = blocks[deepest - 1]
                unused += _parts(module, before.text)
        return unused + _parts(self.transformer, self.config.family.outputs)

    def folded_config(self, config: Any) -> Any:
        for name in config.conditioning or ():
            if not getattr(self, f"{STORED}{name}").isfinite().all():
                raise ValueError(f"fix_timestep needs the prompt, but {name} is not set: call set_conditioning first")
        config.merged_tokens = FOLDS[config.family.fold].tokens(self)
        return config

    def folded_state(self, fixed: Any) -> dict[str, torch.Tensor]:
        return FOLDS[self.config.family.fold or ""].state(self, fixed)

    def untrained_twin(self) -> Any:
        twin = super().untrained_twin()
        if self.config.fixed_timestep:
            return twin
        twin.set_conditioning({name: getattr(self, f"{STORED}{name}") for name in self.config.conditioning or ()})
        for name, buffer in self.transformer.named_buffers():  # positions, which may be a part of a larger table
            twin.transformer.get_buffer(name).copy_(buffer)
        return twin

    def fingerprint_fields(self) -> dict[str, Any]:
        config = self.config
        network = {"class": config.transformer_class, "config": config.transformer_config, "guidance": config.guidance}
        return super().fingerprint_fields() | {"network": network, "dtype": str(self._weight.dtype)}


def build_transformer(config: ASelectDiffusionConfig) -> Any:
    """The network, with its blocks after `config.kept_blocks` left out.

    Every buffer is made persistent: transformers would fill others with arbitrary memory when it loads a checkpoint.

    Raises:
        ImportError: diffusers is missing, or older than the family needs.
    """
    shape, family = config.shape, config.family
    transformer = family.stock_class().from_config(config.built_config)
    _restore_tables(transformer, config)
    for block in range(config.num_hidden_layers, family.depth(shape)):
        stack, index = family.locate(shape, block)
        getattr(transformer, stack.blocks)[index] = SkippedBlock(stack)
    transformer.gradient_checkpointing = False  # not all classes have this field
    for module in transformer.modules():
        module._non_persistent_buffers_set.clear()
    return transformer


def _restore_tables(transformer: nn.Module, config: ASelectDiffusionConfig) -> None:
    """Compute tables of positions that are neither weights nor buffers, and that a build on the meta device lacks."""
    lacking = [
        (path, name)
        for path, module in transformer.named_modules()
        for name, value in vars(module).items()
        if any(
            isinstance(x, torch.Tensor) and x.is_meta for x in (value if isinstance(value, list | tuple) else [value])
        )
    ]
    if not lacking:
        return
    shallow = {stack.depth: 1 for stack in config.family.stacks}
    with torch.device("cpu"):
        twin = config.family.stock_class().from_config(config.built_config | shallow)
    for path, name in lacking:
        setattr(transformer.get_submodule(path), name, getattr(twin.get_submodule(path), name))


def _parts(module: nn.Module, paths: Any) -> list[nn.Module]:
    """Those of the submodules at `paths` that this module has."""
    known = dict(module.named_modules())
    return [known[path] for path in paths if path in known]


__all__ = ["ASelectDiffusionModel", "ASelectDiffusionPreTrainedModel"]
