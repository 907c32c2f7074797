"""The backbone: stages, tokens, early exit, and the models of transformers that take a `backbone_config`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoBackbone,
    DetrConfig,
    DetrForObjectDetection,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from aselect_hf import ASelectDiTBackbone, ASelectDiTConfig


@pytest.fixture
def make_backbone(make_config: Any, randomize: Any) -> Callable[..., ASelectDiTBackbone]:
    return lambda **config: randomize(ASelectDiTBackbone(make_config(**config)))


@pytest.fixture
def images(normal: Any) -> torch.Tensor:
    return normal(2, 2, 8, 12)


# ------------------------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize("kind", ["hidden", "query", "mlp_gated"])
def test_stages_are_features_of_blocks(make_backbone: Any, images: torch.Tensor, kind: str) -> None:
    backbone = make_backbone(out_features=["stage1", "stage3"], stage_kind=kind, num_noise_draws=2)
    maps = backbone(images).feature_maps
    names = [f"blocks.0.{kind}", f"blocks.2.{kind}"]
    expected = backbone.dit.extract_features(images, features=names, output_format="map")
    assert backbone.channels == [24, 24]
    for name, feature_map in zip(names, maps, strict=True):
        assert feature_map.shape == (2, 24, 4, 6)
        torch.testing.assert_close(feature_map, expected[name][:, 0])


@pytest.mark.parametrize("out_features", [["stem"], ["stem", "stage2"], ["stem", "stage1", "stage2", "stage3"]])
def test_the_stem_is_the_input_of_the_first_block(
    make_backbone: Any, images: torch.Tensor, out_features: list[str]
) -> None:
    backbone = make_backbone(out_features=out_features)
    output = backbone(images)
    hidden_states = backbone(images, output_hidden_states=True).hidden_states
    assert output.hidden_states is None
    assert isinstance(backbone(images, return_dict=False), tuple)
    assert len(output.feature_maps) == len(out_features)
    for stage, feature_map in zip(out_features, output.feature_maps, strict=True):
        expected = hidden_states[backbone.stage_names.index(stage)]
        torch.testing.assert_close(feature_map.flatten(2).mT, expected)


def test_no_block_after_the_deepest_stage_runs_or_trains(make_backbone: Any, images: torch.Tensor) -> None:
    backbone = make_backbone(out_indices=[1, 2])
    ran = []
    for index, layer in enumerate(backbone.dit.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    sum(feature_map.sum() for feature_map in backbone(images).feature_maps).backward()
    assert ran == [0, 1]
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_tokens_come_with_their_mean_first(make_backbone: Any, images: torch.Tensor) -> None:
    backbone = make_backbone(out_indices=[1, 3], reshape_hidden_states=False)
    maps = make_backbone(out_indices=[1, 3])(images).feature_maps
    for tokens, feature_map in zip(backbone(images).feature_maps, maps, strict=True):
        assert tokens.shape == (2, 1 + 24, 24)
        torch.testing.assert_close(tokens[:, 1:], feature_map.flatten(2).mT)
        torch.testing.assert_close(tokens[:, 0], feature_map.mean(dim=(2, 3)))


def test_stages_are_aligned_and_checked(make_config: Any) -> None:
    assert make_config().out_features == ["stage3"]
    assert make_config(out_features=["stem", "stage2"]).out_indices == [0, 2]
    assert make_config(out_indices=[-1]).out_features == ["stage3"]
    with pytest.raises(ValueError, match="out_features must be a subset"):
        make_config(out_features=["stage4"])


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_a_backbone_loads_from_a_plain_checkpoint(make_model: Any, images: torch.Tensor, tmp_path: Path) -> None:
    plain = make_model()
    plain.save_pretrained(tmp_path)
    backbone = ASelectDiTBackbone.from_pretrained(tmp_path, out_indices=[1, 2])
    expected = plain.extract_features(images, features=["blocks.1.hidden"], output_format="map")
    torch.testing.assert_close(backbone(images).feature_maps[1], expected["blocks.1.hidden"][:, 0])
    assert not backbone.dit.layers[2].mlp.fc1.weight.requires_grad
    backbone.save_pretrained(tmp_path / "backbone")
    again = ASelectDiTBackbone.from_pretrained(tmp_path / "backbone")
    assert again.out_features == ["stage1", "stage2"]
    assert torch.equal(again(images).feature_maps[1], backbone(images).feature_maps[1])


def test_auto_backbone(make_config: Any) -> None:
    assert isinstance(AutoBackbone.from_config(make_config(out_indices=[1])), ASelectDiTBackbone)


# ----------------------------------------------------------------------------------------------- inside other models


def upernet(backbone: ASelectDiTConfig) -> tuple[Any, dict[str, torch.Tensor]]:
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, auxiliary_in_channels=24, auxiliary_channels=8, num_labels=3
    )
    return UperNetForSemanticSegmentation(config), {"labels": torch.randint(3, (2, 16, 16))}


def detr(backbone: ASelectDiTConfig) -> tuple[Any, dict[str, Any]]:
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, num_queries=4, num_labels=3, **small, **heads
    )
    box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.2]])}
    return DetrForObjectDetection(config), {"labels": [box, box]}


def mask2former(backbone: ASelectDiTConfig) -> tuple[Any, dict[str, Any]]:
    small = {"hidden_dim": 32, "encoder_feedforward_dim": 16, "dim_feedforward": 16, "mask_feature_size": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 4, "feature_size": 32}
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=3, train_num_points=16, **small, **layers)
    labels = {"mask_labels": [torch.rand(2, 16, 16).round()] * 2, "class_labels": [torch.tensor([0, 1])] * 2}
    return Mask2FormerForUniversalSegmentation(config), labels


def dpt(backbone: ASelectDiTConfig) -> tuple[Any, dict[str, Any]]:
    config = DPTConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
        readout_type="project",
    )
    return DPTForDepthEstimation(config), {}


def prediction(output: Any) -> torch.Tensor:
    names = ("predicted_depth", "masks_queries_logits", "logits")
    return next(output[name] for name in names if output.get(name) is not None)


@pytest.mark.parametrize("as_dict", [False, True], ids=["config", "dict"])
@pytest.mark.parametrize("build", [upernet, detr, mask2former, dpt], ids=lambda build: build.__name__)
def test_models_of_transformers_take_it_as_backbone(
    make_config: Any, normal: Any, tmp_path: Path, build: Any, as_dict: bool
) -> None:
    torch.manual_seed(0)
    stages = [1, 2, 3, 4]
    config = make_config(
        num_hidden_layers=4, sample_size=16, out_indices=stages, reshape_hidden_states=build is not dpt
    )
    model, labels = build(config.to_dict() if as_dict else config)
    backbone = next(module for module in model.modules() if isinstance(module, ASelectDiTBackbone))
    assert backbone.out_indices == stages
    images = normal(2, 2, 16, 16)
    output = model.train()(images, **labels)
    (output.loss if labels else output.predicted_depth.sum()).sum().backward()
    assert backbone.dit.patch_embedding.weight.grad is not None
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = prediction(model(images))
        found = prediction(type(model).from_pretrained(tmp_path)(images))
    torch.testing.assert_close(found, expected)


def test_other_backbones_still_work() -> None:
    """Registering ours takes nothing from transformers' own."""
    backbone = AutoBackbone.from_config(SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=32))
    assert backbone(torch.zeros(1, 3, 32, 32)).feature_maps
