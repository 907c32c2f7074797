"""Prompts of every family with real text encoders: what is stored is what the stock pipeline passes to its network."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import PIPELINES, flux_pipeline, sd3_pipeline, t5
from typer.testing import CliRunner

import aselect_hf
from aselect_cli.app import app
from aselect_hf import ASelectDiffusionConfig, ASelectDiffusionForImageClassification
from aselect_hf.conversion import convert_checkpoint, load_model


class PassedError(Exception):
    """The pipeline has passed its prompt on."""


NAMES = {
    "encoder_hidden_states": "prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "attention_mask": "prompt_attention_mask",
    "cap_feats": "prompt_embeds",
    "text_embedding_mask": "prompt_attention_mask",
    "encoder_hidden_states_t5": "prompt_embeds_2",
    "text_embedding_mask_t5": "prompt_attention_mask_2",
}
"""Our names of tensors of the prompt, by those of transformers' arguments."""


def passed(pipeline: Any, prompt: str, **options: Any) -> dict[str, torch.Tensor]:
    """What a pipeline passes to its transformer, by our names, without a batch."""
    calls: list[dict[str, Any]] = []
    names = inspect.signature(pipeline.transformer.forward).parameters

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(dict(zip(names, args, strict=False)) | kwargs)
        raise PassedError

    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.forward = forward
    try:
        with contextlib.suppress(PassedError):
            pipeline(prompt=prompt, num_inference_steps=2, height=32, width=32, output_type="latent", **options)
    finally:
        del pipeline.transformer.forward
    found = {name: calls[0][theirs][0] for theirs, name in NAMES.items() if theirs in calls[0]}
    if "prompt_attention_mask" in found:  # Chroma's goes on over the image
        found["prompt_attention_mask"] = found["prompt_attention_mask"][: len(found["prompt_embeds"])]
    return {name: tensor.float() for name, tensor in found.items()}


OPTIONS: dict[str, dict[str, Any]] = {
    "SD3": {"guidance_scale": 0.0},
    "FLUX": {},
    "Chroma": {"guidance_scale": 0.0},
    "PixArt": {"guidance_scale": 1.0, "use_resolution_binning": False, "negative_prompt": None},
    "Sana": {"guidance_scale": 1.0, "use_resolution_binning": False, "complex_human_instruction": None},
    "FLUX.2": {"guidance_scale": 1.0},
    "Qwen-Image": {"true_cfg_scale": 1.0},
    "Lumina-Image 2": {"guidance_scale": 1.0},
    "Z-Image": {"guidance_scale": 0.0},
    "PRX": {"guidance_scale": 1.0, "use_resolution_binning": False},
    "AuraFlow": {"guidance_scale": 1.0},
    "CogView4": {"guidance_scale": 1.0},
    "HunyuanDiT": {"guidance_scale": 1.0, "use_resolution_binning": False},
}


@pytest.mark.parametrize("prompt", ["", "a b a"])
@pytest.mark.parametrize("family", PIPELINES)
def test_the_stored_prompt_is_what_the_pipeline_passes(
    family: str, prompt: str, randomize: Any, tmp_path: Path
) -> None:
    """From a folder, from memory, and given as a file; each of them makes the same model."""
    pipeline = PIPELINES[family](tmp_path, randomize)
    expected = passed(pipeline, prompt, **OPTIONS[family])
    assert expected["prompt_embeds"].std() > 0
    pipeline.save_pretrained(tmp_path / "pipeline")
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "prompt.safetensors")
    size = {"image_size": 8 if family == "Sana" else 16}
    models = [
        aselect_hf.from_diffusers(tmp_path / "pipeline", prompt=prompt, **size),
        aselect_hf.from_diffusers(pipeline, prompt=prompt, **size),
        aselect_hf.from_diffusers(tmp_path / "pipeline", prompt_embeds=tmp_path / "prompt.safetensors", **size),
        ASelectDiffusionForImageClassification.from_diffusers(pipeline, prompt=prompt, num_labels=2, **size).base_model,
    ]
    for model in models:
        assert model.config.conditioning == {name: list(tensor.shape) for name, tensor in expected.items()}
        for name, tensor in expected.items():
            torch.testing.assert_close(getattr(model, f"conditioning_{name}"), tensor, rtol=1e-5, atol=1e-5)
    assert models[0].config.prompt == prompt


