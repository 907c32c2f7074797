"""The model as other programs see it: keyword arguments, hooked blocks, exported files, names in the config."""

from __future__ import annotations

import ast
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.utils import TransformersKwargs

import aselect_hf.modeling
from aselect_hf import (
    ASelectDiTBackbone,
    ASelectDiTConfig,
    ASelectDiTForImageClassification,
    ASelectDiTForSemanticSegmentation,
    ASelectDiTModel,
)
from aselect_hf.conversion import save_model
from aselect_hf.modeling.features import FEATURE_KINDS, parse_feature

CLASSES = (ASelectDiTModel, ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation, ASelectDiTBackbone)
NONE = ["input_ids", "attention_mask", "inputs_embeds", *TransformersKwargs.__annotations__]
HEADS = {
    ASelectDiTForImageClassification: "image-classification",
    ASelectDiTForSemanticSegmentation: "image-segmentation",
}


@pytest.fixture(params=CLASSES, ids=lambda model_class: model_class.__name__)
def anyone(request: pytest.FixtureRequest, make_config: Any, randomize: Any) -> Any:
    """One model of every class."""
    return randomize(request.param(make_config(num_channels=3, num_labels=4)))


@pytest.fixture
def images(normal: Any) -> torch.Tensor:
    return normal(2, 3, 8, 8)


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", ["t", "bogus", "features", "class_label", "labelz", "output_hidden_state"])
def test_an_unknown_argument_is_an_error(anyone: Any, images: torch.Tensor, name: str, fixed: bool) -> None:
    model = anyone.fix_timestep() if fixed else anyone
    with pytest.raises(TypeError, match=rf"{type(model).__name__}\.forward\(\) got an unexpected .*'{name}'"):
        model(images, **{name: 500})


@pytest.mark.parametrize(
    ("name", "right"), [("t", "timestep"), ("timesteps", "timestep"), ("features", "feature"), ("nois", "noise")]
)
def test_the_error_names_the_right_spelling(model: Any, normal: Any, name: str, right: str) -> None:
    with pytest.raises(TypeError, match=f"'{name}': did you mean {right}="):
        model(normal(1, 2, 8, 8), **{name: 500})


@pytest.mark.parametrize("model_class", HEADS)
def test_a_head_asks_for_labels(make_config: Any, images: torch.Tensor, model_class: type) -> None:
    with pytest.raises(TypeError, match="'label': did you mean labels="):
        model_class(make_config(num_channels=3))(images, label=torch.zeros(2).long())


@pytest.mark.parametrize(
    ("name", "right"), [("t", "timestep"), ("layer", "feature"), ("outputformat", "output_format")]
)
def test_extract_features_names_the_right_spelling(model: Any, normal: Any, name: str, right: str) -> None:
    with pytest.raises(TypeError, match=rf"extract_features\(\) .*'{name}': did you mean {right}="):
        model.extract_features(normal(1, 2, 8, 8), **{name: 500})


@pytest.mark.parametrize("steps", [np.array([7, 40]), torch.tensor([7, 40]), (7, 40)], ids=type)
def test_timesteps_come_in_any_array(model: Any, normal: Any, steps: Any) -> None:
    latents = normal(1, 2, 8, 8)
    with pytest.raises(ValueError, match="timestep must be an integer"):
        model(latents, timestep=steps)
    found = model.extract_features(latents, timestep=steps)
    expected = model.extract_features(latents, timesteps=[7, 40])
    for name, feature in expected.items():
        assert torch.equal(found[name], feature)


def test_extract_features_takes_the_spelling_of_forward(model: Any, normal: Any) -> None:
    latents = normal(2, 2, 8, 8)
    found = model.extract_features(latents, feature="blocks.0.key", timestep=7)
    assert torch.equal(
        found["blocks.0.key"][:, 0], model(latents, feature="blocks.0.key", timestep=7).last_hidden_state
    )
    many = model.extract_features(latents, feature=["blocks.0.key", "blocks.1.mlp"], timestep=[7, 40])
    same = model.extract_features(latents, features=["blocks.0.key", "blocks.1.mlp"], timesteps=[7, 40])
    assert all(torch.equal(many[name], same[name]) for name in same)
    for both in ({"feature": "blocks.0.key", "features": ["blocks.0.key"]}, {"timestep": 1, "timesteps": [1]}):
        with pytest.raises(TypeError, match="not both"):
            model.extract_features(latents, **both)


@pytest.mark.parametrize("name", NONE)
def test_what_wrappers_hand_to_every_model_changes_nothing(anyone: Any, images: torch.Tensor, name: str) -> None:
    expected, found = anyone(images).to_tuple()[0], anyone(images, **{name: None}).to_tuple()[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"num_items_in_batch": torch.tensor(3)}, {"interpolate_pos_encoding": True}])
def test_what_has_no_effect_is_accepted(anyone: Any, images: torch.Tensor, options: dict[str, Any]) -> None:
    torch.testing.assert_close(anyone(images, **options).to_tuple()[0], anyone(images).to_tuple()[0], rtol=0, atol=0)


def test_a_mask_is_refused(anyone: Any, images: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="does not use attention_mask: every patch attends to every other"):
        anyone(images, attention_mask=torch.ones(2, 16))


