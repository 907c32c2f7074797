"""How much memory does a conversion take?

    python -m benchmarks.conversion_memory

Protocol. A transformer of Stable Diffusion 3's class with random weights is written in bfloat16, in shards of 20 MB: 24
blocks of width 384, with the position table of Stable Diffusion 3 (192 x 192). Every way to read it runs in a fresh
process, after one conversion of a tiny network. Memory is the peak resident size of the process, as the operating
system counts it, minus its size before. It includes pages of the files that are mapped. Writes
`benchmarks/results/conversion-memory.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MB = 1e6
SHAPE: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 6, "joint_attention_dim": 4096, "caption_projection_dim": 384,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
TINY = SHAPE | {"num_layers": 2, "attention_head_dim": 8, "caption_projection_dim": 48, "pos_embed_max_size": 32}
WAYS: dict[str, dict[str, Any]] = {
    "all blocks, all positions": {"keep": "all", "image_size": 64},
    "blocks 0 to 9, all positions": {},
    "blocks 0 to 9, positions of 64 x 64 latents": {"image_size": 64},
}
"""Name of a way to read the checkpoint, and the arguments of `from_diffusers`."""


def write(shape: dict[str, Any], folder: Path) -> None:
    import torch
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    SD3Transformer2DModel(**shape).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20MB")


def convert(folder: Path, **arguments: Any) -> Any:
    import torch

    import aselect_hf

    prompt = {"prompt_embeds": torch.zeros(154, 4096), "pooled_prompt_embeds": torch.zeros(2048)}
    return aselect_hf.from_diffusers(folder, prompt_embeds=prompt, **arguments)


def memory(field: str) -> int:
    """Bytes of this process in memory: `VmRSS` now, `VmHWM` at the peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let the peak start at the present size (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(folder: Path, tiny: Path, way: str) -> dict[str, float]:
    """Read the checkpoint in this process: bytes of the model, and of the peak over what was there before."""
    convert(tiny, image_size=64)
    forget_peak()
    before = memory("VmRSS")
    model = convert(folder, feature="blocks.9.query", **WAYS[way])
    peak = memory("VmHWM")
    tensors = (*model.parameters(), *model.buffers())
    return {"model": sum(x.numel() * x.element_size() for x in tensors), "peak": peak - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "TINY", "WAY"), help=argparse.SUPPRESS)
    if given := parser.parse_args().measure:
        print(json.dumps(measure(Path(given[0]), Path(given[1]), given[2])))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, tiny = Path(name) / "sd3", Path(name) / "tiny"
        write(SHAPE, folder)
        write(TINY, tiny)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"checkpoint: {size / MB:.0f} MB in {len(list(folder.glob('*.safetensors')))} files")
        found = {"checkpoint": size, "ways": {way: in_own_process(folder, tiny, way) for way in WAYS}}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "conversion-memory.json").write_text(json.dumps(found, indent=1) + "\n")


def in_own_process(folder: Path, tiny: Path, way: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.conversion_memory", "--measure", str(folder), str(tiny), way]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{way}: model {found['model'] / MB:.0f} MB, peak {found['peak'] / MB:.0f} MB")
    return found


if __name__ == "__main__":
    main()
