"""What a text-to-image network weighs and costs as a backbone: whole, cut after the feature, with a fixed timestep.

    python -m benchmarks.families

Protocol: 1,024 image tokens (512 x 512 pixels; 1024 x 1024 for Sana), batch 1, without the VAE. The prompt is the
empty one: for SD3 without T5, 333 text tokens of which 78 are distinct; for PixArt and Sana, 300 tokens of which the
mask keeps one. Parameters (with the positions) and FLOPs are counted on the published shapes, without weights. Times
are CPU seconds of networks of the same depth at a quarter of the width and number of heads, random weights, float32,
one thread, medians of 3 alternating rounds, relative to the whole network of diffusers, which is what a feature read
by a hook costs.
Writes `benchmarks/results/families.json` and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from aselect_hf import ASelectDiffusionConfig, ASelectDiffusionModel
from aselect_hf.files import write_json
from aselect_hf.versions import hardware, installed_versions

RESULT = Path(__file__).parent / "results" / "families.json"
ROUNDS, TIMESTEP = 3, 141
SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": list(range(13)), "pos_embed_max_size": 384}
LARGE = {"qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
PIXART = {
    "sample_size": 64, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 28, "attention_head_dim": 72,
    "num_attention_heads": 16, "cross_attention_dim": 1152, "caption_channels": 4096,
}  # fmt: skip
SANA = {
    "sample_size": 32, "patch_size": 1, "in_channels": 32, "out_channels": 32, "num_layers": 20,
    "attention_head_dim": 32, "num_attention_heads": 70, "cross_attention_dim": 2240, "caption_channels": 2304,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112,
}  # fmt: skip


class Network(NamedTuple):
    """A published shape, the feature that is read, the side of its latents, and its prompt.

    Args:
        text: number of text tokens.
        distinct: how many of them differ, of those that a mask keeps.
    """

    transformer_class: str
    shape: dict[str, Any]
    feature: str
    side: int
    text: int
    distinct: int

    @property
    def conditioning(self) -> dict[str, list[int]]:
        if self.transformer_class == "SD3Transformer2DModel":
            return {"prompt_embeds": [self.text, 4096], "pooled_prompt_embeds": [2048]}
        return {"prompt_embeds": [self.text, self.shape["caption_channels"]], "prompt_attention_mask": [self.text]}

    def prompt(self) -> dict[str, torch.Tensor]:
        """A random prompt with that many distinct tokens."""
        found = {name: torch.randn(shape) for name, shape in self.conditioning.items()}
        found["prompt_embeds"][self.distinct :] = found["prompt_embeds"][self.distinct - 1]
        if "prompt_attention_mask" in found:
            found["prompt_attention_mask"] = (torch.arange(self.text) < self.distinct).float()
        return found

    def narrow(self) -> Network:
        """With a quarter of the heads."""
        heads = self.shape["num_attention_heads"] // 4
        width = heads * self.shape["attention_head_dim"]
        changed = {"num_attention_heads": heads}
        changed |= {name: width for name in ("caption_projection_dim", "cross_attention_dim") if name in self.shape}
        if "num_cross_attention_heads" in self.shape:
            changed["num_cross_attention_heads"] = self.shape["num_cross_attention_heads"] // 4
        return self._replace(shape=self.shape | changed)


NETWORKS = {
    "SD3-medium": Network("SD3Transformer2DModel", SD3, "blocks.9.query", 64, 333, 78),
    "SD3.5-medium": Network("SD3Transformer2DModel", SD3 | MEDIUM, "blocks.9.query", 64, 333, 78),
    "SD3.5-large": Network("SD3Transformer2DModel", SD3 | LARGE, "blocks.14.query", 64, 333, 78),
    "PixArt-Sigma": Network("PixArtTransformer2DModel", PIXART, "blocks.11.query", 64, 300, 1),
    "Sana-1.6B": Network("SanaTransformer2DModel", SANA, "blocks.8.query", 32, 300, 1),
}


def build(network: Network, cut: bool) -> ASelectDiffusionModel:
    config = ASelectDiffusionConfig(
        transformer_class=network.transformer_class,
        transformer_config=network.shape,
        image_size=network.side,
        conditioning=network.conditioning,
        feature=network.feature,
        timestep=TIMESTEP,
        kept_blocks=1 + int(network.feature.split(".")[1]) if cut else None,
    )
    model = ASelectDiffusionModel(config).eval()
    if model.device.type != "meta":
        model.set_conditioning(network.prompt())
    return model


def fixed(model: ASelectDiffusionModel, network: Network) -> ASelectDiffusionModel:
    """The folded model: on the meta device its shapes, else its weights."""
    if model.device.type != "meta":
        return model.fix_timestep()
    config = copy.deepcopy(model.config)
    others = network.text - network.distinct if network.transformer_class == "SD3Transformer2DModel" else 0
    config.fixed_timestep, config.merged_tokens = True, [1] * (network.distinct - 1) + [1 + others]
    config.fixed_to = {
        "timestep": TIMESTEP, "features": [config.feature], "class_label": None, "noise_seed": config.noise_seed,
        "num_noise_draws": 1,
    }  # fmt: skip
    return ASelectDiffusionModel(config).eval()


def clean(model: ASelectDiffusionModel) -> torch.Tensor:
    """Latents of one image."""
    side = model.config.sample_size
    return torch.zeros(1, model.config.num_channels, side, side, device=model.device)


def stock_call(model: ASelectDiffusionModel) -> Callable[[], Any]:
    """The whole network of diffusers on noisy latents."""
    arguments = model.inputs(clean(model), torch.full((1,), TIMESTEP, device=model.device))
    return lambda: model.transformer(**arguments)


def our_call(model: ASelectDiffusionModel) -> Callable[[], Any]:
    latents = clean(model)
    times = None if model.config.fixed_timestep else torch.full((1,), TIMESTEP, device=model.device)
    return lambda: model.run(latents, times, None, [str(model.config.feature)])


def contenders(network: Network) -> dict[str, tuple[ASelectDiffusionModel, Callable[[], Any]]]:
    whole, cut = build(network, cut=False), build(network, cut=True)
    plain = fixed(cut, network)
    return {
        "diffusers, whole": (whole, stock_call(whole)),
        "ours, cut": (cut, our_call(cut)),
        "ours, fixed timestep": (plain, our_call(plain)),
    }


@torch.no_grad()
def count(network: Network) -> dict[str, dict[str, float]]:
    rows = {}
    with torch.device("meta"):
        for name, (model, call) in contenders(network).items():
            counter = FlopCounterMode(display=False)
            with counter:
                call()
            positions = sum(x.numel() for key, x in model.named_buffers() if key.endswith("pos_embed"))
            parameters = sum(p.numel() for p in model.parameters()) + positions
            rows[name] = {"parameters": parameters, "bytes": 2 * parameters, "flops": counter.get_total_flops()}
    return rows


@torch.no_grad()
def measure(network: Network) -> dict[str, float]:
    """Speed over the whole stock network, by CPU time, which other programs on the machine disturb less."""
    runs = {name: call for name, (_, call) in contenders(network.narrow()).items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    return {name: medians["diffusers, whole"] / each for name, each in medians.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for title, network in NETWORKS.items():
        counted, speed = count(network), measure(network)
        for name, row in counted.items():
            rows.append({"network": title, "feature": network.feature, "model": name, "speed": speed[name]} | row)
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
            f"| {row['bytes'] / 1e9:.2f} GB | {row['flops'] / 1e12:.2f} | {row['speed']:.1f}x |"
        )


if __name__ == "__main__":
    main()
