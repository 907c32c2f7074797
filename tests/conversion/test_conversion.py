"""Conversion: every feature and prediction against the source's own network, round trips, damaged and foreign input."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file

from aselect_hf import ASelectDiTModel
from aselect_hf.conversion import convert, convert_checkpoint, load_checkpoint, load_model, locate
from aselect_hf.modeling.features import FEATURE_KINDS

State = dict[str, torch.Tensor]
CLASSES = 7
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SHAPE: dict[str, Any] = {"num_attention_heads": 3, "num_condition_classes": 5}
"""What a small original `.pt` file does not say."""

SHAPES: dict[str, dict[str, Any]] = {
    "1-channel": {"in_channels": 1, "num_attention_heads": 3, "patch_size": 2, "sample_size": 8},
    "3-channels-learn-sigma": {
        "in_channels": 3,
        "out_channels": 6,
        "num_attention_heads": 5,
        "patch_size": 4,
        "sample_size": 16,
    },
    "patch-1": {
        "in_channels": 4,
        "num_attention_heads": 1,
        "attention_head_dim": 20,
        "patch_size": 1,
        "sample_size": 5,
    },
    "patch-8": {"in_channels": 4, "out_channels": 8, "num_attention_heads": 3, "patch_size": 8, "sample_size": 24},
    "no-bias": {"in_channels": 2, "num_attention_heads": 2, "patch_size": 2, "sample_size": 6, "attention_bias": False},
    "gelu-eps": {
        "in_channels": 2,
        "num_attention_heads": 2,
        "patch_size": 2,
        "sample_size": 6,
        "activation_fn": "gelu",
        "norm_eps": 1e-2,
    },
    "1-block": {"in_channels": 1, "num_attention_heads": 3, "patch_size": 2, "sample_size": 4, "num_layers": 1},
}


@torch.no_grad()
def hooked_features(
    transformer: DiTTransformer2DModel, noisy: torch.Tensor, time: torch.Tensor, labels: torch.Tensor
) -> tuple[State, torch.Tensor]:
    """Every named feature of a diffusers DiT by forward hooks, and its whole output."""
    features: State = {}
    gates: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []

    def watch(module: torch.nn.Module, name: str, kind: str) -> None:
        def keep(_module: Any, inputs: Any, output: torch.Tensor) -> None:
            features[f"{name}.{kind}"] = inputs[0] if kind.endswith("_norm") else output

        handles.append(module.register_forward_hook(keep))

    for index, block in enumerate(transformer.transformer_blocks):
        name = f"blocks.{index}"
        watch(block.attn1.to_q, name, "attention_norm")
        watch(block.attn1.to_q, name, "query")
        watch(block.attn1.to_k, name, "key")
        watch(block.attn1.to_v, name, "value")
        watch(block.attn1, name, "attention")
        watch(block.ff.net[0].proj, name, "mlp_norm")
        watch(block.ff, name, "mlp")
        watch(block, name, "hidden")
        keep_gates = lambda _module, _inputs, output, name=name: gates.update({name: (output[1], output[4])})  # noqa: E731
        handles.append(block.norm1.register_forward_hook(keep_gates))
    prediction = transformer(noisy, timestep=time, class_labels=labels).sample
    for handle in handles:
        handle.remove()
    for name, (attention_gate, mlp_gate) in gates.items():
        features[f"{name}.attention_gated"] = attention_gate[:, None] * features[f"{name}.attention"]
        features[f"{name}.mlp_gated"] = mlp_gate[:, None] * features[f"{name}.mlp"]
    return features, prediction


def assert_same_features(model: ASelectDiTModel, transformer: DiTTransformer2DModel, normal: Any) -> None:
    """Every kind of every block at three timesteps, with and without classes, and the prediction."""
    config = transformer.config
    shape = (3, config.in_channels, config.sample_size, config.sample_size)
    clean, noise = normal(*shape), normal(*shape, seed=1)
    null, alphas_cumprod = config.num_embeds_ada_norm, torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)
    names = [f"blocks.{index}.{kind}" for index in range(config.num_layers) for kind in FEATURE_KINDS]
    for labels in (None, torch.tensor([0, null - 1, null])):
        timesteps = [321, 0, 999]
        found = model.extract_features(
            latents=clean, noise=noise, features=names, timesteps=timesteps, class_labels=labels
        )
        for position, t in enumerate(timesteps):
            alpha, sigma = alphas_cumprod[t].sqrt().item(), (1 - alphas_cumprod[t]).sqrt().item()
            noisy, time = alpha * clean + sigma * noise, torch.full((3,), t)
            given = torch.full((3,), null) if labels is None else labels
            expected, prediction = hooked_features(transformer, noisy, time, given)
            assert set(expected) == set(names)
            for name in names:
                torch.testing.assert_close(found[name][:, position], expected[name], **CLOSE, msg=f"{name} at t={t}")
            with torch.no_grad():
                denoised = model.denoise(noisy, t, labels)
            torch.testing.assert_close(denoised, prediction[:, : config.in_channels], **CLOSE)


# --------------------------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-block"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_diffusers_dit_keeps_every_feature(
    make_transformer: Any, normal: Any, tmp_path: Path, shape: str, shared: bool
) -> None:
    transformer = make_transformer(shared, **SHAPES[shape])
    transformer.save_pretrained(tmp_path)
    model = ASelectDiTModel.from_diffusers(str(tmp_path))
    assert model.config.per_block_conditioning is (not shared and transformer.config.num_layers > 1)
    assert not model.training
    assert_same_features(model, transformer, normal)


def test_the_class_name_of_older_repositories(make_transformer: Any, normal: Any, tmp_path: Path) -> None:
    """The published DiT repositories still say `Transformer2DModel`, told from others by its `norm_type`."""
    transformer = make_transformer()
    folder = tmp_path / "pipeline" / "transformer"
    transformer.save_pretrained(folder)
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    config = json.loads((folder / "config.json").read_text())
    assert config["norm_type"] == "ada_norm_zero"
    legacy = config | {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "cross_attention_dim": None}
    (folder / "config.json").write_text(json.dumps(legacy))
    for source in (folder, folder.parent):
        assert_same_features(load_checkpoint(source), transformer, normal)
        assert_same_features(ASelectDiTModel.from_diffusers(source), transformer, normal)
    (folder / "config.json").write_text(json.dumps(legacy | {"norm_type": "layer_norm"}))
    for source in (folder, folder.parent):
        refuse("Transformer2DModel", source, tmp_path / "out")


def test_shared_embedders_are_stored_once(make_transformer: Any, tmp_path: Path) -> None:
    sizes = {}
    for shared in (True, False):
        make_transformer(shared).save_pretrained(tmp_path / str(shared))
        sizes[shared] = ASelectDiTModel.from_diffusers(tmp_path / str(shared)).num_parameters()
    embedder = 256 * 24 + 24 + 24 * 24 + 24 + (CLASSES + 1) * 24
    assert sizes[False] - sizes[True] == 2 * embedder


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-block"])
@pytest.mark.parametrize("shape", ["3-channels-learn-sigma", "no-bias", "gelu-eps"])
def test_our_checkpoint_converts_back_to_the_same_weights(
    make_transformer: Any, normal: Any, tmp_path: Path, shape: str, shared: bool
) -> None:
    """diffusers -> ours -> disk -> diffusers: every tensor equal (the learned-sigma half included), same features."""
    transformer = make_transformer(shared, **SHAPES[shape])
    transformer.save_pretrained(tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "ours")
    model = convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="diffusers")
    back = DiTTransformer2DModel.from_pretrained(tmp_path / "back" / "transformer").eval()
    expected, found = transformer.state_dict(), back.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert_same_features(model, back, normal)
    assert DDIMScheduler.from_pretrained(tmp_path / "back" / "scheduler").config.beta_schedule == "linear"


def sample(pipeline: DiTPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    return pipeline([1, 207], generator=generator, **options).images


def test_the_pipeline_gives_the_same_image_after_a_round_trip(pipeline_folder: Path, tmp_path: Path) -> None:
    expected = sample(DiTPipeline.from_pretrained(pipeline_folder))
    assert expected.std() > 0.01
    convert_checkpoint(pipeline_folder, tmp_path / "ours", vae_decoder=True)
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", to="diffusers")
    assert np.array_equal(sample(DiTPipeline.from_pretrained(tmp_path / "back")), expected)
    convert_checkpoint(pipeline_folder, tmp_path / "direct", to="diffusers")
    assert np.array_equal(sample(DiTPipeline.from_pretrained(tmp_path / "direct")), expected)


def test_a_pipeline_brings_its_vae(pipeline_folder: Path, tmp_path: Path, normal: Any) -> None:
    vae, pixels = AutoencoderKL.from_pretrained(pipeline_folder / "vae"), normal(1, 3, 16, 16)
    model = convert_checkpoint(pipeline_folder, tmp_path / "ours")
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        torch.testing.assert_close(model.encode(pixels), expected)
    loaded = load_checkpoint(tmp_path / "ours")
    assert not any("decoder" in name for name in loaded.state_dict())
    assert loaded.config.image_size == 16
    torch.testing.assert_close(loaded(pixels, timestep=9).pooler_output, model(pixels, timestep=9).pooler_output)
    assert (tmp_path / "ours" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("vae_class", [AutoencoderKL, AutoencoderTiny])
def test_another_vae_can_be_put_inside(
    make_transformer: Any, tiny_kl: Any, tiny_taesd: Any, normal: Any, tmp_path: Path, vae_class: type
) -> None:
    vae = tiny_kl if vae_class is AutoencoderKL else tiny_taesd
    vae.save_pretrained(tmp_path / "vae")
    make_transformer(in_channels=4).save_pretrained(tmp_path / "source")
    pixels = normal(1, 3, 16, 16)
    for source, target in (("source", "with-vae"), ("source", "without"), ("without", "added")):
        chosen = None if target == "without" else tmp_path / "vae"
        model = convert_checkpoint(tmp_path / source, tmp_path / target, vae=chosen)
        if chosen is not None:
            loaded = load_checkpoint(tmp_path / target)
            with torch.no_grad():
                encoded = vae.encode(pixels)
                mean = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
                expected = (mean - vae.config.shift_factor) * vae.config.scaling_factor
                torch.testing.assert_close(loaded.encode(pixels), expected)
                assert torch.equal(model.encode(pixels), loaded.encode(pixels))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"beta_schedule": "scaled_linear", "beta_end": 0.012}, {"beta_schedule": "scaled_linear", "beta_end": 0.012}),
        ({"prediction_type": "v_prediction"}, {"prediction_type": "v_prediction"}),
        ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500}, {"num_train_timesteps": 500}),
        ({"trained_betas": [0.01] * 1000}, {"trained_betas": [0.01] * 1000}),
    ],
    ids=lambda value: "-".join(value),
)
def test_the_schedule_is_the_schedulers(
    transformer_folder: Path, tmp_path: Path, scheduler: dict[str, Any], expected: dict[str, Any]
) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(transformer_folder, folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    diffusers_scheduler = DDIMScheduler(**scheduler, clip_sample=False)
    diffusers_scheduler.save_pretrained(folder / "scheduler")
    schedule = convert_checkpoint(folder, tmp_path / "ours").noise_schedule
    loaded = load_checkpoint(tmp_path / "ours")
    assert {name: loaded.config.noise_schedule[name] for name in expected} == expected
    steps = torch.tensor([0, 100, 499])
    for found in (schedule, loaded.noise_schedule):
        alphas_cumprod = diffusers_scheduler.alphas_cumprod[steps]
        torch.testing.assert_close(found.alpha(steps) ** 2, alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_base_model_and_license_are_recorded(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "snapshot_download", lambda *_, **__: str(pipeline_folder))
    for model in (
        ASelectDiTModel.from_diffusers("someone/DiT-tiny"),
        convert_checkpoint("someone/DiT-tiny", tmp_path / "ours"),
        load_checkpoint(tmp_path / "ours"),
    ):
        assert model.config.base_model == "someone/DiT-tiny"
        assert model.config.base_model_license == "cc-by-nc-4.0"
    local = ASelectDiTModel.from_diffusers(pipeline_folder)
    assert local.config.base_model is None, "a local path must not travel with the checkpoint"
    assert local.config.base_model_license == "cc-by-nc-4.0"
    named = load_checkpoint(pipeline_folder, base_model="me/mine", base_model_license="mit")
    assert (named.config.base_model, named.config.base_model_license) == ("me/mine", "mit")


def test_config_fields_can_be_given(transformer_folder: Path) -> None:
    model = ASelectDiTModel.from_diffusers(transformer_folder, timestep=77, feature="blocks.-1.mlp")
    assert (model.config.timestep, model.config.feature) == (77, "blocks.-1.mlp")


# ------------------------------------------------------------------------------------------------------ original .pt


@pytest.mark.parametrize("kind", ["dit", "sit"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["weights", "training"])
def test_an_original_checkpoint_keeps_every_feature(
    original: State, reference_dit: Any, normal: Any, tmp_path: Path, kind: str, wrapped: bool
) -> None:
    """DiT: t and DDPM noise. SiT: the fraction of data as time, straight paths, velocity = data - noise."""
    path = tmp_path / f"{kind}-tiny.pt"
    live = {name: torch.zeros_like(tensor) for name, tensor in original.items()}
    training = {"model": live, "ema": original, "opt": {"step": 3, "state": {}}}
    torch.save(training if wrapped else original, path)
    model = load_checkpoint(path, allow_pickle=True, **SHAPE)
    clean, noise, labels = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1), torch.tensor([0, 5, 2])
    timesteps = [40, 0, 990]
    names = [f"blocks.{index}.{feature}" for index in range(3) for feature in FEATURE_KINDS]
    found = model.extract_features(latents=clean, noise=noise, features=names, timesteps=timesteps, class_labels=labels)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)
    for position, t in enumerate(timesteps):
        if kind == "sit":
            time, alpha, sigma = torch.full((3,), 1 - t / 1000), 1 - t / 1000, t / 1000
        else:
            time = torch.full((3,), float(t))
            alpha, sigma = alphas_cumprod[t].sqrt().item(), (1 - alphas_cumprod[t]).sqrt().item()
        noisy = alpha * clean + sigma * noise
        expected, prediction = reference_dit(original, noisy, time, labels, 3)
        for name in names:
            torch.testing.assert_close(found[name][:, position], expected[name], **CLOSE, msg=f"{name} at t={t}")
        with torch.no_grad():
            torch.testing.assert_close(model.denoise(noisy, t, labels), prediction[:, :4], **CLOSE)
    target = model.noise_schedule.training_target(clean, noise, torch.tensor([40] * 3))
    torch.testing.assert_close(target, clean - noise if kind == "sit" else noise)
    assert model.config.base_model_license == {"dit": "cc-by-nc-4.0", "sit": "mit"}[kind]
    assert model.config.learned_sigma


def test_a_training_checkpoint_as_the_original_script_writes_it(original: State, tmp_path: Path) -> None:
    """It carries the command line's `argparse.Namespace` beside the weights."""
    arguments = argparse.Namespace(model="DiT-XL/2", image_size=256)
    torch.save({"model": original, "ema": original, "opt": {}, "args": arguments}, tmp_path / "dit.pt")
    model = load_checkpoint(tmp_path / "dit.pt", allow_pickle=True, **SHAPE)
    assert torch.equal(model.patch_embedding.weight, original["x_embedder.proj.weight"])


