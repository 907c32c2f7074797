"""What a conversion keeps of a network: blocks, positions, nothing of the source's memory, and one backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny_pipelines import SD3, sd3_pipeline
from transformers import AutoModel

import aselect_hf
from aselect_hf import ASelectDiffusionConfig, ASelectDiffusionForImageClassification, ASelectDiffusionModel
from aselect_hf.conversion import save_model

PROMPT = {"prompt_embeds": torch.ones(5, 32), "pooled_prompt_embeds": torch.ones(16)}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, randomize: Any) -> Any:
    return sd3_pipeline(tmp_path_factory.mktemp("tokenizer"), randomize)


@pytest.mark.parametrize("side", [11, 12])
@pytest.mark.parametrize("grid", [3, 4])
def test_cropped_positions_are_those_of_the_whole_table_at_every_size(
    randomize: Any, normal: Any, tmp_path: Path, side: int, grid: int
) -> None:
    """Also of images that are not square; larger ones are refused, with the way out."""
    stock = randomize(SD3Transformer2DModel(**(SD3 | {"pos_embed_max_size": side})))
    stock.pos_embed.pos_embed.copy_(torch.randn(stock.pos_embed.pos_embed.shape))
    asked: dict[str, Any] = {"prompt_embeds": PROMPT, "feature": "blocks.1.query"}
    whole = aselect_hf.from_diffusers(stock, **asked)
    cropped = aselect_hf.from_diffusers(stock, image_size=2 * grid, **asked)
    kept = cropped.config.kept_positions
    assert (kept - grid, (side - kept) % 2) in ((0, 0), (1, 0))
    assert cropped.transformer.pos_embed.pos_embed.shape == (1, kept**2, 16)
    assert cropped.config.transformer_config["pos_embed_max_size"] == side
    save_model(cropped, tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    for height in range(1, kept + 1):
        for width in (1, 2, kept):
            latents = normal(1, 4, 2 * height, 2 * width)
            expected = whole(latents=latents, timestep=300).last_hidden_state
            read = whole.transformer.pos_embed.cropped_pos_embed(2 * height, 2 * width)
            for model in (cropped, loaded):
                assert torch.equal(model.transformer.pos_embed.cropped_pos_embed(2 * height, 2 * width), read)
                found = model(latents=latents, timestep=300).last_hidden_state
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="convert the source again with that image_size, because positions were kept"):
        cropped(latents=normal(1, 4, 2 * kept + 2, 2), timestep=300)
    twin = cropped.untrained_twin().transformer.pos_embed.pos_embed
    assert torch.equal(twin, cropped.transformer.pos_embed.pos_embed)


def test_positions_are_kept_where_nothing_may_be_lost(pipeline: Any) -> None:
    for options in ({}, {"keep": "all", "image_size": 8}, {"image_size": 24}):
        model = aselect_hf.from_diffusers(pipeline, prompt_embeds=PROMPT, **options)
        assert model.config.kept_positions is None
        assert torch.equal(model.transformer.pos_embed.pos_embed, pipeline.transformer.pos_embed.pos_embed)


@pytest.mark.parametrize("fields", [{"kept_positions": 5}, {"kept_positions": 8}, {"kept_positions": 0}], ids=str)
def test_positions_with_another_middle_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="kept_positions must be in"):
        ASelectDiffusionConfig(transformer_class="SD3Transformer2DModel", transformer_config=SD3, **fields)
    with pytest.raises(ValueError, match="has no such table"):
        ASelectDiffusionConfig(transformer_class="PixArtTransformer2DModel", transformer_config={
            "sample_size": 8, "caption_channels": 12}, **fields)  # fmt: skip


def test_the_model_shares_no_memory_with_a_source_in_memory(pipeline: Any) -> None:
    before = {name: tensor.clone() for name, tensor in pipeline.vae.state_dict().items()}
    model = aselect_hf.from_diffusers(pipeline, prompt_embeds=PROMPT, keep="all")
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.vae.state_dict().items())
    assert any(x.any() for x in pipeline.transformer.parameters())


def test_a_head_is_put_on_one_backbone(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone is built once, without memory of its own; the head starts as a new one does."""
    built: list[Any] = []
    own = ASelectDiffusionModel.__init__

    def build(self: Any, config: Any) -> None:
        built.append(self)
        own(self, config)

    monkeypatch.setattr(ASelectDiffusionModel, "__init__", build)
    options: dict[str, Any] = {"num_labels": 3, "pooling": "attentive", "head_norm": "batch_norm"}
    model = ASelectDiffusionForImageClassification.from_diffusers(pipeline, prompt_embeds=PROMPT, **options)
    assert len(built) == 1
    new = ASelectDiffusionForImageClassification(model.config).classifier
    for name, tensor in new.state_dict().items():
        found = model.classifier.state_dict()[name]
        assert found.device.type == "cpu"
        assert found.shape == tensor.shape
        random = name in ("linear.weight", "pooling.query", "pooling.key.weight", "pooling.value.weight")
        if not random:
            assert torch.equal(found, tensor), name
        else:
            assert 0.5 < found.std() / model.config.initializer_range < 1.5, name
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {name for name, x in ASelectDiffusionForImageClassification(model.config).named_parameters()
                if x.requires_grad}  # fmt: skip
    assert trained == expected


def test_a_fixed_timestep_keeps_the_positions(pipeline: Any, normal: Any) -> None:
    model = aselect_hf.from_diffusers(
        pipeline, prompt_embeds=PROMPT, image_size=8, feature="blocks.1.query", timestep=300
    )
    assert model.config.kept_positions == 2
    latents = normal(1, 4, 4, 4)
    expected = model(latents=latents).last_hidden_state
    torch.testing.assert_close(model.fix_timestep()(latents=latents).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
