"""Pipelines of diffusers of every family as backbones: by component, with their prompt, and only the blocks needed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import PIPELINES, sd3_pipeline
from transformers import AutoModel

import aselect_hf
from aselect_hf import ASelectDiffusionForImageClassification, ASelectDiffusionModel, ASelectDiTModel
from aselect_hf.conversion import convert_checkpoint, load_model, save_model

from .tiny_transformers import TINY, tiny_model


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, randomize: Any) -> Any:
    return sd3_pipeline(tmp_path_factory.mktemp("tokenizer"), randomize)


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture
def images(normal: Any) -> torch.Tensor:
    return normal(2, 3, 16, 16).clamp(-1, 1)


@torch.no_grad()
def expected_query(pipeline: Any, model: Any, images: torch.Tensor, prompt: str = "") -> torch.Tensor:
    """The query of block 1 at t = 141, by a hook on the stock transformer and the stock pipeline's own prompt."""
    embeds, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
    latents = (pipeline.vae.encode(images).latent_dist.mean - 0.1) * 0.2
    noisy = 0.859 * latents + 0.141 * model.evaluation_noise
    found: list[torch.Tensor] = []
    to_q = pipeline.transformer.transformer_blocks[1].attn.to_q
    handle = to_q.register_forward_hook(lambda _, __, output: found.append(output))
    pipeline.transformer(
        noisy, embeds.expand(2, -1, -1), pooled.expand(2, -1), torch.full((2,), 141.0), return_dict=False
    )
    handle.remove()
    return found[0]


@pytest.mark.parametrize("prompt", ["", "a b a"])
def test_a_pipeline_becomes_a_backbone(pipeline: Any, folder: Path, images: Any, tmp_path: Path, prompt: str) -> None:
    model = aselect_hf.from_diffusers(folder, prompt=prompt, feature="blocks.1.query", timestep=141)
    assert isinstance(model, ASelectDiffusionModel)
    assert model.config.kept_blocks == 2
    assert model.config.conditioning == {"prompt_embeds": [333, 32], "pooled_prompt_embeds": [16]}
    assert model.noise_schedule.type == "flow_matching"
    with torch.no_grad():
        found = model(images).last_hidden_state
    torch.testing.assert_close(found, expected_query(pipeline, model, images, prompt), rtol=1e-4, atol=1e-4)
    save_model(model, tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(images).last_hidden_state, found)
    assert torch.equal(load_model(tmp_path / "saved")(images).last_hidden_state, found)


