"""`aselect convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from aselect_cli import options as opt
from aselect_cli.command import Answer

Text = str | None


def convert(
    source: Annotated[
        str, typer.Argument(help="Checkpoint: a diffusers folder, a Hub id, a DiT or SiT file, or an aselect model.")
    ],
    output_dir: Annotated[Path, typer.Argument(help="Folder to write; it must not exist or be empty.")],
    *,
    to: Annotated[Literal["aselect", "diffusers"], typer.Option(help="Format to write.")] = "aselect",
    source_format: Annotated[
        Literal["auto", "aselect", "diffusers", "dit", "sit"], typer.Option(help="Format to read.")
    ] = "auto",
    vae: Annotated[Text, typer.Option(help="VAE to use: a folder or Hub id (default: the source's own).")] = None,
    vae_decoder: Annotated[bool, typer.Option(help="Keep the VAE's decoder.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt and .bin files; nothing but weights is loaded from them.")
    ] = False,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="Heads of a .pt model (default: those of the published model of that width).")
    ] = None,
    num_condition_classes: Annotated[
        int | None, typer.Option(help="Classes that a .pt model was trained on, without the null class.")
    ] = None,
    model_time: Annotated[
        Text,
        typer.Option(
            help="Meaning of the time that the network of a SiT file takes: data_fraction (SiT) or noise_fraction "
            "(REPA, SRA). Required if the file does not say."
        ),
    ] = None,
    variant: Annotated[Text, typer.Option(help="Variant of the weight files, such as fp16.")] = None,
    subfolder: Annotated[Text, typer.Option(help="Folder of the checkpoint inside SOURCE.")] = None,
    revision: Annotated[Text, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    dtype: Annotated[Text, typer.Option(help="Precision to write (default: the precision of the weights).")] = None,
    fix_timestep: Annotated[
        bool, typer.Option("--fix-timestep", help="Fold the timestep into the weights: a plain, smaller ViT.")
    ] = False,
    timestep: Annotated[int | None, typer.Option(help="Timestep to write (default: the model's own).")] = None,
    feature: opt.Feature = None,
    prompt: Annotated[Text, typer.Option(help="Text to condition a text-to-image network on (default: none).")] = None,
    prompt_embeds: Annotated[
        Text, typer.Option(help="Safetensors file with an encoded prompt, so that no text encoder is loaded.")
    ] = None,
    skip_text_encoder: Annotated[
        list[str] | None, typer.Option(help="Text encoder to leave out, such as text_encoder_3; repeat for several.")
    ] = None,
    keep: Annotated[
        Literal["feature", "all"] | None,
        typer.Option(help="Blocks of a text-to-image network to keep: up to that of the feature (default), or all."),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of a network that takes one as an input (default: 1).")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the images in pixels (default: the network's).")
    ] = None,
    base_model: Annotated[Text, typer.Option(help="Hub id of the model that the weights come from.")] = None,
    base_model_license: Annotated[Text, typer.Option(help="License of that model.")] = None,
) -> Answer:
    """Convert a checkpoint from or to diffusers, from an original DiT or SiT file, or to a fixed timestep."""
    from aselect_hf.conversion import convert_checkpoint

    asked = {
        "timestep": timestep,
        "feature": feature,
        "num_attention_heads": num_attention_heads,
        "num_condition_classes": num_condition_classes,
        "variant": variant,
        "subfolder": subfolder,
        "revision": revision,
        "dtype": dtype,
        "image_size": image_size,
        "base_model": base_model,
        "base_model_license": base_model_license,
    }
    keywords: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    said = {
        "prompt": prompt,
        "prompt_embeds": prompt_embeds,
        "skip_text_encoders": skip_text_encoder,
        "keep": keep,
        "guidance": guidance,
    }
    model = convert_checkpoint(
        source,
        output_dir,
        to=to,
        source_format=source_format,
        vae=vae,
        vae_decoder=vae_decoder,
        allow_pickle=allow_pickle,
        fix_timestep=fix_timestep,
        model_time=model_time,
        text={name: value for name, value in said.items() if value not in (None, "", [])},
        **keywords,
    )
    parameters = model.num_parameters()
    text = f"wrote {output_dir}: {parameters / 1e6:.1f} M parameters as {to}"
    return Answer(text, {"format": to, "parameters": parameters, "written": [str(output_dir)]})
