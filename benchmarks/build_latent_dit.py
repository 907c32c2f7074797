"""Build an untrained latent-space DiT for small color images: trains its `AutoencoderKL`, ready for pretraining.

    python -m benchmarks.build_latent_dit data/cifar10 data/cifar10-latent-init      # see build_cifar10
    accelerate launch -m aselect_hf.training.pretrain --model_name_or_path data/cifar10-latent-init ...

The autoencoder (latents of 16 x 16 x 4, L1 reconstruction and KL) trains on the training images; its latents are then
scaled to a standard deviation of 1. The DiT is class-conditional and predicts v (Salimans & Ho 2022).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL
from torch.nn import functional as F
from tqdm.auto import tqdm

from aselect_hf import ASelectDiTConfig, ASelectDiTModel
from aselect_hf.conversion import save_model, set_vae

KL = {"latent_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
DIT = {
    "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 2, "sample_size": 16,
    "num_channels": 4, "num_condition_classes": 10, "learned_sigma": False,
    "noise_schedule": {"type": "ddpm", "prediction_type": "v_prediction"},
}  # fmt: skip


def train_autoencoder(pixels: torch.Tensor, steps: int, batch_size: int = 32) -> AutoencoderKL:
    """Train on pixels `(images, 3, 32, 32)` in [-1, 1] with AdamW and a linear decay, in float32."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=1.0, **KL
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    progress = tqdm(range(steps), desc="AutoencoderKL", unit="step")
    for _ in progress:
        batch = pixels[torch.randint(len(pixels), (batch_size,))]
        posterior = vae.encode(batch).latent_dist
        loss = F.l1_loss(vae.decode(posterior.sample()).sample, batch) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        means = vae.encode(pixels[:2000]).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / means.std().item())
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CIFAR-10 as a folder of parquet files")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="steps of the autoencoder (default: 400)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images = load_dataset(args.data, split="train").with_format("numpy")["image"][:]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    vae = train_autoencoder(pixels, args.steps)
    model = ASelectDiTModel(ASelectDiTConfig(**DIT))
    set_vae(model, vae, decoder=False)
    save_model(model, args.output_dir)
    print(f"saved {model.num_parameters():,} parameters to {args.output_dir}")


if __name__ == "__main__":
    main()
