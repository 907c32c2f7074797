"""Build an untrained MM-DiT of SD3's class for small color images, ready for pretraining through the wrapper.

    python -m benchmarks.build_mmdit data/cifar10-mmdit-init
    accelerate launch -m aselect_hf.training.pretrain --model_name_or_path data/cifar10-mmdit-init ...

It works on pixels (32 x 32, patches of 4), without a VAE, and its prompt is empty: one text token and a pooled text
vector, both zero, whose place the biases of their projections take. The network's gates and output start at zero, as
in DiT (Peebles & Xie 2023, section 3.2) and in SD3 (Esser et al. 2024); diffusers leaves this to its training scripts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from aselect_hf import ASelectDiffusionConfig, ASelectDiffusionModel
from aselect_hf.conversion import save_model

TEXT_WIDTH = 32
TRANSFORMER = {
    "sample_size": 32, "patch_size": 4, "in_channels": 3, "out_channels": 3, "num_layers": 6,
    "num_attention_heads": 4, "attention_head_dim": 32, "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 128, "pooled_projection_dim": TEXT_WIDTH, "pos_embed_max_size": 8,
}  # fmt: skip
PROMPT = {"prompt_embeds": (1, TEXT_WIDTH), "pooled_prompt_embeds": (TEXT_WIDTH,)}


def build(seed: int = 0) -> ASelectDiffusionModel:
    """An untrained model (3.5 M parameters) with its empty prompt."""
    torch.manual_seed(seed)
    config = ASelectDiffusionConfig(
        transformer_class="SD3Transformer2DModel",
        transformer_config=TRANSFORMER,
        conditioning={name: list(shape) for name, shape in PROMPT.items()},
    )
    model = ASelectDiffusionModel(config)
    model.set_conditioning({name: torch.zeros(shape) for name, shape in PROMPT.items()})
    for name, module in model.transformer.named_modules():
        if isinstance(module, nn.Linear) and (name == "proj_out" or ".norm1" in name or name.startswith("norm_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = build(args.seed)
    save_model(model, args.output_dir)
    print(f"saved {model.num_parameters():,} parameters to {args.output_dir}")


if __name__ == "__main__":
    main()
