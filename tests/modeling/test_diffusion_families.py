"""Networks of diffusers as backbones: each against the stock class, and against what its own pipeline passes to it."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification

from aselect_hf import (
    ASelectDiffusionBackbone,
    ASelectDiffusionConfig,
    ASelectDiffusionForImageClassification,
    ASelectDiffusionForSemanticSegmentation,
    ASelectDiffusionModel,
)
from aselect_hf.conversion.prompts import ENCODERS
from aselect_hf.modeling.families import FAMILIES

from .stock_families import ORACLES, stock_features
from .tiny_transformers import TINY, store_prompt, tiny_config, tiny_model


@pytest.fixture(params=TINY)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, randomize: Any) -> Any:
    return randomize(tiny_model(family))


@pytest.fixture
def latents(model: Any, normal: Any) -> torch.Tensor:
    return normal(2, model.config.num_channels, model.config.sample_size, model.config.sample_size)


def test_every_family_is_documented_and_tested() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    assert set(re.findall(r"^\| `(\w+2DModel)`", page, re.MULTILINE)) == set(FAMILIES) == set(ENCODERS)
    assert {fields["transformer_class"] for fields in TINY.values()} == set(FAMILIES) == set(ORACLES)


@torch.no_grad()
def test_every_feature_is_that_of_the_stock_network(model: Any, latents: torch.Tensor) -> None:
    timesteps = torch.tensor([40, 700])
    expected = stock_features(model.transformer, model.inputs(latents, timesteps), model.config)
    assert list(expected) == model.config.list_features()
    found = model.features_of_noisy(latents, timesteps, list(expected))
    for name, feature in expected.items():
        assert torch.equal(found[name], feature), name


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, tuple):
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    elif isinstance(expected, list):
        for value, other in zip(found, expected, strict=True):
            assert_same(value, other)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-5, atol=1e-5)
    else:
        assert found == expected


@torch.no_grad()
@pytest.mark.parametrize("side", [(8, 8), (4, 8), (8, 4)], ids=str)
def test_the_inputs_are_those_that_the_pipeline_passes(
    model: Any, latents: torch.Tensor, side: tuple[int, int]
) -> None:
    noisy, time, expected = ORACLES[model.config.transformer_class](model, latents[:1, :, : side[0], : side[1]])
    found = model.inputs(noisy, torch.tensor([time]))
    assert_same(found, expected)


@torch.no_grad()
def test_the_prediction_is_that_of_the_stock_network(model: Any, latents: torch.Tensor) -> None:
    output = model.transformer(**model.inputs(latents, torch.tensor([300, 300])), return_dict=False)[0]
    assert torch.equal(model.denoise(latents, 300), model.config.family.prediction(output, latents))


@torch.no_grad()
def test_the_first_blocks_give_the_same_features(family: str, model: Any, latents: torch.Tensor) -> None:
    for kept in range(1, model.config.num_hidden_layers):
        part = tiny_model(family, kept_blocks=kept).eval()
        report = part.load_state_dict(model.state_dict(), strict=False)
        assert not report.missing_keys
        assert part.num_parameters() < model.num_parameters()
        name = f"blocks.{kept - 1}.{part.config.kinds_of(kept - 1)[-1]}"
        expected = model.extract_features(latents=latents, feature=name)[name]
        assert torch.equal(part.extract_features(latents=latents, feature=name)[name], expected)
        with pytest.raises(ValueError, match=r"there is no block"):
            part(latents=latents, feature=f"blocks.{kept}.query")


@torch.no_grad()
def test_loading_restores_every_buffer(model: Any, latents: torch.Tensor, tmp_path: Path) -> None:
    """transformers builds on the meta device, where buffers that are not saved would be arbitrary memory."""
    model.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not any(x.is_meta for x in loaded.state_dict().values())
    names = model.config.list_features()
    expected, found = (each.extract_features(latents=latents, features=names) for each in (model, loaded))
    for name in names:
        assert torch.equal(found[name], expected[name]), name


def test_a_run_without_an_exception_gives_the_same_features(model: Any, latents: torch.Tensor) -> None:
    calls: list[int] = []
    for block, (_, module) in enumerate(model.blocks()):
        module.register_forward_hook(lambda *_, block=block: calls.append(block))
    for block in range(model.config.num_hidden_layers):
        name = f"blocks.{block}.query"
        model.early_exit = "raise"
        expected = model(latents=latents, feature=name).last_hidden_state
        calls.clear()
        model.early_exit = "block"
        found = model(latents=latents, feature=name).last_hidden_state
        assert torch.equal(found, expected)
        assert calls == list(range(block + 1))


def test_gradients_are_the_same_with_checkpointing(model: Any, latents: torch.Tensor) -> None:
    if not model.config.family.checkpointing:
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="gradient checkpointing"):
            model(latents=latents)
        return
    name = f"blocks.{model.config.num_hidden_layers - 1}.query"
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(latents=latents, feature=name).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_threads_read_their_own_features(model: Any, normal: Any) -> None:
    side, wrong = model.config.sample_size, []
    images = [normal(1, model.config.num_channels, side, side, seed=seed) for seed in range(2)]
    names = ["blocks.0.query", f"blocks.{model.config.num_hidden_layers - 1}.key"]
    with torch.no_grad():
        expected = [model(latents=x, feature=name).last_hidden_state for x, name in zip(images, names, strict=True)]

    @torch.no_grad()
    def request(index: int) -> None:
        for _ in range(20):
            found = model(latents=images[index], feature=names[index]).last_hidden_state
            wrong.extend([index] * (not torch.equal(found, expected[index])))

    threads = [threading.Thread(target=request, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
def test_a_copy_reads_its_own_features(model: Any, latents: torch.Tensor) -> None:
    twin = copy.deepcopy(model)
    expected = model(latents=latents).last_hidden_state
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(latents=latents).last_hidden_state, expected)


IN_SEVERAL_GRAPHS = {"Lumina2Transformer2DModel", "ZImageTransformer2DModel"}
"""Their classes read the lengths of the texts as numbers."""


@torch.no_grad()
def test_a_run_compiles_to_one_graph(model: Any, latents: torch.Tensor) -> None:
    whole = model.config.transformer_class not in IN_SEVERAL_GRAPHS
    run = torch.compile(model.run, backend="eager", fullgraph=whole)
    name, timesteps = "blocks.1.query", torch.tensor([10, 500])
    found, _ = run(latents, timesteps, None, [name])
    assert torch.equal(found[name], model.run(latents, timesteps, None, [name])[0][name])
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("head", [ASelectDiffusionForImageClassification, ASelectDiffusionForSemanticSegmentation])
def test_a_head_is_saved_and_loaded(family: str, head: Any, normal: Any, randomize: Any, tmp_path: Path) -> None:
    config = tiny_config(family, num_labels=3, pooling="attentive", head_features=["blocks.0.query", "blocks.1.hidden"])
    model = randomize(store_prompt(head(config)))
    latents = normal(2, config.num_channels, config.sample_size, config.sample_size)
    model.save_pretrained(tmp_path)
    assert torch.equal(head.from_pretrained(tmp_path)(latents=latents).logits, model(latents=latents).logits)


def test_keys_of_shared_heads_are_narrower(normal: Any) -> None:
    """Lumina-Image 2 has fewer heads for keys and values than for queries."""
    model = tiny_model("Lumina-Image 2")
    latents = normal(1, 4, 8, 8)
    for name in ("blocks.0.query", "blocks.0.key", "blocks.0.value", "blocks.0.hidden"):
        assert model(latents=latents, feature=name).last_hidden_state.shape[-1] == model.config.feature_width(name)
    with pytest.raises(ValueError, match=r"one width; blocks.0.query, blocks.0.key have \[12, 24\]"):
        model.config.feature_width("blocks.0.query", "blocks.0.key")


def test_a_backbone_gives_maps_of_its_stages(family: str, randomize: Any, normal: Any) -> None:
    config = tiny_config(family, out_features=["stage1", "stage2"])
    model = randomize(store_prompt(ASelectDiffusionBackbone(config)))
    images = normal(1, config.num_channels, config.sample_size, config.sample_size)
    maps = model(images).feature_maps
    assert [x.shape[1:] for x in maps] == [(config.hidden_size, *config.grid_size)] * 2
    expected = model.backbone.extract_features(images, feature="blocks.1.hidden", output_format="map")
    assert torch.equal(maps[1], next(iter(expected.values()))[:, 0])


LOAD = """
import transformers
folder, images = sys.argv[2:]
model = transformers.AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
logits = model(latents=torch.tensor(json.loads(images))).logits
report({"logits": logits.tolist(), "module": type(model).__module__, "package": "aselect_hf" in sys.modules})
"""


def test_a_folder_loads_without_the_package(
    family: str, normal: Any, randomize: Any, run_elsewhere: Callable[..., Any], tmp_path: Path
) -> None:
    model = randomize(store_prompt(ASelectDiffusionForImageClassification(tiny_config(family, num_labels=3))))
    side = model.config.sample_size
    latents = normal(2, model.config.num_channels, side, side)
    model.save_pretrained(tmp_path / "model")
    found = run_elsewhere(LOAD, str(tmp_path / "model"), json.dumps(latents.tolist()))
    with torch.no_grad():
        expected = model(latents=latents).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=0, atol=1e-6)
    assert found["module"].startswith("transformers_modules.")
    assert not found["package"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"transformer_class": "UNet2DConditionModel"},
            r"not supported: it is a U-Net.*supported are SD3.*families.md",
        ),
        ({"kept_blocks": 4}, r"kept_blocks must be in 1\.\.3"),
        ({"guidance": 3.5}, "takes no guidance"),
        ({"image_size": 16}, r"end at a patch grid of 6x6, which is image_size=12"),
        ({"conditioning": {"prompt_embeds": [5, 12]}}, "pooled_prompt_embeds"),
        ({"conditioning": {"prompt_embeds": [5, 13], "pooled_prompt_embeds": [10]}}, "joint_attention_dim=12"),
        ({"transformer_config": {"num_layers": 0}}, "num_layers"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ASelectDiffusionConfig(**(TINY["SD3"] | fields))


def test_a_model_without_its_prompt_gives_no_numbers(randomize: Any, normal: Any) -> None:
    model = randomize(ASelectDiffusionModel(tiny_config("SD3")))
    with pytest.raises(ValueError, match="NaN or infinite"):
        model(latents=normal(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"prompt_embeds must be \(5, 12\), got \(4, 12\)"):
        model.set_conditioning({"prompt_embeds": torch.zeros(4, 12), "pooled_prompt_embeds": torch.zeros(10)})
    with pytest.raises(ValueError, match="read blocks"):
        store_prompt(model)(latents=normal(1, 4, 8, 8), output_hidden_states=True)
    with pytest.raises(ValueError, match="positions of this network end"):
        model(latents=normal(1, 4, 16, 16))


def test_the_head_of_a_plain_backbone_is_new(randomize: Any, tmp_path: Path) -> None:
    randomize(tiny_model("SD3")).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7)
    assert isinstance(model.classifier, nn.Module)
    assert model.config.num_labels == 7


def test_every_block_has_projections_for_adapters(model: Any) -> None:
    """With LoRA on `attention_projections`, no block of any stack is left as it is."""
    last = f"blocks.{model.config.num_hidden_layers - 1}.hidden"
    names, known = model.attention_projections([last]), dict(model.named_modules())
    adapted = {id(known[name]) for name in names}
    for _, block in model.blocks():
        assert adapted & {id(module) for module in block.modules()}


def test_an_adapter_changes_the_feature_it_is_on(model: Any, latents: torch.Tensor) -> None:
    """peft puts a module of its own in the place of the one whose output is the feature."""
    peft = pytest.importorskip("peft")
    before = model(latents=latents, feature="blocks.1.query").last_hidden_state
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=model.attention_projections(["blocks.1.query"]), init_lora_weights=False)
    )
    found = adapted(latents=latents, feature="blocks.1.query").last_hidden_state
    assert not torch.allclose(found, before, atol=1e-3)
    found.square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    merged = adapted.merge_and_unload()(latents=latents, feature="blocks.1.query").last_hidden_state
    torch.testing.assert_close(merged, found, rtol=1e-3, atol=1e-3)
