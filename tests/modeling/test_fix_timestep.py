"""Fixed timesteps: the plain ViT equals the model it was made from, is smaller, and refuses what it cannot do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification

from aselect_hf import (
    ASelectDiTBackbone,
    ASelectDiTConfig,
    ASelectDiTForImageClassification,
    ASelectDiTForSemanticSegmentation,
    ASelectDiTModel,
    select_timestep,
)
from aselect_hf.conversion import load_model, to_diffusers
from aselect_hf.modeling.features import FEATURE_KINDS, list_features

NEEDS_NEWER_TORCH = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch 2.6 fails, and versions between it and 2.13 were not run"
)
FOUR = ["blocks.0.query", "blocks.0.mlp", "blocks.1.hidden", "blocks.1.attention"]
SIT = {"type": "flow_matching", "model_time": "data_fraction"}
HEADS: dict[str, tuple[type, dict[str, Any]]] = {
    "mean": (ASelectDiTForImageClassification, {"feature": "blocks.-1.hidden"}),
    "attentive": (ASelectDiTForImageClassification, {"pooling": "attentive", "head_features": FOUR}),
    "transformer": (
        ASelectDiTForImageClassification,
        {"pooling": "transformer", "pooling_width": 16, "head_norm": "none"},
    ),
    "one-timestep": (ASelectDiTForImageClassification, {"head_timesteps": [10], "head_norm": "batch_norm"}),
    "linear": (ASelectDiTForSemanticSegmentation, {"num_noise_draws": 3}),
    "upernet-four": (
        ASelectDiTForSemanticSegmentation,
        {"segmentation_head": "upernet", "segmentation_head_channels": 16, "head_features": FOUR},
    ),
}
close = torch.testing.assert_close


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest, make_config: Any, randomize: Any) -> Any:
    """One model with a head, of random weights and statistics, in evaluation mode."""
    model_class, options = HEADS[request.param]
    model = randomize(model_class(make_config(num_labels=4, **options)))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    return model


def reference(model: ASelectDiTModel, latents: torch.Tensor, t: int, names: list[str], label: int | None) -> Any:
    labels = None if label is None else torch.full((len(latents),), label)
    with torch.no_grad():
        return model(latents=latents, timestep=t, feature=names, class_labels=labels).last_hidden_state


# ---------------------------------------------------------------------------------------------------------- equality


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A config of any shape, and what to fix it to."""
    patch, heads, layers = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    config = {
        "hidden_size": 8 * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "mlp_ratio": draw(st.sampled_from([1, 2.5, 4])),
        "patch_size": patch,
        "sample_size": patch * draw(st.integers(1, 4)),
        "num_channels": draw(st.integers(1, 4)),
        "num_condition_classes": draw(st.sampled_from([0, 5])),
        "attention_bias": draw(st.booleans()),
        "per_block_conditioning": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_pytorch_tanh"])),
        "mlp_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "timestep_freq_shift": draw(st.integers(0, 1)),
        "noise_schedule": draw(st.sampled_from([{}, {"type": "flow_matching"}, SIT])),
        "num_noise_draws": draw(st.integers(1, 3)),
        "noise_seed": draw(st.integers(0, 3)),
    }
    features = st.lists(st.sampled_from(list_features(layers)), min_size=1, max_size=4, unique=True)
    return {
        "config": config,
        "features": draw(features),
        "timestep": draw(st.integers(0, 999)),
        "class_label": draw(st.none() | st.integers(0, config["num_condition_classes"])),
    }


