"""What original `.pt` files say and do not say: the network's time, its kind, its null class, keys without a place."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aselect_cli import app
from aselect_hf import ASelectDiTModel
from aselect_hf.conversion import convert_checkpoint, load_checkpoint
from aselect_hf.conversion.locate import kind_by_name
from aselect_hf.modeling.features import FEATURE_KINDS

State = dict[str, torch.Tensor]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SHAPE: dict[str, Any] = {"num_attention_heads": 3, "num_condition_classes": 5}
REPA, SRA = {"projectors.0.0.weight": torch.ones(8, 24)}, {"ap_head.linear1.weight": torch.ones(48, 24)}


@pytest.fixture
def plain(make_model: Any, original_state: Any) -> State:
    """As `original`, but without a variance: what REPA and its descendants train."""
    return original_state(make_model(num_channels=4, mlp_ratio=4, learned_sigma=False))


def load(content: Any, **options: Any) -> ASelectDiTModel:
    return load_checkpoint(content, **(SHAPE | options))


# ------------------------------------------------------------------------------------------------ the network's time


def told_noise(plain: State) -> list[tuple[Any, dict[str, Any]]]:
    """All the ways in which a network says, or is said, to be told its share of noise."""
    arguments = {"ema": plain, "args": argparse.Namespace(model="SiT-XL/2", path_type="linear", prediction="v")}
    asked = {"source_format": "sit", "model_time": "noise_fraction"}
    return [(plain | REPA, {}), (plain | SRA, {}), (arguments, {}), (plain, asked)]


@pytest.mark.parametrize("way", range(4), ids=["projectors", "ap_head", "arguments", "asked"])
def test_a_network_that_is_told_its_share_of_noise(
    plain: State, reference_dit: Any, normal: Any, tmp_path: Path, way: int
) -> None:
    """Against the network itself, run as REPA's sampler does: every feature, its velocity, and the noise in it."""
    content, options = told_noise(plain)[way]
    torch.save(content, tmp_path / "last.pt")
    model = load(tmp_path / "last.pt", allow_pickle=True, **options)
    clean, noise, labels = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1), torch.tensor([0, 5])
    names = [f"blocks.{index}.{kind}" for index in range(3) for kind in FEATURE_KINDS]
    timesteps = [20, 500, 980]
    found = model.extract_features(latents=clean, noise=noise, features=names, timesteps=timesteps, class_labels=labels)
    for position, t in enumerate(timesteps):
        share = t / 1000
        noisy = (1 - share) * clean + share * noise
        expected, velocity = reference_dit(plain, noisy, torch.full((2,), share), labels, 3)
        for name in names:
            torch.testing.assert_close(found[name][:, position], expected[name], **CLOSE, msg=f"{name} at t={t}")
        with torch.no_grad():
            prediction = model.denoise(noisy, t, labels)
        torch.testing.assert_close(prediction, velocity, **CLOSE)
        estimate = model.noise_schedule.predicted_noise(prediction, noisy, torch.tensor([t, t]))
        torch.testing.assert_close(estimate, noisy + (1 - share) * velocity, **CLOSE)  # as in its `samplers.py`
        other = reference_dit(plain, noisy, torch.full((2,), 1 - share), labels, 3)[1]
        assert t == 500 or not torch.allclose(prediction, other, atol=1e-2)
    log_snr = model.noise_schedule.log_snr(torch.arange(1, 1000).double())
    assert bool((log_snr.diff() < 0).all())
    target = model.noise_schedule.training_target(clean, noise, torch.tensor([20, 980]))
    torch.testing.assert_close(target, noise - clean)


def test_the_time_survives_saving_and_folding(plain: State, normal: Any, tmp_path: Path) -> None:
    model = load(plain | REPA, timestep=300)
    model.save_pretrained(tmp_path / "saved")
    saved, latents = ASelectDiTModel.from_pretrained(tmp_path / "saved"), normal(2, 4, 8, 8)
    assert saved.config.noise_schedule["model_time"] == "noise_fraction"
    expected = model(latents=latents).last_hidden_state
    assert torch.equal(saved(latents=latents).last_hidden_state, expected)
    fixed = saved.fix_timestep()
    torch.testing.assert_close(fixed(latents=latents).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    assert fixed.config.noise_schedule["model_time"] == "noise_fraction"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"path_type": "Linear", "prediction": "velocity"}, ("velocity", "data_fraction")),
        ({"path_type": "Linear", "prediction": "noise"}, ("epsilon", "data_fraction")),
        ({"path_type": "linear", "prediction": "v"}, ("velocity", "noise_fraction")),
        ({"path_type": "GVP", "prediction": "velocity"}, "path of type 'GVP'"),
        ({"path_type": "cosine", "prediction": "v"}, "path of type 'cosine'"),
        ({"path_type": "Linear", "prediction": "score"}, "predict 'score'"),
    ],
    ids=str,
)
def test_the_arguments_of_the_training_say_path_and_prediction(
    plain: State, arguments: dict[str, Any], expected: Any
) -> None:
    content = {"ema": plain, "args": argparse.Namespace(**arguments)}
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            load(content)
        return
    schedule = load(content).config.noise_schedule
    assert (schedule["prediction_type"], schedule["model_time"]) == expected


