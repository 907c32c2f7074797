"""Tiny text-to-image pipelines of diffusers with real text encoders of random weights and tokenizers of a few words."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from diffusers.pipelines.prx import pipeline_prx
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)  # fmt: skip
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

SD3: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 16,
    "pos_embed_max_size": 6,
}  # fmt: skip


FLUX: dict[str, Any] = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 12, "axes_dims_rope": [2, 2, 4],
}  # fmt: skip
CHROMA: dict[str, Any] = {
    **FLUX, "approximator_num_channels": 64, "approximator_hidden_dim": 16, "approximator_layers": 1,
}  # fmt: skip
CROSS: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
    "cross_attention_dim": 16, "caption_channels": 12,
}  # fmt: skip


GEMMA: dict[str, Any] = {
    "vocab_size": 8, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 512,
}  # fmt: skip


def tiny_vae(randomize: Any) -> Any:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.2,
        shift_factor=0.1,
    )
    return randomize(vae, seed=5)


def clip(folder: Path, width: int = 8) -> tuple[Any, Any]:
    """A CLIP text encoder and a tokenizer of two words."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=4, hidden_size=width, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return config, tokenizer


def t5(width: int = 12, encoder: Any = T5EncoderModel, config: Any = T5Config) -> tuple[Any, Any]:
    """An encoder of T5's kind and a tokenizer of two words."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("▁b", -1.0)]
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0, model_max_length=512)
    torch.manual_seed(4)
    shape = {"vocab_size": 6, "d_model": width, "d_kv": 6, "d_ff": 8, "num_layers": 2, "num_heads": 2}
    return encoder(config(**shape)).eval(), tokenizer


def bert(folder: Path) -> tuple[Any, Any]:
    """A BERT of width 8 and a tokenizer of two words."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77,
    )  # fmt: skip
    return BertModel(config).eval(), BertTokenizer(str(folder / "vocab.txt"), model_max_length=77)


def gemma() -> tuple[Any, Any]:
    """A Gemma 2 of width 12 and a tokenizer of two words."""
    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "a": 5, "b": 6, "▁": 7}
    torch.manual_seed(6)
    tokenizer = GemmaTokenizer(vocab=words, merges=[], model_max_length=512)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return Gemma2Model(Gemma2Config(**GEMMA)).eval(), tokenizer


def t5_gemma() -> tuple[Any, Any]:
    """The encoder of a T5Gemma of width 12, saved with the config of the whole as published, and the same tokenizer."""
    config = T5GemmaConfig(encoder=dict(GEMMA), decoder=dict(GEMMA), vocab_size=8)
    torch.manual_seed(7)
    encoder = T5GemmaEncoder(config.encoder).eval()
    save = encoder.save_pretrained

    def save_whole(folder: Any, **options: Any) -> None:
        save(folder, **options)
        config.save_pretrained(folder)

    encoder.save_pretrained = save_whole
    return encoder, gemma()[1]