def test_published_widths_need_no_number_of_heads(make_model: Any, original_state: Any, tmp_path: Path) -> None:
    state = original_state(make_model(hidden_size=384, num_attention_heads=6, num_hidden_layers=1, mlp_ratio=4))
    torch.save(state, tmp_path / "DiT-S-2.pt")
    assert (
        load_checkpoint(tmp_path / "DiT-S-2.pt", allow_pickle=True, num_condition_classes=5).config.num_attention_heads
        == 6
    )


def test_an_original_checkpoint_converts_on(original: State, normal: Any, tmp_path: Path) -> None:
    """.pt -> ours on disk, same numbers; -> diffusers with the shift of the frequencies undone, same weights."""
    torch.save(original, tmp_path / "weights.pt")
    options: dict[str, Any] = {"source_format": "dit", "allow_pickle": True, **SHAPE}
    model = convert_checkpoint(tmp_path / "weights.pt", tmp_path / "ours", **options)
    noisy = normal(2, 4, 8, 8)
    assert torch.equal(load_checkpoint(tmp_path / "ours").denoise(noisy, 400), model.denoise(noisy, 400))
    shifted = convert_checkpoint(
        tmp_path / "weights.pt", tmp_path / "theirs", to="diffusers", timestep_freq_shift=1, **options
    )
    transformer = DiTTransformer2DModel.from_pretrained(tmp_path / "theirs" / "transformer").eval()
    assert_same_features(shifted, transformer, normal)