def test_a_time_that_nothing_tells_is_asked_for(plain: State, original: State) -> None:
    with pytest.raises(ValueError, match=r"model_time='data_fraction' .* or model_time='noise_fraction'"):
        load(plain, source_format="sit")
    assert load(original, source_format="sit").config.noise_schedule["model_time"] == "data_fraction"  # SiT's own
    for time in ("data_fraction", "noise_fraction"):
        schedule = load(plain, source_format="sit", model_time=time).config.noise_schedule
        assert schedule["model_time"] == time
    with pytest.raises(ValueError, match="model_time must be one of"):
        load(plain, source_format="sit", model_time="backwards")
    for wrong in ("aselect", "diffusers"):
        with pytest.raises(ValueError, match=f"source_format='{wrong}' does not fit a dict"):
            load(plain, source_format=wrong)
    with pytest.raises(ValueError, match="pass noise_schedule alone"):
        load(plain, source_format="sit", model_time="noise_fraction", noise_schedule={"type": "flow_matching"})
    with pytest.raises(ValueError, match="read as a DiT"):
        load(plain, source_format="dit", model_time="noise_fraction")


def test_the_command_asks_and_takes_what_the_file_does_not_say(
    plain: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(plain, tmp_path / "SiT-tiny.pt")
    command = ["aselect", "convert", str(tmp_path / "SiT-tiny.pt"), str(tmp_path / "out"), "--allow-pickle"]
    command += ["--num-attention-heads", "3"]
    for options, asked in (([], "num_condition_classes=5"), (["--num-condition-classes", "5"], "model_time=")):
        monkeypatch.setattr("sys.argv", command + options)
        with pytest.raises(SystemExit):
            app.main()
        assert asked in capsys.readouterr().err
    options += ["--model-time", "noise_fraction", "--dtype", "bfloat16"]
    monkeypatch.setattr("sys.argv", command + options)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert not ended.value.code
    model = load_checkpoint(tmp_path / "out")
    assert (model.config.noise_schedule["model_time"], model.dtype) == ("noise_fraction", torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------- its kind


def schedule_type(name: str, content: Any, folder: Path) -> str:
    torch.save(content, folder / name)
    return load(folder / name, allow_pickle=True, model_time=None).noise_schedule.type


@pytest.mark.parametrize("name", ["conditional.pt", "edited-credit.pt", "transition.pt", "DiT-vs-SiT.pt", "weights.pt"])
def test_a_name_without_the_word_tells_nothing(original: State, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"pass source_format='dit' or 'sit'"):
        schedule_type(name, original, tmp_path)


def test_the_words_of_a_name_tell_the_kind(original: State, tmp_path: Path) -> None:
    assert schedule_type("SiT-XL-2-conditional.pt", original, tmp_path) == "flow_matching"
    assert schedule_type("credit_DiT-S.pt", original, tmp_path) == "ddpm"


def test_the_content_tells_the_kind_before_the_name(original: State, plain: State, tmp_path: Path) -> None:
    said = {"ema": original, "args": argparse.Namespace(model="DiT-XL/2")}
    assert schedule_type("SiT.pt", said, tmp_path) == "ddpm"
    assert schedule_type("dit.pt", plain | REPA, tmp_path) == "flow_matching"
    assert schedule_type("dit.pt", original | SRA, tmp_path) == "ddpm"  # SRA's own DiT, which predicts a variance


@settings(max_examples=25)
@given(st.text("abdeist", max_size=6), st.text("abdeist", max_size=6))
def test_only_whole_words_count(before: str, after: str) -> None:
    """Letters around a kind make it another word, whichever they are."""
    name = f"{before}dit{after}"
    if name == "dit":
        assert kind_by_name(f"{name}-1.pt") == "dit"
    else:
        with pytest.raises(ValueError, match="cannot tell"):
            kind_by_name(f"{name}-1.pt")


# ---------------------------------------------------------------------------------------------------- every key counts

LEFT_OVER = {
    "normalized queries": {"blocks.1.attn.q_norm.weight": torch.ones(8)},
    "normalized latents": {"bn.running_mean": torch.zeros(4)},
    "rotary positions": {"feat_rope.freqs_cos": torch.ones(16, 8)},
    "affine norms": {"blocks.0.norm1.weight": torch.ones(24)},
    "a block too many": {"blocks.7.mlp.fc1.weight": torch.ones(96, 24)},
    "register tokens": {"registers": torch.ones(1, 4, 24)},
}


@pytest.mark.parametrize("extra", LEFT_OVER.values(), ids=LEFT_OVER)
def test_a_key_without_a_place_is_named(original: State, extra: State) -> None:
    with pytest.raises(ValueError, match=next(iter(extra))):
        load(original | extra, source_format="dit")


def test_another_mlp_is_named(original: State) -> None:
    state = {key.replace("mlp.fc1", "mlp.w12"): tensor for key, tensor in original.items()}
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.weight missing; there are blocks\.0\.mlp\.w12\.bias"):
        load(state, source_format="dit")


def test_everything_wrong_is_named_at_once(original: State) -> None:
    state = original | {"blocks.2.attn.proj.weight": torch.ones(3, 3), "scale": torch.ones(1)}
    del state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(ValueError) as caught:
        load(state, source_format="dit")
    for name in ("layers.1.mlp.fc2.bias missing", "2.attention.o_proj.weight of the wrong shape", "scale without"):
        assert name in str(caught.value)


@pytest.mark.parametrize("tokens", [15, 17])
def test_positions_of_extra_tokens_are_refused(original: State, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} positions"):
        load(original | {"pos_embed": torch.zeros(1, tokens, 24)}, source_format="dit")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_positions_are_still_the_tables(original: State, dtype: torch.dtype) -> None:
    model = load({key: tensor.to(dtype) for key, tensor in original.items()}, source_format="dit")
    assert model.dtype == dtype


# ---------------------------------------------------------------------------------- prefixes, wrappers, file formats

WRAPPED: dict[str, Callable[[State], Any]] = {
    "DDP": lambda state: {"ema": {f"module.{key}": tensor for key, tensor in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{key}": tensor for key, tensor in state.items()},
    "compiled blocks": lambda state: {
        ".".join([*key.split(".")[:2], "_orig_mod", *key.split(".")[2:]]) if key.startswith("blocks") else key: tensor
        for key, tensor in state.items()
    },
    "a model's prefix": lambda state: {f"model.{key}": tensor for key, tensor in state.items()},
    "lightning": lambda state: {
        "state_dict": {f"net.{key}": tensor for key, tensor in state.items()} | {"vae.conv.weight": torch.ones(2)},
        "optimizer_states": [{"state": {0: {"step": 1}}}],
    },
    "an average beside the weights": lambda state: {
        "state_dict": {f"net.{key}": torch.zeros_like(tensor) for key, tensor in state.items()}
        | {f"net_ema.{key}": tensor for key, tensor in state.items()}
    },
    "numpy": lambda state: {"ema": {key: tensor.numpy() for key, tensor in state.items()}, "step": np.float64(5)},
    "an averaged model": lambda state: (
        {"n_averaged": torch.tensor(3)} | {f"module.{key}": tensor for key, tensor in state.items()}
    ),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_network_is_found_in_its_wrappers(original: State, tmp_path: Path, wrap: Callable[[State], Any]) -> None:
    torch.save(wrap(original), tmp_path / "dit.pt")
    model = load(tmp_path / "dit.pt", allow_pickle=True)
    expected = load(original, source_format="dit").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_several_networks_are_named(original: State) -> None:
    with pytest.raises(ValueError, match=r"several networks \(student, teacher\)"):
        load({"student": original, "teacher": original}, source_format="dit")


def test_a_safetensors_file_needs_no_permission(original: State, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in original.items()}, tmp_path / "dit.safetensors")
    assert load(tmp_path / "dit.safetensors").config.num_hidden_layers == 3


# ----------------------------------------------------------------------------------------------------- the null class


def test_the_last_class_is_never_taken_for_the_null_class(original: State) -> None:
    """A table of six rows is of six classes, or of five and the null class."""
    with pytest.raises(ValueError, match=r"num_condition_classes=5 if .* with class dropout, 6 if without"):
        load_checkpoint(original, source_format="dit", num_attention_heads=3)
    with pytest.raises(ValueError, match=r"6 class embeddings.* but 9 classes"):
        load(original, source_format="dit", num_condition_classes=9)
    said = {"model": original, "args": argparse.Namespace(model="DiT-S/2", num_classes=5)}
    assert load_checkpoint(said, num_attention_heads=3).config.num_condition_classes == 5


def test_without_a_null_class_the_network_is_conditioned_on_nothing(
    original: State, reference_dit: Any, normal: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = load(original, source_format="dit", num_condition_classes=6)
    assert "without a null class" in caplog.text
    noisy, time = normal(2, 4, 8, 8), torch.tensor([100.0, 100.0])
    table = "y_embedder.embedding_table.weight"
    nothing = original | {table: torch.cat([original[table], torch.zeros(1, 24)])}
    with torch.no_grad():
        for labels in (None, torch.tensor([5, 0])):
            given = torch.tensor([6, 6]) if labels is None else labels
            expected = reference_dit(nothing, noisy, time, given, 3)[1][:, :4]
            torch.testing.assert_close(model.denoise(noisy, 100, labels), expected, **CLOSE)


def test_a_round_number_and_one_more_is_said_once(
    make_model: Any, original_state: Any, caplog: pytest.LogCaptureFixture
) -> None:
    state = original_state(make_model(num_condition_classes=10))
    with caplog.at_level(logging.WARNING):
        model = convert_checkpoint(state, source_format="dit", num_attention_heads=3)
    assert model.config.num_condition_classes == 10
    assert "11 if without" in caplog.text
