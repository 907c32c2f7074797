"""What is special to Qwen-Image: an autoencoder of films, long prompts, and relatives that are for something else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES

import aselect_hf

from .tiny_transformers import TINY, tiny_config


@torch.no_grad()
def test_threads_share_its_encoder(randomize: Any, normal: Any, tmp_path: Path) -> None:
    """In diffusers, an autoencoder of films remembers the frames before, of whichever thread."""
    model = aselect_hf.from_diffusers(PIPELINES["Qwen-Image"](tmp_path, randomize), image_size=16)
    images = [normal(1, 3, 16, 16, seed=seed).clamp(-1, 1) for seed in range(4)]
    expected = [model.encode(each) for each in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = list(pool.map(torch.no_grad()(model.encode), images))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_prompt_ends_where_its_pipeline_ends_it(randomize: Any, tmp_path: Path) -> None:
    """At 512 tokens, although its `encode_prompt` alone takes 1,024."""
    model = aselect_hf.from_diffusers(PIPELINES["Qwen-Image"](tmp_path, randomize), prompt="a" * 700, image_size=16)
    assert model.config.conditioning == {"prompt_embeds": [512, 12]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_layer3d_rope": True}, "Qwen-Image Layered makes several layers"),
        ({"zero_cond_t": True}, "Qwen-Image Edit also takes images"),
        ({"guidance_embeds": True}, "cannot run Qwen-Image with guidance_embeds"),
        ({"out_channels": 16}, "patches are not those of 2x2 latents"),
    ],
)
def test_its_relatives_are_refused(fields: dict[str, Any], message: str) -> None:
    shape = TINY["Qwen-Image"]["transformer_config"] | fields
    with pytest.raises(ValueError, match=f"this QwenImageTransformer2DModel is not supported: .*{message}"):
        tiny_config("Qwen-Image", transformer_config=shape)
