"""Fixed timesteps of Stable Diffusion 3 and 3.5: a plain network with the same features, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from aselect_hf import ASelectDiffusionForImageClassification, ASelectDiffusionForSemanticSegmentation
from aselect_hf.modeling.folded_blocks import KINDS
from aselect_hf.modeling.folded_weights import distinct_tokens

from .test_remote_code import LOAD
from .tiny_transformers import TINY, store_prompt, tiny_config, tiny_model

NAMES = ("SD3", "SD3.5")
HEADS = {
    "AutoModelForImageClassification": ASelectDiffusionForImageClassification,
    "AutoModelForSemanticSegmentation": ASelectDiffusionForSemanticSegmentation,
}


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, randomize: Any) -> Any:
    """In double precision, with large random weights; three of the five text tokens are equal."""
    model = store_prompt(randomize(tiny_model(request.param, num_noise_draws=2))).double().eval()
    prompt = model.conditioning_prompt_embeds
    prompt[2] = prompt[4] = prompt[1]
    return model


def read(model: Any, latents: torch.Tensor, names: list[str], **options: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: x[:, 0] for name, x in model.extract_features(latents=latents, features=names, **options).items()}


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in expected)


@pytest.mark.usefixtures("in_double")
def test_every_feature_alone_and_all_together(model: Any, normal: Any) -> None:
    latents, names = normal(2, 4, 8, 8).double(), model.config.list_features()
    expected = read(model, latents, names, timesteps=[300])
    assert largest_difference(read(model.fix_timestep(300, names), latents, names), expected) < 1e-8
    for name in names:
        fixed = model.fix_timestep(300, name)
        assert largest_difference(read(fixed, latents, [name]), {name: expected[name]}) < 1e-8, name
        assert fixed.config.list_features() == [name]


def test_equal_text_tokens_become_one(model: Any) -> None:
    tokens, counts = distinct_tokens(model.conditioning_prompt_embeds)
    assert counts == [1, 3, 1]
    assert torch.equal(tokens, model.conditioning_prompt_embeds[[0, 1, 3]])
    fixed = model.fix_timestep(300, "blocks.2.hidden")
    assert fixed.config.merged_tokens == counts
    assert fixed.transformer.blocks[0].attn.table.shape == (3, 3, 16)
    torch.testing.assert_close(fixed.transformer.token_scores.exp(), torch.tensor([1.0, 3, 1], dtype=torch.float64))


def test_without_the_counts_of_tokens_features_differ(model: Any, normal: Any) -> None:
    latents, name = normal(2, 4, 8, 8).double(), "blocks.2.hidden"
    fixed = model.fix_timestep(300, name)
    fixed.transformer.token_scores.zero_()
    expected = read(model, latents, [name], timesteps=[300])
    assert largest_difference(read(fixed, latents, [name]), expected) > 1e-4


def test_only_what_the_feature_needs_is_left(model: Any) -> None:
    blocks = model.fix_timestep(300, "blocks.1.query").transformer.blocks
    assert len(blocks) == 2
    assert blocks[1].attn.state_dict().keys() == {"to_qkv.weight", "to_qkv.bias"}
    assert blocks[0].ff_context is None
    assert blocks[0].attn.to_add_out is None
    names = [name for name, _ in model.fix_timestep(300, "blocks.1.attention").named_parameters()]
    assert not [name for name in names if "norm1.linear" in name or "time" in name or "context_embedder" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_unused_parts_get_no_gradient(model: Any, normal: Any, kind: str) -> None:
    fixed = model.fix_timestep(300, model.config.list_features())
    name = f"blocks.1.{kind}"
    unused = {id(p) for part in fixed.unused_parts([name]) for p in part.parameters()}
    fixed(latents=normal(2, 4, 8, 8).double(), feature=name).last_hidden_state.square().sum().backward()
    for each, parameter in fixed.named_parameters():
        apart = any(part in each for part in ("attention_norm", "mlp_norm", "gate"))  # of other kinds of the block
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert apart or moved == (id(parameter) not in unused), each


def test_a_saved_model_is_loaded_by_the_auto_class(model: Any, normal: Any, tmp_path: Path) -> None:
    latents = normal(2, 4, 8, 8).double()
    fixed = model.fix_timestep(300, ["blocks.0.hidden", "blocks.2.mlp"])
    fixed.save_pretrained(tmp_path / "fixed")
    loaded, report = AutoModel.from_pretrained(tmp_path / "fixed", output_loading_info=True, dtype=torch.float64)
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert largest_difference(read(loaded, latents, ["blocks.2.mlp"]), read(fixed, latents, ["blocks.2.mlp"])) == 0
    with pytest.raises(ValueError, match="fixed to timestep 300"):
        loaded(latents=latents, timestep=20)


@pytest.mark.parametrize(("name", "auto_class"), zip(NAMES, HEADS, strict=True))
def test_a_head_works_without_the_package_and_diffusers(
    name: str, auto_class: str, randomize: Any, normal: Any, tmp_path: Path, run_elsewhere: Any
) -> None:
    """Truncated and folded, then in a process that can import neither."""
    backbone = store_prompt(randomize(tiny_model(name, kept_blocks=2)))
    config = backbone.config
    config.feature, config.timestep, config.num_labels = "blocks.1.query", 100, 4
    model = HEADS[auto_class](config).eval()
    model.base_model.load_state_dict(backbone.state_dict())
    images = normal(2, 4, 8, 8)
    fixed = model.fix_timestep(70)
    fixed.save_pretrained(tmp_path / "model")
    arguments = (str(tmp_path / "model"), auto_class, "logits", json.dumps(images.tolist()))
    found = run_elsewhere(LOAD, *arguments, blocked=("aselect_hf", "diffusers"))
    model.base_model.config.timestep = model.config.timestep = 70
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["numbers"]), model(images).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in TINY if tiny_config(name).family.fold is None])
def test_other_families_name_those_that_can_be_fixed(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be fixed.*SD3T.*, PixArtT.*, SanaTransformer2DModel and DiT"):
        tiny_model(name).fix_timestep(70)