def test_sd3_without_t5(randomize: Any, tmp_path: Path) -> None:
    """Its pipeline puts zeros in the place of T5; the other encoders cannot be left out."""
    pipeline = sd3_pipeline(tmp_path, randomize)
    without = passed(pipeline, "a", **OPTIONS["SD3"])
    encoder, tokenizer = t5()
    encoder = type(encoder)(type(encoder.config)(**(encoder.config.to_dict() | {"d_model": 32}))).eval()
    pipeline.register_modules(text_encoder_3=encoder, tokenizer_3=tokenizer)
    with_t5 = passed(pipeline, "a", **OPTIONS["SD3"])
    pipeline.save_pretrained(tmp_path / "pipeline")
    for source in (pipeline, tmp_path / "pipeline"):
        for skip, expected in (([], with_t5), (["text_encoder_3"], without)):
            model = aselect_hf.from_diffusers(source, prompt="a", skip_text_encoders=skip)
            assert model.config.skipped_text_encoders == (skip or None)
            found = model.conditioning_prompt_embeds
            torch.testing.assert_close(found, expected["prompt_embeds"], rtol=1e-5, atol=1e-5)
    assert not torch.equal(with_t5["prompt_embeds"], without["prompt_embeds"])
    for source in (pipeline, tmp_path / "pipeline"):
        with pytest.raises(ValueError, match=r"encodes no prompt without it \(it can do without text_encoder_3 only\)"):
            aselect_hf.from_diffusers(source, prompt="a", skip_text_encoders=["text_encoder_2"])


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_a_prompt_that_needs_a_skipped_encoder_is_refused(randomize: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'{name}', but the pipeline .* \(it needs all of them\): pass prompt_embeds"
    ):
        aselect_hf.from_diffusers(flux_pipeline(tmp_path, randomize), prompt="a", skip_text_encoders=[name])


def test_masks_have_the_tokens_of_the_prompt(randomize: Any, tmp_path: Path) -> None:
    pipeline = PIPELINES["PixArt"](tmp_path, randomize)
    prompt = {"prompt_embeds": torch.zeros(5, 12), "prompt_attention_mask": torch.ones(1, 4)}
    with pytest.raises(ValueError, match="prompt_attention_mask has 4 tokens, but others have 5"):
        aselect_hf.from_diffusers(pipeline, prompt_embeds=prompt)


def test_a_network_with_places_for_its_text_takes_just_so_many_tokens(randomize: Any, tmp_path: Path) -> None:
    pipeline = PIPELINES["HunyuanDiT"](tmp_path, randomize)
    prompt = {
        "prompt_embeds": torch.zeros(76, 8),
        "prompt_attention_mask": torch.ones(76),
        "prompt_embeds_2": torch.zeros(256, 16),
        "prompt_attention_mask_2": torch.ones(256),
    }
    with pytest.raises(ValueError, match="prompt_embeds has 76 tokens, but this network takes 77"):
        aselect_hf.from_diffusers(pipeline, prompt_embeds=prompt)
    with pytest.raises(ValueError, match="conditioning prompt_embeds must have text_len=77 tokens, got 76"):
        ASelectDiffusionConfig(
            transformer_class="HunyuanDiT2DModel",
            transformer_config={"cross_attention_dim": 8, "cross_attention_dim_t5": 16},
            conditioning={name: list(tensor.shape) for name, tensor in prompt.items()},
        )


def test_the_prompts_of_prx_need_a_package(randomize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = PIPELINES["PRX"](tmp_path, randomize)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="encodes prompts with ftfy: pip install ftfy, or pass prompt_embeds"):
        aselect_hf.from_diffusers(pipeline, prompt="a", image_size=16)


def test_guidance_in_python_and_on_the_command_line(randomize: Any, tmp_path: Path) -> None:
    flux_pipeline(tmp_path, randomize, guided=True).save_pretrained(tmp_path / "dev")
    flux_pipeline(tmp_path, randomize).save_pretrained(tmp_path / "schnell")
    asked = ["--guidance", "4", "--image-size", "16"]
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "dev"), str(tmp_path / "out"), *asked])
    assert done.exit_code == 0, done.output
    model = load_model(tmp_path / "out")
    assert model.config.guidance == 4.0
    prompt = {name: getattr(model, f"conditioning_{name}") for name in model.config.conditioning}
    asked_in_python: dict[str, Any] = {"prompt_embeds": prompt, "image_size": 16}
    latents = torch.zeros(1, 4, 8, 8)
    found = {
        guidance: aselect_hf.from_diffusers(tmp_path / "dev", guidance=guidance, **asked_in_python)(
            latents=latents, timestep=300
        ).last_hidden_state
        for guidance in (1.0, 4.0, None)
    }
    own = model(latents=latents, timestep=300).last_hidden_state
    torch.testing.assert_close(found[4.0], own, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1.0], found[None])
    assert not torch.allclose(found[1.0], found[4.0], atol=1e-3)
    with pytest.raises(ValueError, match=r"guidance=4.0, but this FluxTransformer2DModel takes no guidance"):
        convert_checkpoint(tmp_path / "schnell", text={"guidance": 4.0}, image_size=16)
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "schnell"), str(tmp_path / "no"), *asked])
    assert done.exit_code == 2
    assert not (tmp_path / "no").exists()
