"""How a checkpoint is read: one list of keywords, nothing of it stored; from memory; in parts; of a stranger's size."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from aselect_hf import ASelectDiTConfig, ASelectDiTForImageClassification, ASelectDiTModel
from aselect_hf.conversion import convert_checkpoint, load_checkpoint, load_model, locate, save_model
from aselect_hf.conversion.locate import LOADING_KEYWORDS, LoadingOptions
from aselect_hf.modeling.configuration_noisy_backbone import NEVER_STORED

READERS: dict[str, Callable[..., Any]] = {
    "from_diffusers": ASelectDiTModel.from_diffusers,
    "convert_checkpoint": convert_checkpoint,
    "load_checkpoint": load_checkpoint,
    "load_model": load_model,
}
every_reader = pytest.mark.parametrize("name", READERS)


@pytest.fixture
def ours(make_transformer: Any, tmp_path: Path) -> Path:
    """A checkpoint of this package."""
    save_model(ASelectDiTModel.from_diffusers(make_transformer()), tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def sources(transformer_folder: Path, ours: Path) -> dict[str, Path]:
    """What each reader reads."""
    return {name: ours if name == "load_model" else transformer_folder for name in READERS}


# -------------------------------------------------------------------------------------------------------- keywords


@every_reader
@pytest.mark.parametrize("keyword", ["use_auth_token", "revison", "bogus", "api_key", "torch_dtype"])
def test_an_unknown_keyword_is_named(sources: dict[str, Path], name: str, keyword: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'.*token, revision"):
        READERS[name](sources[name], **{keyword: "hf_secret"})


@every_reader
def test_loading_keywords_are_never_stored(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """They reach the Hub's client, and nothing of them reaches the config."""
    asked: dict[str, Any] = {"token": "hf_secret", "revision": "v2", "cache_dir": tmp_path / "cache"}
    asked |= {"local_files_only": True, "force_download": True}
    calls = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(sources[name])

    monkeypatch.setattr(locate, "snapshot_download", download)
    model = READERS[name]("someone/dit", dtype=torch.bfloat16, **asked)
    assert calls
    assert all(repo_id == "someone/dit" and asked.items() <= options.items() for repo_id, options in calls)
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text()
    assert "hf_secret" not in text
    assert not set(json.loads(text)) & (set(LOADING_KEYWORDS) - {"dtype"})


def test_every_loading_keyword_is_kept_out_of_configs() -> None:
    assert {*NEVER_STORED, "dtype"} == {field.name for field in dataclasses.fields(LoadingOptions)}


@pytest.mark.parametrize("keyword", [*NEVER_STORED, "use_auth_token", "hf_token", "api_key", "password"])
def test_a_config_takes_no_secret(make_config: Any, keyword: str) -> None:
    with pytest.raises(TypeError, match=f"'{keyword}'"):
        make_config(**{keyword: "hf_secret"})


def test_a_secret_that_was_stored_is_left_out(ours: Path, tmp_path: Path) -> None:
    """By a version that took every keyword for a field."""
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"token": "hf_secret", "revision": "v2"}))
    for model in (load_model(ours), ASelectDiTModel.from_pretrained(ours, token="hf_other", revision="main")):
        model.save_pretrained(tmp_path / "again")
        text = (tmp_path / "again" / "config.json").read_text()
        assert "hf_" not in text
        assert "revision" not in text


def test_subfolder(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["from_diffusers"], tmp_path / "repository" / "weights" / "dit")
    model = ASelectDiTModel.from_diffusers(tmp_path / "repository", subfolder="weights/dit")
    assert model.config.hidden_size == 24
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        ASelectDiTModel.from_diffusers(tmp_path / "repository", subfolder="nowhere")


# ----------------------------------------------------------------------------------------------------------- dtype