def test_all_ways_to_say_the_same_agree(folder: Path, images: Any, tmp_path: Path) -> None:
    """All encode with weights that lie in memory as in the file, since the last bits may depend on that."""
    pipeline: Any = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    embeds, _, pooled, _ = pipeline.encode_prompt("", None, None, do_classifier_free_guidance=False)
    prompt = {"prompt_embeds": embeds.contiguous(), "pooled_prompt_embeds": pooled.contiguous()}
    save_file(prompt, tmp_path / "prompt.safetensors")
    asked: dict[str, Any] = {"feature": "blocks.1.query", "timestep": 141}
    without = tmp_path / "without-encoders"
    shutil.copytree(folder, without, ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    models = [
        aselect_hf.from_diffusers(pipeline, **asked),
        aselect_hf.from_diffusers(without, prompt_embeds=prompt, **asked),
        aselect_hf.from_diffusers(str(without), prompt_embeds=tmp_path / "prompt.safetensors", **asked),
        aselect_hf.from_diffusers(folder, keep="all", **asked),
        ASelectDiffusionModel.from_diffusers(folder, **asked),
        convert_checkpoint(folder, text={"keep": "feature"}, **asked),
        aselect_hf.from_diffusers(pipeline.transformer, vae=pipeline.vae, prompt_embeds=prompt, **asked),
    ]
    first, *others = [model(images).last_hidden_state for model in models]
    for other in others:
        assert torch.equal(other, first)
    assert models[3].config.is_whole
    with pytest.raises(ValueError, match=r"no text encoder|text encoders of .* cannot be read"):
        aselect_hf.from_diffusers(without)


def test_a_pipeline_becomes_a_plain_network(pipeline: Any, folder: Path, images: Any, tmp_path: Path) -> None:
    """No prompt, no time and no text of the feature's block is left; the zeros in place of T5 are one token."""
    fixed = convert_checkpoint(folder, tmp_path / "fixed", fix_timestep=True, timestep=141, feature="blocks.1.query")
    whole = aselect_hf.from_diffusers(folder, feature="blocks.1.query", timestep=141)
    loaded = AutoModel.from_pretrained(tmp_path / "fixed")
    with torch.no_grad():
        found = loaded(images).last_hidden_state
        torch.testing.assert_close(found, whole(images).last_hidden_state, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, expected_query(pipeline, whole, images), rtol=1e-3, atol=1e-3)
    tokens = whole.config.conditioning["prompt_embeds"][0]
    assert sorted(fixed.config.merged_tokens) == [1] * 77 + [tokens - 77]
    assert fixed.num_parameters() < 0.6 * whole.num_parameters()


def test_blocks_after_the_feature_are_not_read(folder: Path, images: Any, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = {name: x for name, x in load_file(weights).items() if not name.startswith("transformer_blocks.2.")}
    save_file(state, weights)
    expected, found = (
        aselect_hf.from_diffusers(source, feature="blocks.1.query")(images).last_hidden_state
        for source in (folder, tmp_path / "copy")
    )
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"transformer_blocks\.2\..*missing"):
        aselect_hf.from_diffusers(tmp_path / "copy", keep="all")


def test_an_encoder_that_is_not_there_cannot_be_left_out(folder: Path) -> None:
    with pytest.raises(ValueError, match="this pipeline has text_encoder, text_encoder_2"):
        aselect_hf.from_diffusers(folder, skip_text_encoders=["text_encoder_3"])


@pytest.mark.parametrize("family", TINY)
def test_a_transformer_of_every_family_converts(family: str, randomize: Any, normal: Any) -> None:
    stock = randomize(tiny_model(family))
    side = stock.config.sample_size
    latents = normal(1, stock.config.num_channels, side, side)
    prompt = {name: getattr(stock, f"conditioning_{name}") for name in stock.config.conditioning}
    model = aselect_hf.from_diffusers(
        stock.transformer, prompt_embeds=prompt, image_size=side, guidance=stock.config.guidance, feature="blocks.1.key"
    )
    assert model.config.kept_blocks == 2
    for name in ("blocks.0.hidden", "blocks.1.key"):
        found, expected = (x(latents=latents, feature=name, timestep=300).last_hidden_state for x in (model, stock))
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": "some"}, "keep must be 'feature' or 'all'"),
        ({"feature": "blocks.9.query"}, "there is no block 9"),
        ({"guidance": 3.5}, "takes no guidance"),
        ({"image_size": 64}, "positions of this network end"),
        ({"prompt_embeds": torch.zeros(1)}, "prompt_embeds must be a dictionary"),
        ({"prompt_embeds": {"prompt_embeds": torch.zeros(1, 5, 32)}}, "pooled_prompt_embeds"),
        ({"prompt_embeds": {}}, "for a SD3Transformer2DModel, got none"),
        (
            {"prompt_embeds": {"prompt_embeds": torch.zeros(5, 31), "pooled_prompt_embeds": torch.zeros(16)}},
            r"prompt_embeds must be \(tokens, 32\), with or without a batch of 1, got \(5, 31\)",
        ),
        (
            {"prompt_embeds": {"prompt_embeds": torch.zeros(32), "pooled_prompt_embeds": torch.zeros(16)}},
            r"prompt_embeds must be \(tokens, 32\)",
        ),
        (
            {"prompt_embeds": {"prompt_embeds": torch.zeros(2, 5, 32), "pooled_prompt_embeds": torch.zeros(2, 16)}},
            r"got \(2, 5, 32\)",
        ),
        (
            {"prompt_embeds": {"prompt_embeds": torch.zeros(5, 32), "pooled_prompt_embeds": torch.zeros(1, 1, 16)}},
            r"pooled_prompt_embeds must be \(16,\), .* got \(1, 1, 16\)",
        ),
        (
            {
                "prompt_embeds": {
                    "prompt_embeds": torch.full((5, 32), torch.nan),
                    "pooled_prompt_embeds": torch.zeros(16),
                }
            },
            "holds NaN",
        ),
        ({"prompt_embeds": {}, "prompt": "a"}, "leave prompt"),
        ({"prompt_embeds": "nowhere.safetensors"}, "cannot be read"),
        ({"skip_text_encoders": ["text_encoder", "text_encoder_2"]}, "leaves no text encoder"),
        ({"scheduler": diffusers.DDIMScheduler()}, "does not fit"),
        ({"model_class": ASelectDiTModel}, "is for a DiT"),
    ],
    ids=str,
)
def test_what_contradicts_the_source_is_refused(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aselect_hf.from_diffusers(folder, **arguments)


def test_other_sources_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'promt': did you mean"):
        aselect_hf.from_diffusers(folder, promt="a")
    shutil.copytree(folder / "transformer", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ValueError, match=r"UNet2DConditionModel.*supported are SD3Transformer2DModel.*families\.md"):
        aselect_hf.from_diffusers(tmp_path / "other")
    with pytest.raises(ValueError, match="a transformer alone has no text encoder"):
        aselect_hf.from_diffusers(folder / "transformer")


@pytest.mark.parametrize(
    "class_name", ["HiDreamImageTransformer2DModel", "WanTransformer3DModel", "UNet2DConditionModel"]
)
def test_a_known_class_is_refused_with_a_reason(folder: Path, tmp_path: Path, class_name: str) -> None:
    shutil.copytree(folder / "transformer", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"_class_name": class_name}))
    for convert in (aselect_hf.from_diffusers, convert_checkpoint):
        with pytest.raises(ValueError, match=rf"'{class_name}' is not supported: it.*supported are.*#how-to-add"):
            convert(tmp_path / "other")