# --------------------------------------------------------------------------------------------------- blocks and shapes


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_a_hooked_block_returns_a_tensor(make_model: Any, normal: Any, kind: str, fixed: bool) -> None:
    """As transformers' own blocks do; the last one that runs returns the feature."""
    model = make_model(feature=f"blocks.1.{kind}")
    model, outputs = model.fix_timestep() if fixed else model, []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    found = model(normal(2, 2, 8, 8)).last_hidden_state
    assert [type(output) for output in outputs] == [torch.Tensor] * 2
    assert torch.equal(outputs[1], found)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_recorded_hidden_states_are_outputs_of_blocks(make_model: Any, normal: Any, kind: str, fixed: bool) -> None:
    model, latents = make_model(feature=f"blocks.1.{kind}"), normal(2, 2, 8, 8)
    expected = [model(latents, feature=f"blocks.{index}.hidden").last_hidden_state for index in range(3)]
    hidden = (model.fix_timestep() if fixed else model)(latents, output_hidden_states=True).hidden_states[1:]
    assert len(hidden) == (3 if not fixed else 1 + (kind == "hidden"))
    for mine, other in zip(hidden, expected, strict=False):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_nothing_fixes_the_batch_of_an_exported_file() -> None:
    """`unflatten` writes the example's batch into an ONNX file, and `len` of a tensor into every exported program."""
    tensors = {"pixel_values", "latents", "noisy_latents", "noisy", "tokens", "images", "hidden_states", "labels"}
    for path in Path(aselect_hf.modeling.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            assert not (
                isinstance(node.func, ast.Attribute) and node.func.attr == "unflatten" and "ratio" not in path.name
            )
            if isinstance(node.func, ast.Name) and node.func.id == "len":
                assert ast.unparse(node.args[0]) not in tensors, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_traced_onnx_file_runs_any_batch(
    make_config: Any, randomize: Any, normal: Any, tmp_path: Path, batch: int, fixed: bool
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = randomize(ASelectDiTForImageClassification(make_config(num_labels=4, pooling="attentive")))
    model = (model.fix_timestep() if fixed else model).eval()
    model.config.return_dict = False
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    axes = {"pixel_values": {0: "batch"}, "logits": {0: "batch"}}
    example = (normal(batch, 2, 8, 8),)
    torch.onnx.export(model, example, tmp_path / "model.onnx", dynamo=False, dynamic_axes=axes, **names)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size in (1, 2, 5):
        images = normal(size, 2, 8, 8, seed=size)
        (logits,) = session.run(None, {"pixel_values": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images)[0], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- names that other programs read


def test_a_config_has_the_names_of_a_vit(make_config: Any) -> None:
    config = make_config(mlp_ratio=2.5, mlp_norm_eps=1e-5, attention_bias=False, attention_dropout=0.1)
    assert (config.intermediate_size, config.layer_norm_eps, config.qkv_bias) == (60, 1e-5, False)
    assert (config.attention_probs_dropout_prob, config.hidden_dropout_prob) == (0.1, 0.0)
    assert not {"intermediate_size", "qkv_bias"} & config.to_dict().keys()
    assert ASelectDiTConfig.from_dict(config.to_dict()).intermediate_size == 60
    with pytest.raises(ValueError, match="intermediate_size is read-only: set mlp_ratio"):
        make_config(intermediate_size=7)
    config.layer_norm_eps, config.hidden_dropout_prob = 1e-3, 0.0
    assert config.mlp_norm_eps == 1e-3
    with pytest.raises(ValueError, match=r"hidden_dropout_prob must be 0, got 0\.1"):
        config.hidden_dropout_prob = 0.1


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (50, 67)])
def test_a_backbone_pads_what_is_no_multiple_of_the_patch(
    make_config: Any, randomize: Any, normal: Any, size: tuple[int, int]
) -> None:
    backbone = randomize(ASelectDiTBackbone(make_config(out_indices=[1, 3])))
    images = normal(2, 2, *size)
    height, width = (-(-side // 2) for side in size)
    padded = torch.zeros(2, 2, 2 * height, 2 * width)
    padded[..., : size[0], : size[1]] = images
    with torch.no_grad():
        for found, expected in zip(backbone(images).feature_maps, backbone(padded).feature_maps, strict=True):
            assert found.shape == (2, 24, height, width)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("feature", ["blocks.1.attention_norm", "blocks.1.key", "blocks.1.attention", "blocks.0.mlp"])
def test_adapters_belong_where_the_features_come_from(
    make_config: Any, randomize: Any, normal: Any, feature: str, fixed: bool
) -> None:
    """The projections named are those whose weights get a gradient."""
    model = randomize(ASelectDiTForImageClassification(make_config(feature=feature)))
    model = model.fix_timestep() if fixed else model
    model.requires_grad_(True)
    model(normal(2, 2, 8, 8)).logits.sum().backward()
    linears = [name for name, module in model.dit.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    moved = [
        name
        for name in linears
        if name.endswith("_proj") and model.dit.layers.get_submodule(name).weight.grad is not None
    ]
    assert sorted(model.attention_projections()) == sorted(f"dit.layers.{name}" for name in moved)
    assert [f"dit.{name}" for name in model.dit.attention_projections()] == model.attention_projections()
    assert (
        max(int(name.split(".")[2]) for name in model.attention_projections() or ["..0"])
        <= parse_feature(feature, 3).block
    )


@pytest.mark.parametrize("model_class", HEADS)
def test_pipelines_know_the_model(
    make_config: Any, randomize: Any, tmp_path: Path, caplog: Any, model_class: type
) -> None:
    save_model(randomize(model_class(make_config(num_channels=3, num_labels=3))), tmp_path)
    logging.getLogger("transformers").propagate = True
    run: Any = pipeline(HEADS[model_class], model=str(tmp_path), trust_remote_code=False)
    run(Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)))
    assert "is not supported" not in caplog.text
