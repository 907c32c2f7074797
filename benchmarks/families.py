"""What a text-to-image network weighs and costs as a backbone: whole, cut after the feature, with a fixed timestep.

    python -m benchmarks.families

Protocol: 512 x 512 pixels (1,024 image tokens), batch 1, the empty prompt without T5 (333 text tokens, of which 78 are
distinct). Parameters and FLOPs are counted on the published shapes, without weights. Times are of the same depth at a
quarter of the width and number of heads, random weights, float32, one thread, medians of 5 alternating rounds, relative
to the whole stock network with a hook. The VAE is not included.
Writes `benchmarks/results/families.json` and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from aselect_hf import ASelectDiffusionConfig, ASelectDiffusionModel
from aselect_hf.files import write_json
from aselect_hf.versions import hardware, installed_versions

RESULT = Path(__file__).parent / "results" / "families.json"
TEXT, DISTINCT, ROUNDS, TIMESTEP = 333, 78, 5, 141
SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": list(range(13)), "pos_embed_max_size": 384}
LARGE = {"qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
NETWORKS = {
    "SD3-medium": (SD3, "blocks.9.query"),
    "SD3.5-medium": (SD3 | MEDIUM, "blocks.9.query"),
    "SD3.5-large": (SD3 | LARGE, "blocks.14.query"),
}


def narrow(shape: dict[str, Any]) -> dict[str, Any]:
    """A quarter of the heads."""
    heads = shape["num_attention_heads"] // 4
    return shape | {"num_attention_heads": heads, "caption_projection_dim": heads * shape["attention_head_dim"]}


def build(shape: dict[str, Any], feature: str, cut: bool) -> ASelectDiffusionModel:
    config = ASelectDiffusionConfig(
        transformer_class="SD3Transformer2DModel",
        transformer_config=shape,
        image_size=64,
        conditioning={"prompt_embeds": [TEXT, shape["joint_attention_dim"]], "pooled_prompt_embeds": [2048]},
        feature=feature,
        timestep=TIMESTEP,
        kept_blocks=1 + int(feature.split(".")[1]) if cut else None,
    )
    return ASelectDiffusionModel(config).eval()


def fixed(model: ASelectDiffusionModel) -> ASelectDiffusionModel:
    """The folded model: on the meta device its shapes, else its weights."""
    if model.device.type != "meta":
        return model.fix_timestep()
    config = copy.deepcopy(model.config)
    config.fixed_timestep, config.merged_tokens = True, [1] * (DISTINCT - 1) + [TEXT - DISTINCT + 1]
    config.fixed_to = {
        "timestep": TIMESTEP, "features": [config.feature], "class_label": None, "noise_seed": config.noise_seed,
        "num_noise_draws": 1,
    }  # fmt: skip
    return ASelectDiffusionModel(config).eval()


def stock_call(model: ASelectDiffusionModel) -> Callable[[], Any]:
    """The whole network of diffusers on noisy latents."""
    latents = torch.zeros(1, 16, 64, 64, device=model.device)
    arguments = model.inputs(latents, torch.full((1,), TIMESTEP, device=model.device))
    return lambda: model.transformer(**arguments)


def our_call(model: ASelectDiffusionModel) -> Callable[[], Any]:
    latents = torch.zeros(1, 16, 64, 64, device=model.device)
    times = None if model.config.fixed_timestep else torch.full((1,), TIMESTEP, device=model.device)
    return lambda: model.run(latents, times, None, [str(model.config.feature)])


def contenders(shape: dict[str, Any], feature: str) -> dict[str, tuple[ASelectDiffusionModel, Callable[[], Any]]]:
    whole, cut = build(shape, feature, cut=False), build(shape, feature, cut=True)
    if cut.device.type != "meta":
        prompt = torch.zeros(TEXT, shape["joint_attention_dim"])
        prompt[: DISTINCT - 1] = torch.randn(DISTINCT - 1, shape["joint_attention_dim"])
        for model in (whole, cut):
            model.set_conditioning({"prompt_embeds": prompt, "pooled_prompt_embeds": torch.randn(2048)})
    found = {"diffusers, whole": (whole, stock_call(whole)), "ours, cut": (cut, our_call(cut))}
    plain = fixed(cut)
    return found | {"ours, fixed timestep": (plain, our_call(plain))}


@torch.no_grad()
def count(shape: dict[str, Any], feature: str) -> dict[str, dict[str, float]]:
    rows = {}
    with torch.device("meta"):
        for name, (model, call) in contenders(shape, feature).items():
            counter = FlopCounterMode(display=False)
            with counter:
                call()
            positions = sum(x.numel() for key, x in model.named_buffers() if key.endswith("pos_embed"))
            parameters = sum(p.numel() for p in model.parameters()) + positions
            rows[name] = {"parameters": parameters, "flops": counter.get_total_flops()}
    return rows


@torch.no_grad()
def measure(shape: dict[str, Any], feature: str) -> dict[str, float]:
    """Speed over the whole stock network."""
    runs = {name: call for name, (_, call) in contenders(narrow(shape), feature).items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    return {name: medians["diffusers, whole"] / each for name, each in medians.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for network, (shape, feature) in NETWORKS.items():
        counted, speed = count(shape, feature), measure(shape, feature)
        for name, row in counted.items():
            rows.append({"network": network, "feature": feature, "model": name, "speed": speed[name]} | row)
    protocol = (__doc__ or "").split("Protocol: ")[1].split("\nWrites")[0].replace("\n", " ")
    write_json(
        RESULT,
        {
            "rows": rows,
            "protocol": protocol,
            "hardware": hardware(torch.device("cpu")),
            "versions": installed_versions(),
        },
    )
    print("| network, feature | model | parameters | bfloat16 | TFLOPs | speed, narrow |\n" + "|---" * 6 + "|")
    for row in rows:
        print(
            f"| {row['network']}, `{row['feature']}` | {row['model']} | {row['parameters'] / 1e6:,.0f} M "
            f"| {2 * row['parameters'] / 1e9:.2f} GB | {row['flops'] / 1e12:.2f} | {row['speed']:.1f}x |"
        )


if __name__ == "__main__":
    main()