def sd3_pipeline(folder: Path, randomize: Any) -> Any:
    """Stable Diffusion 3 with both CLIP encoders and without T5, as the authors of A-SelecT use it."""
    config, tokenizer = clip(folder)
    torch.manual_seed(3)
    return diffusers.StableDiffusion3Pipeline(
        transformer=randomize(diffusers.SD3Transformer2DModel(**SD3)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(randomize), text_encoder=CLIPTextModelWithProjection(config).eval(), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config).eval(), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def flux_pipeline(folder: Path, randomize: Any, guided: bool = False) -> Any:
    config, tokenizer = clip(folder)
    torch.manual_seed(3)
    encoder, words = t5()
    shape = FLUX | {"pooled_projection_dim": 8, "guidance_embeds": guided}
    return diffusers.FluxPipeline(
        transformer=randomize(diffusers.FluxTransformer2DModel(**shape)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(randomize), text_encoder=CLIPTextModel(config).eval(), tokenizer=tokenizer,
        text_encoder_2=encoder, tokenizer_2=words,
    )  # fmt: skip


def chroma_pipeline(folder: Path, randomize: Any) -> Any:
    encoder, tokenizer = t5()
    return diffusers.ChromaPipeline(
        transformer=randomize(diffusers.ChromaTransformer2DModel(**CHROMA)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(randomize), text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip


def pixart_pipeline(folder: Path, randomize: Any) -> Any:
    encoder, tokenizer = t5()
    return diffusers.PixArtSigmaPipeline(
        transformer=randomize(diffusers.PixArtTransformer2DModel(**CROSS, patch_size=2, out_channels=8)),
        scheduler=diffusers.DPMSolverMultistepScheduler(), vae=tiny_vae(randomize), text_encoder=encoder,
        tokenizer=tokenizer,
    )  # fmt: skip


def sana_pipeline(folder: Path, randomize: Any) -> Any:
    encoder, tokenizer = gemma()
    heads = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
    return diffusers.SanaPipeline(
        transformer=randomize(diffusers.SanaTransformer2DModel(**CROSS, **heads, patch_size=1, out_channels=4)),
        scheduler=diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        vae=None, text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip


def qwen(model: Any, layers: int) -> tuple[Any, Any]:
    """A Qwen 3 of width 4 and a tokenizer of two words with a template for chats."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ"]
    tokenizer = Qwen2Tokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[])
    tokenizer.chat_template = "{% for each in messages %}<|im_start|>{{ each['content'] }}<|im_end|>{% endfor %}"
    torch.manual_seed(8)
    shape = Qwen3Config(
        vocab_size=len(words), hidden_size=4, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=2, max_position_embeddings=512,
    )  # fmt: skip
    return model(shape).eval(), tokenizer


def flux2_pipeline(folder: Path, randomize: Any) -> Any:
    """Klein, which reads the outputs of three layers of its text encoder."""
    encoder, tokenizer = qwen(Qwen3ForCausalLM, 28)
    shape: dict[str, Any] = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 12, "axes_dims_rope": [2, 2, 2, 2], "guidance_embeds": False,
    }  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, layers_per_block=1, sample_size=16,
    )  # fmt: skip
    randomize(vae, seed=5)
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
    vae.bn.running_var.copy_(torch.linspace(0.2, 2, 16))
    return diffusers.Flux2KleinPipeline(
        transformer=randomize(diffusers.Flux2Transformer2DModel(**shape)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae,
        text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip


def qwen_image_pipeline(folder: Path, randomize: Any) -> Any:
    """Its tokenizer knows every character of the template that the pipeline puts around a prompt."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "Ċ", *(chr(each) for each in range(33, 127))]
    tokenizer = Qwen2Tokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[])
    torch.manual_seed(9)
    width = {"hidden_size": 12, "intermediate_size": 8}
    shape = Qwen2_5_VLConfig(
        text_config={
            **width, "vocab_size": len(words), "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0},
        },
        vision_config={**width, "depth": 1, "num_heads": 2, "out_hidden_size": 12},
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[-0.5, 0.2, 0.1, 0.4], latents_std=[1.5, 0.5, 2.0, 1.0],
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=[2, 2, 4],
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        transformer=randomize(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=randomize(vae, seed=5), text_encoder=Qwen2_5_VLForConditionalGeneration(shape).eval(), tokenizer=tokenizer,
    )  # fmt: skip


def lumina2_pipeline(folder: Path, randomize: Any) -> Any:
    encoder, tokenizer = gemma()
    shape: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "cap_feat_dim": 12,
        "num_refiner_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 8,
        "axes_dim_rope": [2, 2, 2], "axes_lens": [300, 64, 64],
    }  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=randomize(diffusers.Lumina2Transformer2DModel(**shape)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0), vae=tiny_vae(randomize),
        text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip


def z_image_pipeline(folder: Path, randomize: Any) -> Any:
    encoder, tokenizer = qwen(Qwen3Model, 3)
    shape: dict[str, Any] = {
        "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 4, "axes_dims": [4, 2, 2], "axes_lens": [1024, 64, 64],
    }  # fmt: skip
    return diffusers.ZImagePipeline(
        transformer=randomize(diffusers.ZImageTransformer2DModel(**shape)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(randomize),
        text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip


def prx_pipeline(folder: Path, randomize: Any) -> Any:
    """Its pipeline cleans prompts with ftfy, for which a module that changes nothing stands in where it is missing."""
    if importlib.util.find_spec("ftfy") is None:
        stand_in: Any = ModuleType("ftfy")
        stand_in.__spec__, stand_in.fix_text = ModuleSpec("ftfy", None), str
        sys.modules["ftfy"] = pipeline_prx.ftfy = stand_in  # type: ignore[attr-defined]
    encoder, tokenizer = t5_gemma()
    shape = {"context_in_dim": 12, "hidden_size": 16, "num_heads": 2, "depth": 2, "axes_dim": [4, 4]}
    return diffusers.PRXPipeline(
        transformer=randomize(diffusers.PRXTransformer2DModel(in_channels=4, patch_size=2, mlp_ratio=2.0, **shape)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(randomize),
        text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip


def auraflow_pipeline(folder: Path, randomize: Any) -> Any:
    encoder, tokenizer = t5(12, UMT5EncoderModel, UMT5Config)
    shape: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
        "pos_embed_max_size": 64,
    }  # fmt: skip
    return diffusers.AuraFlowPipeline(
        transformer=randomize(diffusers.AuraFlowTransformer2DModel(**shape)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73), vae=tiny_vae(randomize),
        text_encoder=encoder, tokenizer=tokenizer,
    )  # fmt: skip


def cogview_pipeline(folder: Path, randomize: Any) -> Any:
    torch.manual_seed(8)
    encoder = GlmModel(GlmConfig(**GEMMA, pad_token_id=0)).eval()
    shape: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "text_embed_dim": 12, "time_embed_dim": 10,
        "condition_dim": 4,
    }  # fmt: skip
    return diffusers.CogView4Pipeline(
        transformer=randomize(diffusers.CogView4Transformer2DModel(**shape)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75
        ),
        vae=tiny_vae(randomize), text_encoder=encoder, tokenizer=gemma()[1],
    )  # fmt: skip


def hunyuan_pipeline(folder: Path, randomize: Any) -> Any:
    encoder, tokenizer = bert(folder)
    encoder_2, tokenizer_2 = t5(16)
    shape: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8,
        "hidden_size": 16, "num_layers": 4, "mlp_ratio": 2.0, "cross_attention_dim": 8, "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 10,
    }  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        transformer=randomize(diffusers.HunyuanDiT2DModel(**shape)),
        scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
        vae=tiny_vae(randomize), text_encoder=encoder, tokenizer=tokenizer, text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


PIPELINES = {
    "SD3": sd3_pipeline,
    "FLUX": flux_pipeline,
    "Chroma": chroma_pipeline,
    "PixArt": pixart_pipeline,
    "Sana": sana_pipeline,
    "FLUX.2": flux2_pipeline,
    "Qwen-Image": qwen_image_pipeline,
    "Lumina-Image 2": lumina2_pipeline,
    "Z-Image": z_image_pipeline,
    "PRX": prx_pipeline,
    "AuraFlow": auraflow_pipeline,
    "HunyuanDiT": hunyuan_pipeline,
    "CogView4": cogview_pipeline,
}
"""`(folder for a vocabulary, randomize)` to a pipeline, by the name of a family."""