@every_reader
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"], ids=str)
def test_dtype_is_that_of_the_weights(sources: dict[str, Path], name: str, dtype: Any) -> None:
    model = READERS[name](sources[name], dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


def test_dtype_is_that_of_the_vae_too(pipeline_folder: Path, tmp_path: Path) -> None:
    model = convert_checkpoint(pipeline_folder, tmp_path / "ours", dtype="bfloat16")
    assert model.vae.dtype == torch.bfloat16
    assert load_checkpoint(tmp_path / "ours").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype"):
        load_checkpoint(pipeline_folder, dtype="int8")


# ---------------------------------------------------------------------------------------------------------- memory


def test_a_pipeline_in_memory(pipeline_folder: Path, tmp_path: Path, normal: Any) -> None:
    pipeline = DiTPipeline.from_pretrained(pipeline_folder)
    before = {name: tensor.clone() for name, tensor in pipeline.vae.state_dict().items()}
    from_disk = ASelectDiTModel.from_diffusers(pipeline_folder)
    for model in (ASelectDiTModel.from_diffusers(pipeline), convert_checkpoint(pipeline, tmp_path / "ours")):
        expected = from_disk.state_dict()
        assert set(model.state_dict()) == set(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        assert model.config.noise_schedule == from_disk.config.noise_schedule
        model.vae.encoder.conv_in.weight.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.vae.state_dict().items()), "not its own"


def test_a_transformer_with_its_vae_and_scheduler_in_memory(make_transformer: Any, tiny_kl: Any) -> None:
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    model = convert_checkpoint(make_transformer(in_channels=4), vae=tiny_kl, scheduler=scheduler, vae_decoder=True)
    assert model.noise_schedule.prediction_type == "v_prediction"
    assert model.noise_schedule.beta_schedule == "scaled_linear"
    assert model.vae.decoder is not None
    assert isinstance(tiny_kl, AutoencoderKL)
    with pytest.raises(ValueError, match="AutoencoderKL"):
        convert_checkpoint(make_transformer(), vae=make_transformer())
    with pytest.raises(ValueError, match="'AutoencoderKL' is not supported"):
        convert_checkpoint(tiny_kl)


# ------------------------------------------------------------------------------------------------ variants, shards


def halve(folder: Path, variant: str = "fp16") -> None:
    """Leave only a variant of the weights in a folder of diffusers."""
    for path in folder.rglob("diffusion_pytorch_model.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(tensors, path.with_name(f"diffusion_pytorch_model.{variant}.safetensors"), metadata={"format": "pt"})
        path.unlink()


def test_a_variant(pipeline_folder: Path) -> None:
    halve(pipeline_folder)
    with pytest.raises(ValueError, match="another variant: pass variant='fp16'"):
        load_checkpoint(pipeline_folder)
    model = load_checkpoint(pipeline_folder, variant="fp16")
    assert (model.dtype, model.vae.dtype) == (torch.float16, torch.float16)
    with pytest.raises(ValueError, match=r"no weights of variant 'bf16' .*pass variant='fp16'"):
        load_checkpoint(pipeline_folder, variant="bf16")


def test_a_vae_without_the_variant_is_read_as_it_is(pipeline_folder: Path, transformer_folder: Path) -> None:
    halve(pipeline_folder / "transformer")
    assert load_checkpoint(pipeline_folder, variant="fp16").vae is not None
    with pytest.raises(ValueError, match="leave variant out"):
        load_checkpoint(transformer_folder, variant="fp16")


def test_sharded_weights(make_transformer: Any, tmp_path: Path) -> None:
    transformer = make_transformer()
    transformer.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model = load_checkpoint(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    for found in (model, load_checkpoint(tmp_path / "ours")):
        assert torch.equal(found.layers[2].mlp.fc2.weight, transformer.transformer_blocks[2].ff.net[2].weight)


def test_an_index_stays_in_its_folder(make_transformer: Any, tmp_path: Path) -> None:
    make_transformer().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../../etc/passwd")
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="outside of its folder"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------- left-over keys, other sizes


@pytest.mark.parametrize("key", ["transformer_blocks.0.attn1.norm_q.weight", "registers", "transformer_blocks.1.scale"])
def test_a_key_of_diffusers_without_a_place_is_named(transformer_folder: Path, key: str) -> None:
    weights = transformer_folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {key: torch.ones(8)}, weights)
    with pytest.raises(ValueError, match=f"{key} without a place"):
        load_checkpoint(transformer_folder)


def test_stored_positions_of_diffusers_are_compared(transformer_folder: Path) -> None:
    weights = transformer_folder / "diffusion_pytorch_model.safetensors"
    positions = DiTTransformer2DModel.from_pretrained(transformer_folder).pos_embed.pos_embed
    save_file(load_file(weights) | {"pos_embed.pos_embed": positions}, weights)
    load_checkpoint(transformer_folder)
    save_file(load_file(weights) | {"pos_embed.pos_embed": positions.flip(1).contiguous()}, weights)
    with pytest.raises(ValueError, match="sin-cos"):
        load_checkpoint(transformer_folder)


def test_a_key_of_ours_without_a_place_is_named(ours: Path, make_model: Any, tmp_path: Path) -> None:
    weights = ours / "model.safetensors"
    save_file(load_file(weights) | {"layers.0.attention.q_norm.weight": torch.ones(8)}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no place for \['layers\.0\.attention\.q_norm\.weight"):
        load_model(ours)


def test_a_head_is_left_out_where_it_is_not_asked_for(make_config: Any, tmp_path: Path) -> None:
    classifier = ASelectDiTForImageClassification(make_config(num_labels=3))
    classifier.save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path), ASelectDiTModel)
    weights = tmp_path / "model.safetensors"
    save_file(load_file(weights) | {"dit.layers.0.scale": torch.ones(8)}, weights, {"format": "pt"})
    for model_class in (ASelectDiTModel, ASelectDiTForImageClassification):
        with pytest.raises(ValueError, match=r"layers\.0\.scale"):
            load_model(tmp_path, model_class)


@pytest.mark.parametrize("layers", [4, 1000, 65536])
def test_a_config_is_bounded_by_its_weights_before_anything_is_built(
    transformer_folder: Path, ours: Path, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_, **__: pytest.fail("a module was built"))
    for folder, field in ((transformer_folder, "num_layers"), (ours, "num_hidden_layers")):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {field: layers}))
        with pytest.raises(ValueError, match=r"does not fit its weights|must be an integer in 1\.\.1024"):
            load_checkpoint(folder)
    if layers > 1024:
        with pytest.raises(ValueError, match=r"must be an integer in 1\.\.1024"):
            ASelectDiTConfig.from_pretrained(ours)


def test_the_vae_is_bounded_by_its_weights_too(pipeline_folder: Path) -> None:
    path = pipeline_folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 65536}))
    with pytest.raises(ValueError, match=r"65536 blocks in encoder\.down_blocks\.0\.resnets, the weights have 1"):
        load_checkpoint(pipeline_folder)


def test_a_vae_that_normalizes_its_latents_is_refused(make_transformer: Any, tiny_kl: Any) -> None:
    tiny_kl.register_to_config(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    with pytest.raises(ValueError, match="latents_mean"):
        convert_checkpoint(make_transformer(in_channels=4), vae=tiny_kl)