# --------------------------------------------------------------------------------------------- damaged and foreign


def refuse(match: str, source: Any, output: Path | None = None, **options: Any) -> None:
    """`convert_checkpoint` must raise one ValueError of one paragraph that says `match`, and write nothing."""
    with pytest.raises(ValueError, match=match) as caught:
        convert_checkpoint(source, output, **options)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 2000
    if output is not None:
        assert not output.exists()
        assert not list(output.parent.glob(".*partial*"))


def as_pickle(folder: Path) -> None:
    """Replace a diffusers model's safetensors by the pickle of older repositories."""
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    weights.unlink()


def test_pickled_weights_need_permission(
    transformer_folder: Path, pipeline_folder: Path, original: State, tmp_path: Path
) -> None:
    torch.save(original, tmp_path / "dit.pt")
    refuse("allow_pickle=True", tmp_path / "dit.pt", tmp_path / "out", **SHAPE)
    as_pickle(transformer_folder)
    refuse("allow_pickle=True", transformer_folder, tmp_path / "out")
    as_pickle(pipeline_folder / "vae")
    refuse("allow_pickle=True", pipeline_folder, tmp_path / "out")
    assert convert_checkpoint(transformer_folder, tmp_path / "out", allow_pickle=True).config.hidden_size == 24


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_a_pickle_never_runs_code(tmp_path: Path) -> None:
    torch.save({"ema": Malicious(tmp_path / "owned")}, tmp_path / "dit.pt")
    refuse("dit.pt", tmp_path / "dit.pt", tmp_path / "out", allow_pickle=True)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1, 2],
        torch.zeros(3),
        {"ema": {"weight": torch.zeros(3)}},
        {"model": 5},
        "text",
        b"",
        b"PK\x03\x04 truncated",
    ],
    ids=str,
)
def test_a_pt_file_that_is_no_dit(tmp_path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        (tmp_path / "dit.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "dit.pt")
    refuse("dit.pt", tmp_path / "dit.pt", tmp_path / "out", allow_pickle=True)


@pytest.mark.parametrize(
    "absent",
    [
        "x_embedder.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.1.mlp.fc2.bias",
        "pos_embed",
        "final_layer.linear.bias",
    ],
)
def test_an_original_checkpoint_with_a_missing_key(original: State, tmp_path: Path, absent: str) -> None:
    del original[absent]
    torch.save(original, tmp_path / "dit.pt")
    refuse("missing", tmp_path / "dit.pt", tmp_path / "out", allow_pickle=True, **SHAPE)


def test_an_original_checkpoint_with_other_positions(original: State, tmp_path: Path) -> None:
    original["pos_embed"] = original["pos_embed"].flip(1)
    torch.save(original, tmp_path / "dit.pt")
    refuse("position", tmp_path / "dit.pt", tmp_path / "out", allow_pickle=True, **SHAPE)


def test_what_a_pt_file_does_not_say(original: State, tmp_path: Path) -> None:
    torch.save(original, tmp_path / "weights.pt")
    refuse("source_format", tmp_path / "weights.pt", tmp_path / "out", allow_pickle=True)
    refuse("num_attention_heads", tmp_path / "weights.pt", tmp_path / "out", allow_pickle=True, source_format="dit")


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.fixture(params=["diffusers", "aselect"])
def checkpoint(request: pytest.FixtureRequest, transformer_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint in a folder, of either format."""
    if request.param == "diffusers":
        return transformer_folder
    convert_checkpoint(transformer_folder, tmp_path / "ours")
    return tmp_path / "ours"


@pytest.mark.parametrize("kept", [0, 5, 0.5, 0.99])
def test_truncated_safetensors(checkpoint: Path, tmp_path: Path, kept: float) -> None:
    weights = weights_of(checkpoint)
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refuse(checkpoint.name, checkpoint, tmp_path / "out")


@pytest.mark.parametrize("part", ["patch", "mid-block"])
def test_missing_keys_are_never_filled_with_random_numbers(checkpoint: Path, tmp_path: Path, part: str) -> None:
    state = load_file(weights_of(checkpoint))
    absent = [
        name
        for name in state
        if name in ("patch_embedding.weight", "pos_embed.proj.weight" if part == "patch" else "")
        or (part == "mid-block" and name in ("transformer_blocks.1.ff.net.2.weight", "layers.1.mlp.fc2.weight"))
    ]
    absent = absent[:1]
    del state[absent[0]]
    save_file(state, weights_of(checkpoint), metadata={"format": "pt"})
    refuse("missing|cannot be read", checkpoint, tmp_path / "out")


def test_weights_of_another_shape_than_the_config_says(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_embeds_ada_norm" if "num_embeds_ada_norm" in config else "num_condition_classes"] = 3
    (checkpoint / "config.json").write_text(json.dumps(config))
    refuse(checkpoint.name, checkpoint, tmp_path / "out")


def test_weights_file_is_gone(checkpoint: Path, tmp_path: Path) -> None:
    weights_of(checkpoint).unlink()
    refuse(checkpoint.name, checkpoint, tmp_path / "out")


@pytest.mark.parametrize("config", ["", "{", "[]", "{}", '{"model_type": "vit"}', '{"_class_name": "UNet2DModel"}'])
def test_a_folder_of_something_else(transformer_folder: Path, tmp_path: Path, config: str) -> None:
    (transformer_folder / "config.json").write_text(config)
    refuse("source", transformer_folder, tmp_path / "out")


def test_the_type_of_another_model_is_named(transformer_folder: Path, tmp_path: Path) -> None:
    for config, named in (({"model_type": "vit"}, "vit"), ({"_class_name": "UNet2DModel"}, "UNet2DModel")):
        (transformer_folder / "config.json").write_text(json.dumps(config))
        refuse(named, transformer_folder, tmp_path / "out")


def test_from_diffusers_refuses_another_network(
    transformer_folder: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    """Never a random DiT because a UNet's (or our own) config happened to be accepted."""
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    unet.save_pretrained(tmp_path / "unet")
    convert_checkpoint(transformer_folder, tmp_path / "ours")
    shutil.rmtree(pipeline_folder / "transformer")
    shutil.copytree(tmp_path / "unet", pipeline_folder / "transformer")
    for folder in (tmp_path / "unet", pipeline_folder):
        with pytest.raises(ValueError, match="UNet2DModel"):
            ASelectDiTModel.from_diffusers(folder)
    with pytest.raises(ValueError, match="aselect_dit"):
        ASelectDiTModel.from_diffusers(tmp_path / "ours")
    with pytest.raises(ValueError, match="from_diffusers"):
        load_model(transformer_folder)


def test_empty_and_missing_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    refuse("not a checkpoint", tmp_path / "empty", tmp_path / "out")

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(locate, "snapshot_download", unreachable)
    refuse("neither a local path nor reachable", "someone/nothing", tmp_path / "out")


def test_a_pipeline_without_its_transformer(pipeline_folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(pipeline_folder / "transformer")
    refuse("transformer", pipeline_folder, tmp_path / "out")


def test_unsupported_networks_are_named(make_transformer: Any, tmp_path: Path) -> None:
    for config, named in (({"activation_fn": "geglu"}, "geglu"), ({"out_channels": 3}, "out_channels=3")):
        make_transformer(**config).save_pretrained(tmp_path / named)
        refuse(named, tmp_path / named, tmp_path / "out")


def test_what_diffusers_cannot_hold_is_refused_on_the_way_back(
    make_model: Any, original: State, tmp_path: Path
) -> None:
    torch.save(original, tmp_path / "sit.pt")
    options: dict[str, Any] = {"allow_pickle": True, **SHAPE}
    refuse("flow", tmp_path / "sit.pt", tmp_path / "out", to="diffusers", **options)
    make_model(mlp_ratio=2).save_pretrained(tmp_path / "narrow")
    refuse("ratio", tmp_path / "narrow", tmp_path / "out", to="diffusers")
    make_model(mlp_ratio=4, hidden_act="relu").save_pretrained(tmp_path / "relu")
    refuse("relu", tmp_path / "relu", tmp_path / "out", to="diffusers")


def test_unknown_options(transformer_folder: Path, tmp_path: Path) -> None:
    refuse("to must be", transformer_folder, tmp_path / "out", to="onnx")
    refuse("source_format", transformer_folder, tmp_path / "out", source_format="flax")


def test_a_vae_that_does_not_fit(transformer_folder: Path, tiny_kl: Any, tmp_path: Path) -> None:
    tiny_kl.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="latent_channels"):
        convert_checkpoint(transformer_folder, tmp_path / "out", vae=tmp_path / "vae")
    refuse("AutoencoderKL", transformer_folder, tmp_path / "out", vae=transformer_folder)
    convert_checkpoint(transformer_folder, tmp_path / "ours")
    with pytest.raises(ValueError, match="latent_channels"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "out", vae=tmp_path / "vae")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ output


def test_nothing_is_overwritten(transformer_folder: Path, tmp_path: Path) -> None:
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "keep.txt").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    for taken in (full, file, transformer_folder):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=f"{taken.name}.* exists"):
            convert_checkpoint(transformer_folder, taken)
        assert sorted(tmp_path.rglob("*")) == before
    convert_checkpoint(transformer_folder, empty)
    assert (empty / "config.json").is_file()


def test_an_output_that_cannot_be_written(transformer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="not writable"):
        convert_checkpoint(transformer_folder, tmp_path / "file" / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_read_only_folder(transformer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched, because an administrator may write anywhere."""

    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", deny)
    with pytest.raises(ValueError, match=r"out is not writable.*Permission denied"):
        convert_checkpoint(transformer_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["aselect", "diffusers"])
@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_interrupted_conversion_leaves_nothing(
    transformer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any, error: BaseException
) -> None:
    def half(_model: Any, folder: Path) -> None:
        (folder / "half.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(convert, "save_model", half)
    monkeypatch.setattr(convert, "save_diffusers", half)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(type(error)):
        convert_checkpoint(transformer_folder, tmp_path / "out", to=to)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    convert_checkpoint(transformer_folder, tmp_path / "out", to=to)
    assert (tmp_path / "out").is_dir()
