"""The pages on extending can be followed word for word: their code gives a rule and a family that work."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tiny_pipelines import t5
from torch import nn

import aselect_hf
from aselect_hf import select_timestep
from aselect_hf.selection.rules import RULES
from tests.docs.snippets import ROOT, read_snippets

FILE = re.compile(r"`((?:aselect_hf|tests)/[\w/]+\.py)`")


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        joint = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.to_out[1](self.to_out[0](joint.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.ff = Attention(dim, heads), FeedForward(dim)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), mask)
        return hidden_states + self.ff(self.norm2(hidden_states))


class ToyTransformer2DModel(ModelMixin, ConfigMixin):
    """A network as diffusers has them: text tokens before image tokens, time added to all."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        patch_size: int = 2,
        sample_size: int = 64,
        num_layers: int = 12,
        dim: int = 768,
        num_heads: int = 12,
        text_dim: int = 4096,
    ) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.text_proj = nn.Linear(text_dim, dim)
        self.blocks = nn.ModuleList([Block(dim, num_heads) for _ in range(num_layers)])
        self.norm_out = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, in_channels * patch_size**2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        image = self.proj_in(hidden_states)
        size, image = image.shape[-2:], image.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.text_proj(encoder_hidden_states), image], dim=1) + timestep[:, None, None].cos()
        mask = torch.cat([attention_mask.bool(), attention_mask.new_ones(image.shape[:2]).bool()], dim=1)
        for block in self.blocks:
            tokens = block(tokens, mask)
        output = self.proj_out(self.norm_out(tokens[:, -image.shape[1] :])).transpose(1, 2).unflatten(-1, size)
        return (nn.functional.pixel_shuffle(output, self.config.patch_size),)


class ToyPipeline(DiffusionPipeline):
    """What a pipeline of diffusers does, without a VAE."""

    def __init__(self, transformer: Any, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )

    def encode_prompt(self, prompt: str, do_classifier_free_guidance: bool = True) -> tuple[Any, ...]:
        words = self.tokenizer(prompt, padding="max_length", max_length=6, return_tensors="pt")
        embeds = self.text_encoder(**words).last_hidden_state
        return embeds, words["attention_mask"], None, None

    @torch.no_grad()
    def __call__(
        self, prompt_embeds: Any, prompt_attention_mask: Any, latents: Any, num_inference_steps: int, output_type: str
    ) -> torch.Tensor:
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.transformer(
                latents, t[None] / 1000, encoder_hidden_states=prompt_embeds, attention_mask=prompt_attention_mask
            )
            latents = self.scheduler.step(output[0], t, latents).prev_sample
        return latents


def code_of(page: str, title: str) -> list[tuple[str, str]]:
    """The Python blocks of a section, each with the last file that is named before it."""
    text = (ROOT / "docs" / page).read_text()
    lines = text.splitlines()
    start = lines.index(f"## {title}") + 1
    end = next((i for i in range(start, len(lines)) if lines[i].startswith("## ")), len(lines))
    found = []
    for snippet in read_snippets(ROOT / "docs" / page):
        if start < snippet.line <= end and snippet.language == "python":
            found.append((FILE.findall("\n".join(lines[start : snippet.line]))[-1], snippet.code))
    return found


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """`follow(page, section)`: new files are written and imported, and code for known files runs at their end."""
    new: list[str] = []

    def run(page: str, title: str) -> None:
        for number, (path, code) in enumerate(code_of(page, title)):
            name = path.removesuffix(".py").replace("/", ".")
            if (ROOT / path).exists() or name in new:
                exec(compile(code, path, "exec"), vars(import_module(name)))
                continue
            package = import_module(name.rpartition(".")[0])
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / Path(path).name).write_text(code)
            monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
            import_module(name)
            new.append(name)

    yield run
    for name in new:
        del sys.modules[name]


def removed_afterwards(monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], key: str) -> None:
    """Have an entry that a test adds to a table removed after it."""
    monkeypatch.setitem(table, key, None)
    del table[key]


def test_a_rule_is_added_as_the_page_says(
    follow: Any, model: Any, normal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed_afterwards(monkeypatch, RULES, "spread")
    follow("extending.md", "Add a rule")
    latents, steps = normal(12, 2, 8, 8), [0, 300, 900]
    found = select_timestep(model, latents, method="spread", timesteps=steps, num_images=12, progress=False)
    tokens = model.extract_features(latents=latents, timesteps=steps, output_format="pooled")
    expected = next(iter(tokens.values())).numpy().var(axis=0).mean(axis=-1)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4)
    assert found.timestep == steps[expected.argmax()]


def test_a_family_is_added_as_the_page_says(
    follow: Any, randomize: Any, normal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features are those of the stock network, read by hooks, and its inputs are those of the stock pipeline."""
    suite = import_module("tests.modeling.test_diffusion_families")
    families, prompts = (import_module(f"aselect_hf.{name}") for name in ("modeling.families", "conversion.prompts"))
    for table, key in (
        (suite.TINY, "Toy"),
        *((each, "ToyTransformer2DModel") for each in (families.FAMILIES, prompts.ENCODERS, suite.ORACLES)),
    ):
        removed_afterwards(monkeypatch, table, key)
    monkeypatch.setattr(diffusers, "ToyTransformer2DModel", ToyTransformer2DModel, raising=False)
    monkeypatch.setattr(diffusers, "ToyPipeline", ToyPipeline, raising=False)
    follow("families.md", "How to add a family")
    model = randomize(suite.tiny_model("Toy"))
    latents = normal(2, 4, 8, 8)
    assert len(model.config.list_features()) == 24
    suite.test_every_feature_is_that_of_the_stock_network(model, latents)
    suite.test_the_inputs_are_those_that_the_pipeline_passes(model, latents, (8, 4))
    suite.test_the_prediction_is_that_of_the_stock_network(model, latents)
    suite.test_the_first_blocks_give_the_same_features("Toy", model, latents)
    suite.test_a_run_without_an_exception_gives_the_same_features(model, latents)
    encoder, tokenizer = t5()
    pipeline = ToyPipeline(model.transformer, diffusers.FlowMatchEulerDiscreteScheduler(), None, encoder, tokenizer)
    converted = aselect_hf.from_diffusers(pipeline, prompt="a b", feature="blocks.1.query", image_size=8)
    embeds, mask, *_ = pipeline.encode_prompt("a b")
    assert converted.config.kept_blocks == 2
    torch.testing.assert_close(converted.conditioning_prompt_embeds, embeds[0].detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(converted.conditioning_prompt_attention_mask, mask[0].float())
