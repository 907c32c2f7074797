"""Classification and segmentation heads: features, losses, gradients, freezing, checkpoints, LoRA, errors."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from aselect_hf import ASelectDiTConfig, ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation
from aselect_hf.modeling.features import FEATURE_KINDS
from aselect_hf.modeling.heads import ASelectDiTClassificationHead

FOUR = ["blocks.0.query", "blocks.0.mlp", "blocks.1.hidden", "blocks.2.attention"]
HEADS: dict[str, tuple[type, dict[str, Any]]] = {
    "mean": (ASelectDiTForImageClassification, {}),
    "mean-batch-norm": (ASelectDiTForImageClassification, {"head_norm": "batch_norm"}),
    "attentive": (ASelectDiTForImageClassification, {"pooling": "attentive", "head_features": FOUR}),
    "transformer": (
        ASelectDiTForImageClassification,
        {"pooling": "transformer", "pooling_width": 16, "head_norm": "none", "head_features": FOUR[:2]},
    ),
    "fused-timesteps": (
        ASelectDiTForImageClassification,
        {"head_features": ["blocks.-1.key", "blocks.0.value"], "head_timesteps": [10, 500]},
    ),
    "linear": (ASelectDiTForSemanticSegmentation, {}),
    "linear-fused": (
        ASelectDiTForSemanticSegmentation,
        {"head_norm": "batch_norm", "head_features": FOUR[:2], "head_timesteps": [10, 20, 30]},
    ),
    "upernet": (
        ASelectDiTForSemanticSegmentation,
        {"segmentation_head": "upernet", "segmentation_head_channels": 16},
    ),
    "upernet-four": (
        ASelectDiTForSemanticSegmentation,
        {
            "segmentation_head": "upernet",
            "segmentation_head_channels": 16,
            "head_features": FOUR,
            "head_timesteps": [10, 20],
        },
    ),
}
LABELS = 4


@pytest.fixture(params=HEADS)
def build(request: pytest.FixtureRequest, make_config: Any, randomize: Any) -> Any:
    """`build(**config)`: the model of one head, with random weights."""
    model_class, options = HEADS[request.param]
    return lambda **config: randomize(model_class(make_config(**({"num_labels": LABELS} | options | config))))


@pytest.fixture(params=[name for name, (model_class, _) in HEADS.items() if "Segmentation" in model_class.__name__])
def build_segmenter(request: pytest.FixtureRequest, make_config: Any, randomize: Any) -> Any:
    """`build` for the segmentation heads."""
    model_class, options = HEADS[request.param]
    return lambda **config: randomize(model_class(make_config(**({"num_labels": LABELS} | options | config))))


@pytest.fixture
def images(normal: Any) -> torch.Tensor:
    return normal(3, 2, 8, 8)


def labels_for(model: Any) -> torch.Tensor:
    """Random labels for three images: classes, or maps of four quadrants with some ignored pixels."""
    generator = torch.Generator().manual_seed(4)
    if isinstance(model, ASelectDiTForImageClassification):
        return torch.randint(LABELS, (3,), generator=generator)
    labels = torch.randint(LABELS, (3, 2, 2), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[:, :2] = 255
    return labels


# ------------------------------------------------------------------------------------------------- forward, backward


def test_logits_and_loss(build: Any, images: torch.Tensor) -> None:
    model = build()
    labels = labels_for(model)
    with torch.no_grad():
        output = model(images, labels=labels)
        assert torch.equal(model(latents=images).logits, output.logits)
        assert torch.equal(model(images, labels=labels, return_dict=False)[1], output.logits)
        model.config.return_dict = False
        assert torch.equal(model(images)[0], output.logits)
        model.config.return_dict = True
        torch.testing.assert_close(model(images[1:2]).logits, output.logits[1:2], rtol=1e-4, atol=1e-4)
    logits = output.logits
    if labels.ndim == 3:
        side = 16 if model.config.segmentation_head == "upernet" else 4
        assert logits.shape == (3, LABELS, side, side)
        logits = F.interpolate(logits, size=(8, 8), mode="bilinear")
    else:
        assert logits.shape == (3, LABELS)
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, labels, ignore_index=255))


def test_exactly_the_trainable_parameters_get_a_gradient(build: Any, images: torch.Tensor) -> None:
    model = build().train()
    model(images, labels=labels_for(model)).loss.backward()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable
    assert {name for name in trainable if not name.startswith("dit.")}
    assert "dit.patch_embedding.weight" in trainable
    assert "dit.final_layer.proj.weight" not in trainable


@pytest.mark.parametrize("kind", FEATURE_KINDS)
@pytest.mark.parametrize("per_block_conditioning", [False, True])
def test_every_kind_of_feature_trains_what_it_depends_on(
    make_config: Any, randomize: Any, images: torch.Tensor, kind: str, per_block_conditioning: bool
) -> None:
    config = make_config(feature=f"blocks.1.{kind}", num_labels=3, per_block_conditioning=per_block_conditioning)
    model = randomize(ASelectDiTForImageClassification(config)).train()
    model(images, labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    assert not any(parameter.requires_grad for parameter in model.dit.layers[2].parameters())


def test_training_lowers_the_loss(build: Any, images: torch.Tensor) -> None:
    model = build().train()
    labels = labels_for(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_hidden_states_and_attentions_of_the_first_timestep(build: Any, images: torch.Tensor) -> None:
    model = build(attn_implementation="eager")
    with torch.no_grad():
        output = model(images, output_hidden_states=True, output_attentions=True)
        first = (model.config.head_timesteps or [None])[0]
        expected = model.dit(images, timestep=first, output_hidden_states=True).hidden_states
    assert len(output.hidden_states) == 4
    assert len(output.attentions) == 3
    assert all(torch.equal(found, state) for found, state in zip(output.hidden_states, expected, strict=True))
    assert torch.equal(output.logits, model(images).logits)


def test_another_resolution(build: Any, normal: Any) -> None:
    model = build()
    logits = model(normal(1, 2, 12, 6)).logits
    factor = 4 if model.config.segmentation_head == "upernet" else 1
    expected = (6 * factor, 3 * factor) if logits.ndim == 4 else ()
    assert logits.shape == (1, LABELS, *expected)


def test_half_precision(build: Any, images: torch.Tensor) -> None:
    model = build()
    expected = model(images).logits
    found = model.to(torch.bfloat16)(images).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).square().mean().sqrt() < 0.1 * expected.square().mean().sqrt()


# ----------------------------------------------------------------------------------------------- what the heads read


def test_features_and_timesteps_are_concatenated_in_order(make_config: Any, images: torch.Tensor) -> None:
    names, steps = ["blocks.2.key", "blocks.0.hidden"], [500, 10, 40]
    model = ASelectDiTForImageClassification(make_config(head_features=names, head_timesteps=steps)).eval()
    with torch.no_grad():
        tokens, _ = model.read_features(images)
    expected = model.dit.extract_features(images, features=names, timesteps=steps)
    assert tokens.shape == (3, 16, 2, 3 * 24)
    for index, name in enumerate(names):
        torch.testing.assert_close(tokens[:, :, index], expected[name].transpose(1, 2).flatten(2))


def test_a_mean_head_is_linear_probing(make_config: Any, randomize: Any, images: torch.Tensor) -> None:
    model = randomize(ASelectDiTForImageClassification(make_config(num_labels=LABELS)))
    head = model.classifier
    pooled = model.dit(images).pooler_output
    expected = F.linear(
        F.layer_norm(pooled, (24,), head.norm.norm.weight, head.norm.norm.bias), head.linear.weight, head.linear.bias
    )
    torch.testing.assert_close(model(images).logits, expected)


def test_attentive_pooling_ignores_the_order_of_tokens_and_starts_near_their_mean(
    make_config: Any, normal: Any
) -> None:
    pooling = ASelectDiTForImageClassification(make_config(pooling="attentive")).classifier.pooling
    tokens = normal(2, 16, 24)
    pooled = pooling(tokens)
    torch.testing.assert_close(pooling(tokens.flip(1)), pooled)
    torch.testing.assert_close(pooled, pooling.value(pooling.norm(tokens)).mean(1), atol=0.1, rtol=0)
    pooling.query.data.normal_()
    assert not torch.allclose(pooling(tokens), pooled, atol=0.05)


def test_the_transformer_head_has_the_shape_of_the_authors(make_config: Any, normal: Any) -> None:
    """Their log of Stable Diffusion 3 medium on CUB counts 16,766,600 parameters that train."""
    with torch.device("meta"):
        config = make_config(pooling="transformer", head_norm="none", num_labels=200)
        head = ASelectDiTClassificationHead(config, 1, 1536)
    assert sum(parameter.numel() for parameter in head.parameters()) == 16_766_600
    pooling = ASelectDiTForImageClassification(make_config(pooling="transformer", pooling_width=16)).classifier.pooling
    tokens = normal(2, 16, 24)
    torch.testing.assert_close(pooling(tokens.flip(1)), pooling(tokens))
    assert 0 < pooling.class_token.std() < 0.1
    pooling.class_token.data.normal_()
    assert not torch.allclose(pooling(tokens)[0], pooling(tokens)[1], atol=1e-3)


def test_linear_segmentation_keeps_tokens_apart(make_config: Any, randomize: Any, normal: Any) -> None:
    """The head of one token sees that token only, and puts it where it belongs."""
    head = randomize(ASelectDiTForSemanticSegmentation(make_config(num_labels=LABELS))).decode_head
    tokens = normal(1, 6, 1, 24)
    changed = tokens.clone()
    changed[0, 5] += 1 + normal(1, 24, seed=2)
    difference = (head(tokens, (2, 3)) != head(changed, (2, 3))).any(1)[0]
    assert difference.nonzero().tolist() == [[1, 2]]


# ------------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize(
    ("given", "labels", "loss", "problem_type"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1]), F.cross_entropy, "single_label_classification"),
        (None, torch.tensor([0, 2, 1]), F.cross_entropy, "single_label_classification"),
        (None, torch.eye(3), F.binary_cross_entropy_with_logits, "multi_label_classification"),
        ("regression", torch.eye(3), F.mse_loss, "regression"),
    ],
)
def test_problem_types(
    make_config: Any, images: torch.Tensor, given: str | None, labels: torch.Tensor, loss: Any, problem_type: str
) -> None:
    model = ASelectDiTForImageClassification(make_config(num_labels=3, problem_type=given)).eval()
    output = model(images, labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))
    assert model.config.problem_type == problem_type


@pytest.mark.parametrize("ignored", [255, -1, 3])
def test_ignored_pixels_change_nothing(build_segmenter: Any, images: torch.Tensor, ignored: int) -> None:
    model = build_segmenter(semantic_loss_ignore_index=ignored)
    labels = torch.randint(3, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    labels[:, 3:] = ignored
    logits = F.interpolate(model(images).logits, size=(8, 8), mode="bilinear")
    expected = F.cross_entropy(logits[:, :, :3], labels[:, :3])
    torch.testing.assert_close(model(images, labels=labels).loss, expected)


def test_labels_may_have_any_resolution(build_segmenter: Any, images: torch.Tensor) -> None:
    model = build_segmenter()
    labels = torch.randint(LABELS, (3, 21, 13), generator=torch.Generator().manual_seed(0))
    logits = F.interpolate(model(images).logits, size=(21, 13), mode="bilinear")
    torch.testing.assert_close(model(images, labels=labels).loss, F.cross_entropy(logits, labels))


# ---------------------------------------------------------------------------------------------------------- freezing


def test_a_frozen_backbone_stays_in_evaluation_mode_and_bit_equal(build: Any, images: torch.Tensor) -> None:
    model = build(attention_dropout=0.5)
    model.freeze_backbone()
    model.train()
    assert not any(module.training for module in model.dit.modules())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(images, labels=labels_for(model)).loss.backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not {name for name in changed if name.startswith("dit.")}
    assert not model.eval().training


def test_an_unfrozen_backbone_trains(build: Any) -> None:
    model = build().train()
    assert model.dit.training
    model.freeze_backbone()
    assert not model.dit.training
    model.dit.requires_grad_(True)
    assert model.train().dit.training


def test_the_vae_is_never_trained(make_config: Any, tiny_kl: Any, normal: Any) -> None:
    fields = {key: value for key, value in dict(tiny_kl.config).items() if not key.startswith("_")}
    config = make_config(vae_config={"_class_name": "AutoencoderKL"} | fields, num_channels=4, num_labels=3)
    model = ASelectDiTForImageClassification(config).train()
    assert not any(module.training for module in model.dit.vae.modules())
    model(normal(3, 3, 16, 16), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.dit.vae.parameters())


def test_lora_on_the_attention_projections(build: Any, images: torch.Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build()
    head = "classifier" if isinstance(model, ASelectDiTForImageClassification) else "decode_head"
    base = copy.deepcopy(model)
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=[head], init_lora_weights=True)
    )
    torch.testing.assert_close(lora(images).logits, base(images).logits)
    before = copy.deepcopy(lora.state_dict())
    lora.train()
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        lora(images, labels=labels_for(model)).loss.backward()
        optimizer.step()
    changed = {name for name, tensor in lora.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all("lora_" in name or f"{head}.modules_to_save" in name for name in changed)
    assert any("lora_B" in name for name in changed)
    lora.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(images).logits, lora(images).logits)
    torch.testing.assert_close(lora.merge_and_unload()(images).logits, loaded(images).logits, rtol=1e-3, atol=1e-3)


def test_lora_of_the_blocks_that_are_read_leaves_nothing_without_a_gradient(
    make_config: Any, randomize: Any, images: torch.Tensor
) -> None:
    peft = pytest.importorskip("peft")
    model = randomize(ASelectDiTForImageClassification(make_config(num_labels=LABELS, feature="blocks.2.key")))
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        modules_to_save=["classifier"],
    )
    lora = peft.get_peft_model(model, config).train()
    lora(images, labels=labels_for(model)).loss.backward()
    trainable = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert sum("lora_" in name for name in trainable) == 2 * 2 * 2
    assert {name for name, parameter in lora.named_parameters() if parameter.grad is not None} == trainable


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_a_loaded_checkpoint_gives_the_same_numbers(build: Any, images: torch.Tensor, tmp_path: Path) -> None:
    model = build(id2label={0: "ant", 1: "bee", 2: "cat", 3: "dog"}, num_noise_draws=2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    # A loaded file's weights lie elsewhere in memory: alignment alone changes the last bit of some convolutions.
    torch.testing.assert_close(loaded(images).logits, model(images).logits, rtol=0, atol=1e-6)
    assert loaded.config.id2label[3] == "dog"
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if not parameter.requires_grad} == frozen


def test_a_head_starts_from_a_plain_checkpoint(
    build: Any, make_model: Any, images: torch.Tensor, tmp_path: Path
) -> None:
    plain = make_model(feature="blocks.0.mlp", timestep=77, selection={"method": "hfr"}, num_noise_draws=2)
    plain.save_pretrained(tmp_path)
    example = build()
    options = {
        key: getattr(example.config, key) for key in ("head_norm", "pooling", "pooling_width", "segmentation_head")
    }
    loaded, report = type(example).from_pretrained(tmp_path, output_loading_info=True, num_labels=7, **options)
    assert {name.partition(".")[0] for name in report["missing_keys"]} <= {"classifier", "decode_head"}
    assert not report["unexpected_keys"]
    assert loaded.config.timestep == 77
    assert loaded.config.feature == "blocks.0.mlp"
    assert loaded.config.selection == {"method": "hfr"}
    assert loaded(images).logits.shape[1] == 7
    assert torch.isfinite(loaded(images).logits).all()
    assert torch.equal(loaded.dit(images).last_hidden_state, plain(images).last_hidden_state)


def test_the_noise_can_be_changed_at_load(build: Any, images: torch.Tensor, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path, noise_seed=5)
    assert not torch.equal(other(images).logits, model(images).logits)
    again = type(model).from_pretrained(tmp_path, noise_seed=0)
    torch.testing.assert_close(again(images).logits, model(images).logits, rtol=0, atol=1e-6)


def test_from_diffusers(build: Any, images: torch.Tensor, tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    ).save_pretrained(tmp_path)
    example = build()
    options = {key: getattr(example.config, key) for key in ("head_features", "head_timesteps", "segmentation_head")}
    model = type(example).from_diffusers(str(tmp_path), timestep=100, num_labels=6, **options)
    assert isinstance(model, type(example))
    assert model(images).logits.shape[1] == 6
    assert not model.dit.final_layer.proj.weight.requires_grad


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of mean, attentive, transformer"),
        ({"head_norm": "rms"}, "head_norm must be one of"),
        ({"segmentation_head": "fpn"}, "segmentation_head must be one of linear, upernet"),
        ({"stage_kind": "input"}, "stage_kind must be one of"),
        ({"head_features": []}, "head_features must be a non-empty list"),
        ({"head_features": "blocks.0.query"}, "head_features must be a non-empty list"),
        ({"head_timesteps": []}, "head_timesteps must be a non-empty list"),
        ({"head_features": ["blocks.3.query"]}, "no block 3"),
        ({"head_features": ["blocks.0.input"]}, "blocks.0.input"),
        ({"head_timesteps": [10, 1000]}, "1000"),
        ({"segmentation_head": "upernet", "head_features": FOUR[:2]}, "head_features of an upernet head"),
        ({"segmentation_head_channels": 20}, "segmentation_head_channels must be a multiple of 16"),
        ({"pooling_width": 20}, "pooling_width must be a multiple of 8"),
        ({"segmentation_head_channels": 0}, "segmentation_head_channels must be a multiple of 16"),
    ],
)
def test_impossible_heads_are_refused(make_config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_wrong_inputs_are_refused(make_config: Any, images: torch.Tensor) -> None:
    model = ASelectDiTForSemanticSegmentation(make_config())
    for labels in (torch.zeros(3, 1, 8, 8).long(), torch.zeros(2, 8, 8).long()):
        with pytest.raises(ValueError, match=r"labels must be \(3, height, width\)"):
            model(images, labels=labels)
    with pytest.raises(ValueError, match="num_labels must be at least 2"):
        ASelectDiTForSemanticSegmentation(make_config(num_labels=1))(images, labels=torch.zeros(3, 8, 8).long())
    for call in ({}, {"pixel_values": images, "latents": images}):
        with pytest.raises(ValueError, match="exactly one of pixel_values and latents"):
            model(**call)
    for name, value in (("timestep", 3), ("feature", "blocks.0.key")):
        with pytest.raises(ValueError, match=f"{name} of a head cannot vary"):
            model(images, **{name: value})


def test_the_base_model_concatenates_several_features(model: Any, images: torch.Tensor) -> None:
    names = ["blocks.2.key", "blocks.0.mlp"]
    expected = torch.cat([model(images, feature=name).last_hidden_state for name in names], dim=-1)
    torch.testing.assert_close(model(images, feature=names).last_hidden_state, expected)
    with pytest.raises(ValueError, match="feature must be"):
        model(images, feature=[])


def test_configs_keep_their_head_fields(tmp_path: Path) -> None:
    config = ASelectDiTConfig(pooling="attentive", head_features=["blocks.3.key"], out_indices=[2, 5], num_labels=9)
    config.save_pretrained(tmp_path)
    loaded = ASelectDiTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.out_features == ["stage2", "stage5"]


# ----------------------------------------------------------------------------------------- losses of divided batches


def labels_of_any_kind(problem: str, count: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    if problem == "single_label_classification":
        return torch.randint(LABELS, (count,), generator=generator)
    if problem == "masks":
        labels = torch.randint(LABELS, (count, 8, 8), generator=generator)
        labels[0, 2:] = labels[1:4] = 255
        return labels
    return torch.rand(count, LABELS, generator=generator, dtype=torch.float64)


PROBLEMS = ["single_label_classification", "multi_label_classification", "regression", "masks"]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_losses_of_any_division_of_a_batch_add_up(make_config: Any, randomize: Any, normal: Any, problem: str) -> None:
    """With the number of items in the whole of it; parts may be uneven, or have nothing but ignored pixels."""
    if problem == "masks":
        model = ASelectDiTForSemanticSegmentation(make_config(num_labels=LABELS))
    else:
        model = ASelectDiTForImageClassification(make_config(num_labels=LABELS, problem_type=problem))
    model, images, labels = randomize(model).double().train(), normal(6, 2, 8, 8).double(), labels_of_any_kind(problem)
    items = (labels != 255).sum()

    def gradients(bounds: list[int], **options: Any) -> list[torch.Tensor]:
        model.zero_grad()
        for start, stop in itertools.pairwise(bounds):
            model(images[start:stop], labels=labels[start:stop], **options).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    whole = gradients([0, 6])
    assert all(gradient.isfinite().all() for gradient in whole)
    for bounds in ([0, 6], [0, 3, 6], [0, 1, 4, 6], [0, 1, 2, 3, 4, 5, 6]):
        for found, expected in zip(gradients(bounds, num_items_in_batch=items), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_batch_of_ignored_pixels_has_a_loss_of_zero(make_config: Any, randomize: Any, images: torch.Tensor) -> None:
    model = randomize(ASelectDiTForSemanticSegmentation(make_config(num_labels=LABELS))).train()
    loss = model(images, labels=torch.full((3, 8, 8), 255)).loss
    loss.backward()
    assert loss == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("problem", ["single_label_classification", "regression", "masks"])
def test_accumulation_in_the_trainer_of_transformers_is_exact(
    make_config: Any, randomize: Any, normal: Any, tmp_path: Any, problem: str
) -> None:
    """Three steps of six images: at once, or in two uneven parts; and what it says of the evaluation."""
    images, labels = normal(6, 2, 8, 8), labels_of_any_kind(problem)
    labels = labels.float() if labels.is_floating_point() else labels
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    weights = {}
    for size, passes in ((6, 1), (4, 2)):
        if problem == "masks":
            model = ASelectDiTForSemanticSegmentation(make_config(num_labels=LABELS))
        else:
            model = ASelectDiTForImageClassification(make_config(num_labels=LABELS, problem_type=problem))
        args = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=passes, max_steps=3,
            learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", report_to="none", save_strategy="no",
            per_device_eval_batch_size=6, disable_tqdm=True, use_cpu=True, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Trainer(randomize(model), args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        weights[size] = {name: value.detach().clone() for name, value in model.named_parameters()}
        with torch.no_grad():
            expected = model(images, labels=labels).loss.item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    for name, value in weights[6].items():
        torch.testing.assert_close(weights[4][name], value, rtol=1e-4, atol=1e-6, msg=name)
