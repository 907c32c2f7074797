"""Checkpoints to convert: random diffusers DiTs, a whole pipeline, and an original state dict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

State = dict[str, torch.Tensor]
CLASSES = 7
SMALL: dict[str, Any] = {"in_channels": 1, "num_attention_heads": 3, "patch_size": 2, "sample_size": 8}


def share_embedders(transformer: DiTTransformer2DModel) -> None:
    """Give every block the first one's timestep and class embedders, as the published DiT has them."""
    first = transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(first)


@pytest.fixture
def make_transformer(randomize: Callable[..., Any]) -> Callable[..., DiTTransformer2DModel]:
    """`make_transformer(shared=True, **config)`: a random diffusers DiT."""

    def build(shared: bool = True, **config: Any) -> DiTTransformer2DModel:
        defaults = {"attention_head_dim": 8, "num_layers": 3, "num_embeds_ada_norm": CLASSES} | SMALL
        transformer = randomize(DiTTransformer2DModel(**(defaults | config)))
        if shared:
            share_embedders(transformer)
        return transformer

    return build


@pytest.fixture
def transformer_folder(make_transformer: Any, tmp_path: Path) -> Path:
    make_transformer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def pipeline_folder(make_transformer: Any, tiny_kl: Any, tmp_path: Path) -> Path:
    """A whole `DiTPipeline` as diffusers' own conversion script writes it, with a card."""
    transformer = make_transformer(in_channels=4, out_channels=8, num_embeds_ada_norm=1000, norm_eps=1e-5)
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon", clip_sample=False
    )
    vae = tiny_kl
    vae.register_to_config(shift_factor=None)  # DiTPipeline knows no shift
    DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A DiT\n")
    return tmp_path / "pipeline"


@pytest.fixture
def original(make_model: Any, original_state: Any) -> State:
    """A random original DiT state dict: 3 blocks of width 24 with 3 heads, 4 channels, learned sigma."""
    return original_state(make_model(num_channels=4, mlp_ratio=4))