def test_a_pipeline_of_a_unet_is_refused(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="UNet2DConditionModel' is not supported: it is a U-Net"):
        aselect_hf.from_diffusers(tmp_path)


def test_an_old_diffusers_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aselect_hf.from_diffusers(folder).save_pretrained(tmp_path)
    monkeypatch.setattr(diffusers, "__version__", "0.35.2")
    sentence = "a SD3Transformer2DModel needs diffusers 0.36.0 or newer, but 0.35.2 is installed: pip install --upgrade"
    for load in (aselect_hf.from_diffusers, ASelectDiffusionModel.from_pretrained):
        with pytest.raises(ImportError, match=sentence):
            load(folder if load is aselect_hf.from_diffusers else tmp_path)
    monkeypatch.setattr(diffusers, "__version__", "0.36.0.dev0")
    assert AutoModel.from_pretrained(tmp_path).config.kept_blocks == 2


def test_a_quantized_transformer_is_refused(pipeline: Any, folder: Path, tmp_path: Path) -> None:
    """By its config before any weight is read; in memory, and in files that do not say so, by its weights."""
    shutil.copytree(folder, tmp_path / "other")
    config = tmp_path / "other" / "transformer" / "config.json"
    original = config.read_text()
    config.write_text(json.dumps(json.loads(original) | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    weights = config.with_name("diffusion_pytorch_model.safetensors")
    weights.rename(weights.with_suffix(".moved"))
    with pytest.raises(ValueError, match=r"transformer is quantized \(its config has a quantization_config\)"):
        aselect_hf.from_diffusers(tmp_path / "other")
    config.write_text(original)
    state = load_file(weights.with_suffix(".moved"))
    name = "transformer_blocks.0.attn.to_q.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, weights)
    with pytest.raises(ValueError, match=rf"quantized \({name} is a Tensor of torch.float8_e4m3fn\)"):
        aselect_hf.from_diffusers(tmp_path / "other")
    quantized = copy.deepcopy(pipeline.transformer)
    linear = quantized.transformer_blocks[0].attn.to_q
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    prompt = {"prompt_embeds": torch.zeros(5, 32), "pooled_prompt_embeds": torch.zeros(16)}
    with pytest.raises(ValueError, match=rf"SD3Transformer2DModel is quantized \({name} is a Tensor of torch.int8\)"):
        aselect_hf.from_diffusers(quantized, prompt_embeds=prompt)


def test_a_float16_network_that_overflows_says_where(folder: Path, images: Any) -> None:
    model = aselect_hf.from_diffusers(folder, feature="blocks.1.query")
    with torch.no_grad():
        model.transformer.transformer_blocks[0].ff.net[2].weight.mul_(1e6)
    assert model(images).last_hidden_state.isfinite().all()
    message = r"blocks\.0 gives NaN or infinite values in torch.float16: .* use bfloat16 \(--dtype bfloat16\)"
    with pytest.raises(ValueError, match=message):
        model.half()(images)
    overflown = {"prompt_embeds": torch.full((5, 32), torch.inf).half(), "pooled_prompt_embeds": torch.zeros(16)}
    with pytest.raises(ValueError, match=r"infinite values in torch.float16: encode it in bfloat16"):
        aselect_hf.from_diffusers(folder, prompt_embeds=overflown)


def test_the_class_name_of_older_repositories(randomize: Any, tmp_path: Path) -> None:
    """The published PixArt repositories say `Transformer2DModel`, and its config has more fields."""
    pipeline = PIPELINES["PixArt"](tmp_path, randomize)
    pipeline.save_pretrained(tmp_path / "pipeline")
    expected = aselect_hf.from_diffusers(tmp_path / "pipeline", prompt="a")
    config = tmp_path / "pipeline" / "transformer" / "config.json"
    fields = json.loads(config.read_text())
    assert fields["norm_type"] == "ada_norm_single"
    config.write_text(json.dumps(fields | {"_class_name": "Transformer2DModel", "num_vector_embeds": None}))
    found = convert_checkpoint(tmp_path / "pipeline", text={"prompt": "a"})
    assert found.config.to_dict() == expected.config.to_dict()


@pytest.mark.parametrize("kind", ["pipeline", "saved"])
def test_a_whole_network_goes_back_to_diffusers(pipeline: Any, folder: Path, tmp_path: Path, kind: str) -> None:
    """Its weights are those of the source, bit for bit, and so are the configs; the network reads them."""
    source: Any = folder
    if kind == "saved":
        source = tmp_path / "ours"
        convert_checkpoint(folder, source, text={"keep": "all"}, vae_decoder=True)
    convert_checkpoint(source, tmp_path / "back", to="diffusers")
    for part in ("transformer", "vae"):
        name = "diffusion_pytorch_model.safetensors"
        before, after = (load_file(place / part / name) for place in (folder, tmp_path / "back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    stock = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "back" / "transformer")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "back" / "scheduler")
    for pair in ((stock, pipeline.transformer), (scheduler, pipeline.scheduler)):
        back, own = ({name: x for name, x in each.config.items() if not name.startswith("_")} for each in pair)
        assert json.dumps(back, sort_keys=True) == json.dumps(own, sort_keys=True)


@pytest.mark.parametrize("family", TINY)
def test_a_transformer_of_every_family_goes_back(family: str, randomize: Any, tmp_path: Path) -> None:
    stock = randomize(tiny_model(family))
    prompt = {name: getattr(stock, f"conditioning_{name}") for name in stock.config.conditioning}
    side = stock.config.sample_size
    convert_checkpoint(
        stock.transformer, tmp_path / "back", to="diffusers", text={"prompt_embeds": prompt}, image_size=side
    )
    stock_class = getattr(diffusers, stock.config.transformer_class)
    back, report = stock_class.from_pretrained(tmp_path / "back" / "transformer", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, stock.transformer.state_dict()[name])


def test_a_way_back_without_what_was_dropped_is_refused(folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(folder, tmp_path / "ours", feature="blocks.0.query", image_size=8)
    asked: list[tuple[Path, dict[str, Any]]] = [
        (tmp_path / "ours", {}),
        (folder, {"text": {"keep": "feature"}, "feature": "blocks.0.query", "image_size": 8}),
    ]
    for source, options in asked:
        with pytest.raises(ValueError) as raised:
            convert_checkpoint(source, tmp_path / "out", to="diffusers", **options)
        assert str(raised.value) == (
            "this model cannot go back to diffusers without the blocks from 1 on and the positions outside of the "
            'middle 2x2, which were left out when it was converted: convert its source again with keep="all"'
        )
        assert not (tmp_path / "out").exists()


def test_a_head_is_put_on_a_pipeline(folder: Path, images: Any, tmp_path: Path) -> None:
    model = ASelectDiffusionForImageClassification.from_diffusers(folder, feature="blocks.1.query", num_labels=3)
    assert model(images).logits.shape == (2, 3)
    save_model(model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", ASelectDiffusionForImageClassification)
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_the_dtype_is_that_asked_for(folder: Path, images: Any) -> None:
    model = aselect_hf.from_diffusers(folder, dtype="bfloat16")
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    whole = aselect_hf.from_diffusers(folder)(images).last_hidden_state
    assert torch.cosine_similarity(model(images).last_hidden_state.float(), whole, dim=-1).min() > 0.99


def test_cogview_needs_the_shift_that_it_computes_its_time_from(randomize: Any, tmp_path: Path) -> None:
    pipeline = PIPELINES["CogView4"](tmp_path, randomize)
    for scheduler in (
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "base_shift": 0.25, "max_shift": 0.75},
    ):
        with pytest.raises(ValueError, match="needs a scheduler with time_shift_type='linear', got 'exponential'"):
            aselect_hf.from_diffusers(pipeline, scheduler=scheduler, image_size=16)


def test_sana_comes_with_its_own_autoencoder(randomize: Any, normal: Any, tmp_path: Path) -> None:
    """AutoencoderDC has no posterior and no shift; the flow is inside a DPM scheduler."""
    vae = randomize(
        diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=4,
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_block_types="ResBlock",
            decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
            scaling_factor=0.4,
        )
    )  # fmt: skip
    stock = randomize(tiny_model("Sana"))
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    diffusers.SanaPipeline(
        transformer=stock.transformer, scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None
    ).save_pretrained(tmp_path / "sana")
    prompt = {name: getattr(stock, f"conditioning_{name}") for name in stock.config.conditioning}
    model = aselect_hf.from_diffusers(tmp_path / "sana", prompt_embeds=prompt)
    assert model.config.image_size == 16
    images = normal(2, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        latents = 0.4 * vae.encode(images).latent
        torch.testing.assert_close(model.encode(images), latents, rtol=1e-5, atol=1e-5)
        expected = stock(latents=latents, timestep=100, feature=model.config.feature).last_hidden_state
        torch.testing.assert_close(model(images, timestep=100).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    save_model(model, tmp_path / "saved")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "saved").encode(images), model.encode(images))


def test_the_command_line_converts(folder: Path, images: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from aselect_cli.app import app

    options = ["--prompt", "a b", "--keep", "all", "--feature", "blocks.1.query", "--timestep", "141"]
    done = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), *options])
    assert done.exit_code == 0, done.output
    model = load_model(tmp_path / "out")
    assert model.config.prompt == "a b"
    expected = aselect_hf.from_diffusers(folder, prompt="a b", feature="blocks.1.query", timestep=141)
    assert torch.equal(model(images).last_hidden_state, expected(images).last_hidden_state)


def test_the_first_blocks_train_without_a_denoising_loss(folder: Path) -> None:
    from aselect_hf.training.objective import HeadSetting, TaskObjective

    model = ASelectDiffusionForImageClassification.from_diffusers(folder, feature="blocks.1.query", timestep=100)
    with pytest.raises(ValueError, match="denoising_loss_weight must be 0 for a network without its last blocks"):
        TaskObjective(model, [HeadSetting(1e-3, 0.0)], denoising_loss_weight=1.0)


@torch.no_grad()
def test_flux2_encodes_as_its_pipeline_does(randomize: Any, normal: Any, tmp_path: Path) -> None:
    """2 x 2 latents are packed, then normalized by the statistics of the autoencoder's batch norm."""
    pipeline = PIPELINES["FLUX.2"](tmp_path, randomize)
    pipeline.save_pretrained(tmp_path / "pipeline")
    model = aselect_hf.from_diffusers(tmp_path / "pipeline", image_size=16, vae_decoder=True)
    assert (model.config.vae_downsampling, model.config.sample_size, model.config.num_channels) == (4, 4, 16)
    assert model.has_posterior
    images = normal(2, 3, 16, 16).clamp(-1, 1)
    expected = pipeline._encode_vae_image(images, torch.Generator())
    latents, log_variance = model.encode_posterior(images)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    posterior = pipeline.vae.encode(images).latent_dist
    sample = posterior.mean + posterior.std
    scale = (pipeline.vae.bn.running_var + pipeline.vae.config.batch_norm_eps).rsqrt()[:, None, None]
    difference = pipeline._patchify_latents(sample - posterior.mean) * scale
    torch.testing.assert_close((log_variance / 2).exp(), difference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(latents), pipeline.vae.decode(posterior.mean).sample, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    loaded = ASelectDiffusionModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.encode(images), latents)
    path = tmp_path / "pipeline" / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_per_block": 65536}))
    with pytest.raises(ValueError, match=r"65536 blocks in encoder\.down_blocks\.0\.resnets, the weights have 1"):
        aselect_hf.from_diffusers(tmp_path / "pipeline", image_size=16)


@torch.no_grad()
def test_qwen_image_encodes_as_its_pipeline_does(randomize: Any, normal: Any, tmp_path: Path) -> None:
    """An image is a film of one frame, and latents are normalized per channel."""
    pipeline = PIPELINES["Qwen-Image"](tmp_path, randomize)
    pipeline.save_pretrained(tmp_path / "pipeline")
    model = aselect_hf.from_diffusers(tmp_path / "pipeline", image_size=16, vae_decoder=True)
    assert (model.config.vae_downsampling, model.config.sample_size, model.config.num_channels) == (2, 8, 4)
    assert model.has_posterior
    images = normal(2, 3, 16, 16).clamp(-1, 1)
    posterior = pipeline.vae.encode(images[:, :, None]).latent_dist
    mean, deviation = (
        torch.tensor(pipeline.vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std")
    )
    latents, log_variance = model.encode_posterior(images)
    torch.testing.assert_close(latents, (posterior.mean[:, :, 0] - mean) / deviation, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((log_variance / 2).exp(), posterior.std[:, :, 0] / deviation, rtol=1e-4, atol=1e-5)
    expected = pipeline.vae.decode(posterior.mean).sample[:, :, 0]
    torch.testing.assert_close(model.decode(latents), expected, rtol=1e-4, atol=1e-4)
    without = aselect_hf.from_diffusers(pipeline, image_size=16)
    without.save_pretrained(tmp_path / "saved")
    assert torch.equal(ASelectDiffusionModel.from_pretrained(tmp_path / "saved").encode(images), latents)