@given(case=cases(), seed=st.integers(0, 100))
def test_any_features_of_any_model_stay_the_same(make_model: Any, normal: Any, case: dict, seed: int) -> None:
    model, names = make_model(seed, **{"feature": None, "timestep": None} | case["config"]), case["features"]
    side = model.config.sample_size
    latents = normal(2, model.config.num_channels, side, side, seed=seed)
    before = copy.deepcopy(model.state_dict())
    fixed = model.fix_timestep(case["timestep"], names, case["class_label"])
    expected = reference(model, latents, case["timestep"], names, case["class_label"])
    with torch.no_grad():
        close(fixed(latents=latents, feature=names).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
        last = fixed.extract_features(latents=latents, features=names[-1:])[names[-1]][:, 0]
    close(last, expected[..., -model.config.hidden_size :], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.config.fixed_timestep


@pytest.mark.parametrize("kind", FEATURE_KINDS)
def test_every_kind_alone(make_model: Any, normal: Any, kind: str) -> None:
    """In its block only what it depends on is left; of the blocks before, plain linear layers and nothing else."""
    model, latents, name = make_model(attention_bias=False), normal(2, 2, 8, 8), f"blocks.1.{kind}"
    fixed = model.fix_timestep(300, name)
    with torch.no_grad():
        close(fixed(latents).last_hidden_state, reference(model, latents, 300, [name], None), rtol=1e-5, atol=1e-5)
    last, affine = {"attention_norm.bias", "attention_norm.weight"}, kind.endswith("norm")
    linears = ("attention.o_proj", "mlp.fc1", "mlp.fc2", "qkv_proj")
    whole = {f"{part}.{leaf}" for part in linears for leaf in ("weight", "bias")}
    if kind != "attention_norm":
        depth = FEATURE_KINDS.index(kind)
        parts = (linears[3:], linears[3:] + linears[:1], linears)[(depth > 3) + (depth > 6)]
        last = {f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")}
        last |= {"mlp_norm.weight", "mlp_norm.bias"} if affine else set()
    assert fixed.layers[0].state_dict().keys() == whole
    assert fixed.layers[1].state_dict().keys() == last
    assert len(fixed.layers) == 2
    assert {name for name in fixed.state_dict() if not name.startswith("layers")} == {
        "patch_embedding.weight",
        "position_embedding",
    }
    rows = {"query": 24, "key": 24, "value": 24}.get(kind, 72)
    assert kind == "attention_norm" or fixed.layers[1].qkv_proj.weight.shape == (rows, 24)


def test_features_before_and_after_a_gate_in_one_model(make_model: Any, normal: Any) -> None:
    """Ungated and gated outputs, norms and what follows them, all of all blocks at once."""
    model, latents, names = make_model(num_noise_draws=2), normal(3, 2, 8, 8), list_features(3)
    fixed = model.fix_timestep(40, names, 3)
    with torch.no_grad():
        found = fixed(latents, feature=names).last_hidden_state
    close(found, reference(model, latents, 40, names, 3), rtol=1e-5, atol=1e-5)


def test_defaults_and_negative_names(make_model: Any, normal: Any) -> None:
    model, latents = make_model(feature="blocks.-2.mlp_gated", timestep=77), normal(2, 2, 8, 8)
    fixed = model.fix_timestep()
    assert (fixed.config.timestep, fixed.config.feature) == (77, "blocks.-2.mlp_gated")
    with torch.no_grad():
        expected = model(latents)
        for found in (fixed(latents), fixed(latents, timestep=77, feature="blocks.1.mlp_gated")):
            close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
            close(found.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    maps = fixed.extract_features(latents, output_format="map")["blocks.-2.mlp_gated"]
    close(maps, model.extract_features(latents, output_format="map")["blocks.-2.mlp_gated"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("feature", ["blocks.1.query", "blocks.2.hidden"])
def test_hidden_states_and_attentions_as_far_as_it_goes(make_model: Any, normal: Any, feature: str) -> None:
    model, latents = make_model(attn_implementation="eager", num_noise_draws=2), normal(3, 2, 8, 8)
    fixed = model.fix_timestep(40, feature)
    flags = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, found = model(latents, timestep=40, **flags), fixed(latents, **flags)
    cut = feature == "blocks.1.query"
    assert len(found.hidden_states) == (2 if cut else 4)
    assert len(found.attentions) == (1 if cut else 3)
    for name in ("hidden_states", "attentions"):
        for mine, other in zip(found[name], expected[name], strict=not cut):
            close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vae", ["tiny_kl", "tiny_taesd"])
def test_with_a_vae(make_model: Any, normal: Any, request: pytest.FixtureRequest, vae: str) -> None:
    from aselect_hf.conversion import set_vae

    model, pixels = make_model(num_channels=4), normal(2, 3, 16, 16)
    set_vae(model, request.getfixturevalue(vae), decoder=True)
    fixed = model.fix_timestep()
    with torch.no_grad():
        close(fixed(pixels).last_hidden_state, model(pixels).last_hidden_state, rtol=1e-4, atol=1e-4)
        assert torch.equal(fixed.decode(normal(1, 4, 8, 8)), model.decode(normal(1, 4, 8, 8)))
        for parameter in fixed.vae.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for parameter in model.vae.parameters())


def test_half_precision_and_mode(make_model: Any, normal: Any) -> None:
    model = make_model().to(torch.bfloat16)
    fixed = model.train().fix_timestep()
    assert fixed.training
    assert {tensor.dtype for tensor in fixed.state_dict().values()} == {torch.bfloat16}
    with torch.no_grad():
        found, expected = (x.eval()(normal(2, 2, 8, 8)).last_hidden_state.float() for x in (fixed, model))
    assert (found - expected).norm() < 0.03 * expected.norm()


# -------------------------------------------------------------------------------------------- heads, backbone, training


def test_heads_stay_the_same(head: Any, normal: Any, tmp_path: Path) -> None:
    images = normal(3, 2, 8, 8)
    fixed = head.fix_timestep(class_label=2)
    fixed.save_pretrained(tmp_path)
    loaded = type(head).from_pretrained(tmp_path)
    with torch.no_grad():
        expected = head(images, class_labels=torch.full((3,), 2)).logits
        close(fixed(images).logits, expected, rtol=1e-4, atol=1e-4)
        close(loaded(images).logits, fixed(images).logits, rtol=1e-6, atol=1e-6)
    assert fixed.num_parameters() < head.num_parameters()


def test_a_fixed_head_trains(head: Any, normal: Any) -> None:
    """Whatever is left in it gets a gradient: nothing is left over."""
    model = head.fix_timestep().train()
    labels = torch.tensor([0, 1, 2])
    labels = labels if isinstance(model, ASelectDiTForImageClassification) else labels[:, None, None].expand(3, 8, 8)
    model(normal(3, 2, 8, 8), labels=labels).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == set()


@pytest.mark.parametrize("feature", FEATURE_KINDS)
def test_a_new_head_on_a_fixed_checkpoint(make_model: Any, normal: Any, tmp_path: Path, feature: str) -> None:
    """What is in the checkpoint for other features than the head's is frozen, and only that."""
    feature = f"blocks.1.{feature}"
    make_model(feature=feature).fix_timestep(feature=[feature, *list_features(3)]).save_pretrained(tmp_path)
    model = ASelectDiTForImageClassification.from_pretrained(tmp_path, num_labels=3)
    model(normal(3, 2, 8, 8), labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_gradient_checkpointing(make_model: Any, normal: Any) -> None:
    model = make_model().fix_timestep(feature="blocks.2.mlp").train()
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options:
            model.gradient_checkpointing_enable(options)
        model.zero_grad()
        model(normal(2, 2, 8, 8)).last_hidden_state.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.allclose(mine, theirs) for mine, theirs in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("stages", [[0], [0, 1, 2], [2]])
def test_a_backbone_stays_the_same(make_config: Any, randomize: Any, normal: Any, maps: bool, stages: list) -> None:
    options = {"out_indices": stages, "stage_kind": "mlp_norm", "reshape_hidden_states": maps, "num_noise_draws": 2}
    backbone, images = randomize(ASelectDiTBackbone(make_config(**options))), normal(2, 2, 8, 8)
    fixed = backbone.fix_timestep()
    with torch.no_grad():
        expected, found = backbone(images).feature_maps, fixed(images).feature_maps
    assert len(found) == len(stages)
    for mine, other in zip(found, expected, strict=True):
        close(mine, other, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_through_the_auto_classes(make_model: Any, normal: Any, tmp_path: Path) -> None:
    model, images = make_model(num_noise_draws=2).fix_timestep(class_label=1), normal(2, 2, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, ASelectDiTModel)
    assert loaded.config.fixed_to == {
        "timestep": 100,
        "features": ["blocks.1.query"],
        "class_label": 1,
        "noise_seed": 0,
        "num_noise_draws": 2,
    }
    with torch.no_grad():
        assert torch.equal(loaded(images).last_hidden_state, model(images).last_hidden_state)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7)
    assert classifier(images).logits.shape == (2, 7)
    assert torch.equal(classifier.dit.position_embedding, model.position_embedding)


def test_a_plain_model_drops_what_a_head_read(make_model: Any, tmp_path: Path) -> None:
    model = make_model(head_features=["blocks.2.key"], head_timesteps=[5, 6])
    model.fix_timestep().save_pretrained(tmp_path)
    config = ASelectDiTConfig.from_pretrained(tmp_path)
    assert (config.head_features, config.head_timesteps) == (None, None)


def test_a_head_on_other_features_is_still_a_backbone(make_config: Any, normal: Any, tmp_path: Path) -> None:
    config = make_config(feature="blocks.2.key", head_features=["blocks.0.value", "blocks.0.hidden"])
    ASelectDiTForImageClassification(config).fix_timestep().save_pretrained(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path)
    assert plain.config.feature == "blocks.0.value"
    assert len(plain.layers) == 1
    assert plain(normal(1, 2, 8, 8)).last_hidden_state.shape == (1, 16, 24)


def test_a_selection_is_kept_where_it_still_says_what_was_chosen(make_model: Any, normal: Any) -> None:
    model = make_model()
    selection = select_timestep(model, normal(4, 2, 8, 8).clamp(-1, 1), timesteps=[0, 800], progress=False)
    selection.apply(model)
    fixed = model.fix_timestep()
    assert fixed.config.selection == model.config.selection
    assert model.fix_timestep(selection.timestep + 1).config.selection is None
    assert model.fix_timestep(feature="blocks.0.key").config.selection is None
    assert selection.apply(fixed) is fixed
    selection.timestep += 1
    with pytest.raises(ValueError, match="is fixed to timestep"):
        selection.apply(fixed)
    assert fixed.config.timestep == selection.timestep - 1


def test_a_checkpoint_without_its_positions_is_damaged(make_model: Any, tmp_path: Path) -> None:
    make_model().fix_timestep().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["position_embedding"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['position_embedding'\]"):
        load_model(tmp_path)


def test_a_fresh_fixed_model_is_initialized(make_model: Any) -> None:
    """As transformers does for whatever a checkpoint lacks: positions of a plain grid, gates of 1."""
    fixed = ASelectDiTModel(make_model(num_noise_draws=2).fix_timestep(feature=list_features(3)).config)
    positions = fixed.compute_positions((4, 4))
    assert torch.equal(fixed.position_embedding, positions.expand(2, -1, -1))
    assert (fixed.layers[0].attention_gate == 1).all()
    assert (fixed.layers[2].mlp_gate == 1).all()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda model, x: model(x, timestep=101), "timestep=101"),
        (lambda model, x: model(x, feature="blocks.0.query"), "feature 'blocks.0.query'"),
        (lambda model, x: model(x, feature="blocks.1.hidden"), "feature 'blocks.1.hidden'"),
        (lambda model, x: model(x, noise=x), "noise of your own"),
        (lambda model, x: model(x, class_labels=torch.tensor([1, 1])), "class_labels"),
        (lambda model, x: model(torch.zeros(1, 2, 16, 8)), "an input of 16 x 8 instead of 8 x 8"),
        (lambda model, x: model.extract_features(x, features=["blocks.2.key"]), "feature 'blocks.2.key'"),
        (lambda model, x: model.extract_features(x, timesteps=[100, 50]), "timestep=50"),
        (lambda model, x: model.denoise(x, 100), "denoising"),
        (lambda model, x: model.features_of_noisy(x, torch.tensor([100, 100]), ["blocks.1.query"]), "denoising"),
        (lambda model, x: model.fix_timestep(), "fixing it again"),
        (lambda model, x: to_diffusers(model), "conversion to diffusers"),
        (lambda model, x: select_timestep(model, x, progress=False), "selecting a timestep"),
    ],
)
def test_what_it_cannot_do_any_more(make_model: Any, normal: Any, call: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"{what}.* is not possible: this model is fixed to timestep 100 and blocks.1"):
        call(make_model(mlp_ratio=4).fix_timestep(), normal(2, 2, 8, 8))


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"timestep": 5}, "timestep=5"),
        ({"feature": "blocks.1.key"}, "feature 'blocks.1.key'"),
        ({"head_features": ["blocks.0.key"]}, "feature 'blocks.0.key'"),
        ({"head_timesteps": [1, 2]}, "head_timesteps"),
        ({"noise_seed": 3}, "noise_seed"),
        ({"num_noise_draws": 3}, "num_noise_draws"),
    ],
)
def test_a_checkpoint_is_not_loaded_for_something_else(
    make_model: Any, tmp_path: Path, fields: dict[str, Any], what: str
) -> None:
    make_model().fix_timestep().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{what}.* is not possible"):
        ASelectDiTForImageClassification.from_pretrained(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fixed_timestep": True}, "written together"),
        ({"fixed_to": {"timestep": 100}}, "written together"),
        ({"fixed_timestep": True, "fixed_to": {"timestep": 100}}, "written together"),
        ({"features": []}, "non-empty list of features"),
        ({"features": "blocks.1.key"}, "non-empty list of features"),
        ({"features": [7]}, "feature 7 is unknown"),
        ({"class_label": 6}, "class_label in 0..5"),
        ({"class_label": "x"}, "class_label in 0..5"),
    ],
)
def test_a_config_that_was_not_written_by_fixing_is_named(
    make_model: Any, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    content = json.loads(make_model().fix_timestep().config.to_json_string(use_diff=False))
    if any(name.startswith("fixed") for name in fields):
        content |= {"fixed_timestep": False, "fixed_to": None} | fields
    else:
        content["fixed_to"] |= fields
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match=message):
        ASelectDiTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timestep": 1000}, r"timestep must be an integer in 0\.\.999"),
        ({"timestep": 0.5}, "did you mean"),
        ({"feature": "blocks.1.q"}, "feature 'blocks.1.q' is unknown"),
        ({"feature": []}, "non-empty list of names"),
        ({"class_label": 6}, r"class_label must be an integer in 0\.\.5"),
        ({"class_label": "dog"}, r"class_label must be an integer in 0\.\.5"),
    ],
)
def test_wrong_arguments_are_named(model: ASelectDiTModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.fix_timestep(**arguments)


def test_a_head_is_fixed_to_what_it_reads(make_config: Any) -> None:
    model = ASelectDiTForImageClassification(make_config())
    assert model.fix_timestep(5, "blocks.-2.query").config.timestep == 5
    with pytest.raises(ValueError, match=r"feature='blocks.0.key', but this model reads blocks\.1\.query"):
        model.fix_timestep(feature="blocks.0.key")
    with pytest.raises(ValueError, match=r"reads the timesteps \[10, 500\]"):
        ASelectDiTForImageClassification(make_config(head_timesteps=[10, 500])).fix_timestep()


# -------------------------------------------------------------------------------------------------- compile and export


@NEEDS_NEWER_TORCH
@pytest.mark.xfail(torch.__version__ >= "2.14", reason="torch 2.14.1 fails inside of dynamo, on Python 3.13")
def test_compiles_without_a_graph_break(make_model: Any, normal: Any) -> None:
    model = make_model(num_noise_draws=2).fix_timestep(feature="blocks.1.mlp")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for images in (normal(2, 2, 8, 8), normal(3, 2, 8, 8)):
            close(compiled(images).last_hidden_state, model(images).last_hidden_state, rtol=1e-5, atol=1e-5)


@NEEDS_NEWER_TORCH
@pytest.mark.filterwarnings("ignore")
def test_exports_to_onnx(make_config: Any, randomize: Any, normal: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config = make_config(num_labels=4, num_noise_draws=2, feature="blocks.1.mlp")
    model = randomize(ASelectDiTForImageClassification(config)).fix_timestep()
    torch.onnx.export(
        model,
        (normal(2, 2, 8, 8),),
        tmp_path / "model.onnx",
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 5):
        images = normal(batch, 2, 8, 8, seed=batch)
        (logits,) = session.run(["logits"], {"pixel_values": images.numpy()})
        with torch.no_grad():
            close(torch.from_numpy(logits), model(images).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_class", [ASelectDiTModel, ASelectDiTForImageClassification])
def test_the_license_goes_with_the_folded_weights(make_config: Any, model_class: Any, tmp_path: Path) -> None:
    model = model_class(make_config(num_labels=2))
    model.license_files = {"LICENSE.md": b"Be kind.", "NOTICE": b"Powered by others."}
    model.fix_timestep(70).save_pretrained(tmp_path)
    for name, content in model.license_files.items():
        assert (tmp_path / name).read_bytes() == content
