"""A second family: a small denoiser that is no DiT. Nothing else in the package or its tests knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel

from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.modeling.noisy_backbone import NoisyBackbone


@strict
class ToyConfig(NoisyBackboneConfig):
    """Blocks of one head, on 2 x 2 patches of 8 x 8 pixels; the hidden layer of their MLP is a feature too."""

    model_type = "toy_denoiser"
    feature_kinds = ("query", "attention", "mlp_hidden", "output")

    channels: int = 2
    width: int = 12
    depth: int = 3
    stage_kind: str = "output"

    num_hidden_layers = property(lambda self: self.depth)
    num_channels = property(lambda self: self.channels)
    sample_size = property(lambda self: 8)
    grid_size = property(lambda self: (4, 4))
    network = property(lambda self: f"width {self.width}")

    def feature_width(self, *names: str) -> int:
        widths = {self.width * (2 if self.resolve_feature(name).kind == "mlp_hidden" else 1) for name in names}
        if len(widths) > 1:
            raise ValueError(f"{', '.join(names)} differ in width")
        return widths.pop()


class ToyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.mlp_in, self.mlp_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def steps(self, hidden_states: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        normed = self.norm(hidden_states)
        query = self.to_q(normed)
        yield "query", query
        mixed = nn.functional.scaled_dot_product_attention(query, self.to_k(normed), self.to_v(normed))
        attention = self.to_out(mixed)
        yield "attention", attention
        mlp_hidden = self.mlp_in(attention).relu()
        yield "mlp_hidden", mlp_hidden
        yield "output", hidden_states + attention + self.mlp_out(mlp_hidden)


class ToyModel(NoisyBackbone):
    config: ToyConfig
    config_class = ToyConfig  # transformers reads the annotation, which is a string here
    base_model_prefix = "toy"
    projection_names = ("to_q", "to_k", "to_v", "to_out")

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Conv2d(config.channels, config.width, kernel_size=2, stride=2)
        self.time = nn.Linear(1, config.width)
        self.blocks = nn.ModuleList(ToyBlock(config.width) for _ in range(config.depth))
        self.head = nn.ConvTranspose2d(config.width, config.channels, kernel_size=2, stride=2)
        self.post_init()

    def run(
        self, inputs: Any, timesteps: Any, class_labels: Any, names: Any, *, predict: bool = False, whole: bool = False
    ) -> Any:
        weight = self.embedding.weight
        sigma = torch.as_tensor(self.noise_schedule.sigma(timesteps), dtype=weight.dtype, device=inputs.device)
        tokens = self.embedding(inputs.to(weight.dtype)).flatten(2).mT + self.time(sigma[:, None])[:, None]
        wanted, found = {self.config.resolve_feature(name) for name in names}, {}
        last = max(block for block, _ in wanted)
        for index, block in enumerate(self.blocks if whole else self.blocks[: last + 1]):
            for kind, tokens in block.steps(tokens):  # noqa: B020
                found[index, kind] = tokens
                if not whole and wanted <= found.keys():
                    break
        features = {name: found[self.config.resolve_feature(name)] for name in names}
        if not predict:
            return features, None
        height, width = self.grid_size(inputs)
        return features, self.head(tokens.mT.unflatten(-1, (height, width)))

    def unused_parts(self, features: Any) -> list[nn.Module]:
        names = [self.config.resolve_feature(name) for name in features]
        deepest = max(names, key=lambda name: (name.block, self.config.feature_kinds.index(name.kind)))
        block, kinds = self.blocks[deepest.block], self.config.feature_kinds
        parts = {"attention": [block.to_k, block.to_v, block.to_out], "mlp_hidden": [block.mlp_in]}
        parts["output"] = [block.mlp_out]
        after = kinds[kinds.index(deepest.kind) + 1 :]
        return [*self.blocks[deepest.block + 1 :], self.head, *(part for kind in after for part in parts[kind])]


AutoConfig.register(ToyConfig.model_type, ToyConfig, exist_ok=True)
AutoModel.register(ToyConfig, ToyModel, exist_ok=True)
