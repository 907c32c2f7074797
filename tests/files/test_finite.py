"""What leaves the library is finite and of the dtype asked for, or one error names what overflowed, and where."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from aselect_cli import app
from aselect_hf import ASelectDiTForImageClassification, ASelectDiTForSemanticSegmentation, select_timestep
from aselect_hf.conversion import save_model
from aselect_hf.data.feature_cache import pooled_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import cached_latents
from aselect_hf.errors import one_line_errors

FEATURE = "blocks.2.query"
WAY_OUT = r"beyond its largest number, 65504: use bfloat16 \(--dtype bfloat16\) or float32"
BLOCK = rf"^blocks.1 gives NaN or infinite values in torch.float16: they are {WAY_OUT}$"
VAE = rf"^the VAE gives NaN or infinite latents in torch.float16: they are {WAY_OUT}, or the VAE alone in float32"


@pytest.fixture
def overflowing(make_model):
    """`overflowing(dtype)`: a model whose block 1 leaves the range of float16."""

    def build(dtype: torch.dtype, **overrides):
        model = make_model(**overrides)
        with torch.no_grad():
            model.layers[1].mlp.fc2.weight.mul_(3e5)
        return model.to(dtype)

    return build


@pytest.fixture
def overflowing_vae(make_model, tiny_kl):
    def build(dtype: torch.dtype):
        model = make_model(num_channels=4, vae_config=dict(tiny_kl.config) | {"_class_name": "AutoencoderKL"})
        model.vae.load_state_dict(tiny_kl.state_dict(), strict=False)
        with torch.no_grad():
            model.vae.encoder.conv_in.weight.mul_(5e4)
        return model.to(dtype)

    return build


def _classifier(model, head_class=ASelectDiTForImageClassification):
    head = head_class(model.config).eval().to(model.dtype)
    head.dit.load_state_dict(model.state_dict())
    return head


def _select(method: str):
    return lambda model, x: select_timestep(
        model, x, method=method, feature=FEATURE, timesteps=[0, 500], progress=False, seed=0
    )


def _features(model, x, folder):
    return pooled_features(model, ImageData(x), [0], FEATURE, cache_dir=folder, progress=False).values[0]


WAYS = {
    "forward": lambda model, x: model(x, feature=FEATURE).last_hidden_state,
    "extract": lambda model, x: model.extract_features(x, features=[FEATURE], timesteps=[0, 9])[FEATURE],
    "classifier": lambda model, x: _classifier(model)(x).logits,
    "segmenter": lambda model, x: _classifier(model, ASelectDiTForSemanticSegmentation)(x).logits,
    "hfr": _select("hfr"),
    "rankme": _select("rankme"),
    "retrieval": _select("retrieval"),
    "snr": _select("snr"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_block_that_overflows_is_named_wherever_features_leave(way, overflowing, normal):
    x = normal(4, 2, 8, 8).clamp(-1, 1)
    config = {"feature": FEATURE, "num_labels": 3}
    with pytest.raises(ValueError, match=BLOCK):
        WAYS[way](overflowing(torch.float16, **config), x)
    WAYS[way](overflowing(torch.float32, **config), x)
    if way in ("forward", "extract"):
        assert WAYS[way](overflowing(torch.bfloat16, **config), x).isfinite().all()


def test_a_block_that_overflows_is_named_by_the_feature_cache(overflowing, normal, tmp_path):
    x = normal(4, 2, 8, 8)
    with pytest.raises(ValueError, match=BLOCK):
        _features(overflowing(torch.float16), x, tmp_path)
    assert np.isfinite(_features(overflowing(torch.bfloat16), x, tmp_path)).all()
    assert len(list(tmp_path.rglob("t*.safetensors"))) == 1


def test_only_one_image_may_overflow(overflowing, normal):
    model = overflowing(torch.float32, feature=FEATURE)
    with torch.no_grad():
        model.layers[1].mlp.fc2.weight.div_(3e5)
    model = model.half()
    model(normal(3, 2, 8, 8))
    x = normal(3, 2, 8, 8)
    x[1] = 65000
    with pytest.raises(ValueError, match=r"the patch embedding gives NaN or infinite values in torch.float16"):
        model(x)


def test_the_first_feature_of_a_fixed_model_that_overflows_is_named(overflowing, normal):
    fixed = overflowing(torch.float32).fix_timestep(100, FEATURE)
    assert fixed(normal(2, 2, 8, 8)).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=BLOCK):
        fixed.half()(normal(2, 2, 8, 8))


def test_the_precision_named_is_that_of_autocast(overflowing, normal, monkeypatch):
    model = overflowing(torch.float32, feature=FEATURE)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=BLOCK):
        model(normal(2, 2, 8, 8))


def test_float32_is_not_told_to_use_float32(overflowing, normal):
    model = overflowing(torch.float32, feature=FEATURE)
    with torch.no_grad():
        model.layers[0].mlp.fc1.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"^blocks.0 gives NaN .* in torch.float32: check its weights"):
        model(normal(2, 2, 8, 8))


def test_a_head_that_overflows_is_named(model, normal):
    head = _classifier(model)
    with torch.no_grad():
        for linear in head.classifier.modules():
            if isinstance(linear, torch.nn.Linear):
                linear.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"the head gives NaN or infinite values in torch\.float32"):
        head(normal(2, 2, 8, 8))


VAE_WAYS = {
    "encode": lambda model, x, folder: model.encode(x),
    "forward": lambda model, x, folder: model(x),
    "latent cache": lambda model, x, folder: cached_latents(model, ImageData(x), cache_dir=folder, progress=False),
    "hfr": lambda model, x, folder: select_timestep(
        model, x, method="hfr", timesteps=[0, 500], cache_dir=folder, progress=False
    ),
}


@pytest.mark.parametrize("way", VAE_WAYS)
def test_a_vae_that_overflows_is_named_in_its_precision(way, overflowing_vae, normal, tmp_path):
    x = normal(3, 3, 16, 16).clamp(-1, 1)
    with pytest.raises(ValueError, match=VAE):
        VAE_WAYS[way](overflowing_vae(torch.float16), x, tmp_path)
    model = overflowing_vae(torch.float16)
    model.vae.float()
    VAE_WAYS[way](model, x, tmp_path)


def test_training_looks_at_the_loss_instead(overflowing, normal):
    model = overflowing(torch.float16, feature=FEATURE).train()
    assert not model(normal(2, 2, 8, 8)).last_hidden_state.isfinite().all()


def test_compiled_models_run_without_a_look(model, normal):
    x = normal(2, 2, 8, 8)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x).last_hidden_state, model(x).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fixed", [False, True])
def test_features_have_the_dtype_asked_for(dtype, fixed, model, normal):
    names = ["blocks.0.attention_norm", "blocks.1.query", "blocks.2.mlp_gated"]
    model = (model.fix_timestep(100, names) if fixed else model).to(dtype)
    found = model.extract_features(normal(2, 2, 8, 8), features=names, timesteps=[100])
    assert {values.dtype for values in found.values()} == {dtype}
    output = model(normal(2, 2, 8, 8), feature=names)
    assert output.last_hidden_state.dtype == output.pooler_output.dtype == dtype


def test_the_command_writes_no_features_that_are_not_finite(overflowing, tmp_path, capsys):
    save_model(overflowing(torch.float32, num_channels=1, feature=FEATURE), tmp_path / "model")
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.fromarray(np.full((8, 8), 50 * index, np.uint8)).save(tmp_path / "images" / f"{index}.png")
    output = tmp_path / "features.safetensors"
    command = ["features", str(tmp_path / "model"), str(tmp_path / "images"), "--output", str(output), "--dtype"]
    with pytest.raises(SystemExit), one_line_errors("aselect"):
        app.app([*command, "float16"], standalone_mode=False)
    assert "aselect: error: blocks.1 gives NaN or infinite values in torch.float16" in capsys.readouterr().err
    assert not output.exists()
    app.app([*command, "float32"], standalone_mode=False)
    assert output.exists()
