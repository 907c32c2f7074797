"""Fixed timesteps of PixArt and Sana: a plain network with the same features, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from aselect_hf import ASelectDiffusionForImageClassification
from aselect_hf.modeling.folded_blocks import KINDS

from .test_folded_joint import largest_difference, read
from .test_remote_code import LOAD
from .tiny_transformers import SANA, tiny_model

NAMES = ("PixArt-Sigma", "PixArt-alpha", "Sana", "Sana 1.5")
NORMED = {"qk_norm": "rms_norm_across_heads", "interpolation_scale": 2.0}
PROMPTS = {"one token": [1, 0, 0, 0, 0], "three, two of them equal": [1, 0, 1, 1, 0], "no mask": [1] * 5}


def build(name: str, mask: list[int], randomize: Any, **fields: Any) -> Any:
    """A model in double precision with large random weights; the second and third token that the mask keeps agree."""
    if name == "Sana 1.5":
        name, fields = "Sana", fields | {"transformer_config": SANA | NORMED}
    model = randomize(tiny_model(name, num_noise_draws=2, **fields)).double().eval()
    model.conditioning_prompt_attention_mask[:] = torch.tensor(mask)
    model.conditioning_prompt_embeds[3] = model.conditioning_prompt_embeds[2]
    return model


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("mask", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.usefixtures("in_double")
def test_every_feature_alone_and_all_together(family: str, mask: list[int], randomize: Any, normal: Any) -> None:
    model = build(family, mask, randomize)
    latents, names = normal(2, 4, 8, 8).double(), model.config.list_features()
    expected = read(model, latents, names, timesteps=[300])
    assert largest_difference(read(model.fix_timestep(300, names), latents, names), expected) < 1e-8
    for name in names:
        fixed = model.fix_timestep(300, name)
        assert largest_difference(read(fixed, latents, [name]), {name: expected[name]}) < 1e-8, name
        assert fixed.config.list_features() == [name]


def test_cross_attention_to_one_token_is_part_of_a_bias(family: str, randomize: Any) -> None:
    model = build(family, PROMPTS["one token"], randomize)
    fixed = model.fix_timestep(300, "blocks.2.query")
    assert fixed.config.merged_tokens == [1]
    names = [name for name, _ in fixed.transformer.named_parameters()]
    assert not [name for name in names if "attn2" in name or "constant" in name or "caption" in name or "time" in name]
    longer = build(family, PROMPTS["three, two of them equal"], randomize).fix_timestep(300, "blocks.2.query")
    assert longer.config.merged_tokens == [1, 2]
    assert longer.transformer.blocks[0].attn2.key_value.shape[1] == 2
    assert fixed.num_parameters() < longer.num_parameters() < model.num_parameters()


def test_the_prompt_still_counts(family: str, randomize: Any, normal: Any) -> None:
    model, latents = build(family, PROMPTS["one token"], randomize), normal(2, 4, 8, 8).double()
    expected = read(model.fix_timestep(300), latents, [str(model.config.feature)])
    model.conditioning_prompt_embeds[0] += 1
    assert largest_difference(read(model.fix_timestep(300), latents, list(expected)), expected) > 1e-3


@pytest.mark.parametrize("mask", [PROMPTS["one token"], PROMPTS["no mask"]])
@pytest.mark.parametrize("kind", KINDS)
def test_unused_parts_get_no_gradient(mask: list[int], kind: str, randomize: Any, normal: Any) -> None:
    model = build("Sana 1.5", mask, randomize)
    fixed = model.fix_timestep(300, model.config.list_features())
    name = f"blocks.1.{kind}"
    unused = {id(p) for part in fixed.unused_parts([name]) for p in part.parameters()}
    fixed(latents=normal(2, 4, 8, 8).double(), feature=name).last_hidden_state.square().sum().backward()
    for each, parameter in fixed.named_parameters():
        apart = any(part in each for part in ("attention_norm", "mlp_norm", "gate", "constant"))
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert apart or moved == (id(parameter) not in unused), each


@pytest.mark.parametrize("mask", [PROMPTS["one token"], PROMPTS["no mask"]])
def test_a_saved_model_is_loaded_by_the_auto_class(
    family: str, mask: list[int], randomize: Any, normal: Any, tmp_path: Path
) -> None:
    latents, name = normal(2, 4, 8, 8).double(), "blocks.2.mlp"
    fixed = build(family, mask, randomize).fix_timestep(300, ["blocks.0.attention", name])
    fixed.save_pretrained(tmp_path / "fixed")
    loaded, report = AutoModel.from_pretrained(tmp_path / "fixed", output_loading_info=True, dtype=torch.float64)
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert largest_difference(read(loaded, latents, [name]), read(fixed, latents, [name])) == 0


@pytest.mark.parametrize("name", ["PixArt-Sigma", "Sana"])
def test_a_head_works_without_the_package_and_diffusers(
    name: str, randomize: Any, normal: Any, tmp_path: Path, run_elsewhere: Any
) -> None:
    """Truncated and folded, then in a process that can import neither."""
    backbone = build(name, PROMPTS["one token"], randomize, kept_blocks=2).float()
    config = backbone.config
    config.feature, config.num_labels = "blocks.1.query", 4
    model = ASelectDiffusionForImageClassification(config).eval()
    model.base_model.load_state_dict(backbone.state_dict())
    images = normal(2, 4, 8, 8)
    fixed = model.fix_timestep(70)
    fixed.save_pretrained(tmp_path / "model")
    arguments = (str(tmp_path / "model"), "AutoModelForImageClassification", "logits", json.dumps(images.tolist()))
    found = run_elsewhere(LOAD, *arguments, blocked=("aselect_hf", "diffusers"))
    model.base_model.config.timestep = model.config.timestep = 70
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found["numbers"]), model(images).logits, rtol=1e-4, atol=1e-4)


def test_a_prompt_is_needed_and_cannot_be_changed(family: str, randomize: Any) -> None:
    model = build(family, PROMPTS["one token"], randomize)
    fixed = model.fix_timestep(70)
    with pytest.raises(ValueError, match="another prompt is not possible: this model is fixed to timestep 70"):
        fixed.set_conditioning({"prompt_embeds": model.conditioning_prompt_embeds})
    model.conditioning_prompt_attention_mask[:] = torch.nan
    with pytest.raises(ValueError, match="needs the prompt, but prompt_attention_mask is not set"):
        model.fix_timestep(70)


def test_what_cannot_be_folded_is_named() -> None:
    model = tiny_model("Sana", transformer_config=SANA | {"norm_elementwise_affine": True})
    with pytest.raises(ValueError, match=r"SanaTransformer2DModel with norm_elementwise_affine=True cannot be fixed"):
        model.fix_timestep(70)
