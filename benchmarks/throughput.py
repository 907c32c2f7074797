"""Images per second of the published shapes, with random weights: ours, diffusers' DiT and a plain ViT.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --sizes XL/2 --batch_sizes 8 --dtypes float32 --no-pixels --device cpu

Images have 256 x 256 pixels, or 32 x 32 x 4 latents of Stable Diffusion's VAE. For the protocol, see
`aselect_hf/speed/__init__.py`. `aselect benchmark MODEL` gives the same numbers for your own model. The command writes
`benchmarks/results/throughput-<device>.json` and `.md` after every size and dtype, and prints the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from aselect_hf import ASelectDiTConfig, ASelectDiTModel
from aselect_hf.speed import BATCH_SIZES, MAX_ROUNDS, MAX_SECONDS, Benchmark, benchmark_model, describe_protocol

RESULTS = Path(__file__).parent / "results"
SD_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}


@torch.no_grad()
def random_model(config: ASelectDiTConfig, seed: int = 0) -> ASelectDiTModel:
    """A DiT without zero weights; a fresh one (adaLN-Zero) is the identity, which would hide a wrong feature."""
    torch.manual_seed(seed)
    model = ASelectDiTModel(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bias.normal_(std=0.2)
            if not module.weight.any():
                module.weight.normal_(std=module.in_features**-0.5)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S/2", "B/2", "XL/2"], help="presets, without the prefix 'DiT-'")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=BATCH_SIZES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="float16 is accepted too")
    parser.add_argument("--pixels", action=argparse.BooleanOptionalAction, default=True, help="also start from pixels")
    parser.add_argument("--rounds", type=int, default=MAX_ROUNDS, help="maximum per batch size")
    parser.add_argument("--max_seconds", type=float, default=MAX_SECONDS, help="for all contenders per batch size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="(default: benchmarks/results/throughput-<device>.json)")
    arguments = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()  # diffusers warns about every cast
    device = torch.device(arguments.device)
    output = arguments.output or RESULTS / f"throughput-{device.type}.json"
    whole = Benchmark([], [], describe_protocol(device, arguments.rounds, arguments.max_seconds))
    for size in arguments.sizes:
        config = ASelectDiTConfig.from_preset(f"DiT-{size}", vae_config=SD_VAE, timestep=100, timestep_freq_shift=1)
        for dtype in arguments.dtypes:
            result = benchmark_model(
                random_model(config).to(device, getattr(torch, dtype)),
                name=f"DiT-{size}",
                batch_sizes=arguments.batch_sizes,
                pixels=arguments.pixels,
                rounds=arguments.rounds,
                max_seconds=arguments.max_seconds,
            )
            whole.rows += result.rows
            whole.skipped += result.skipped
            whole.save(output)
    print(whole.markdown())
    print(f"wrote {output} and {output.with_suffix('.md')}")


if __name__ == "__main__":
    main()
