"""Effect of an `AutoencoderTiny`, in place of the `AutoencoderKL`, on features and on probes of them.

    python -m benchmarks.tiny_autoencoder data/cifar10        # see build_cifar10

The published pair (the SD-VAE, and TAESD, which was distilled from it) needs a download. This benchmark trains a small
pair from scratch instead, on 32 x 32 images: an `AutoencoderKL` of 16 x 16 x 4 latents (L1 + KL), an encoder of
`AutoencoderTiny`'s architecture distilled from its posterior means, and a DiT on the latents. It then compares the
DiT's features with either encoder, image by image: cosine similarity of tokens, and validation accuracy of a linear
probe trained on features of the same encoder or of the KL encoder. The KL encoder in bfloat16 is the third encoder.

Protocol: all three networks train on the first 40,000 training images (400 steps of 32 for the autoencoders, 1,000 of
64 for the DiT); probes train on 2,000 of the other images and are validated on 1,000 more; seed 0.
Writes `benchmarks/results/tiny-autoencoder.json` and prints the table.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL, AutoencoderTiny
from torch.nn import functional as F
from tqdm.auto import tqdm

from aselect_hf import ASelectDiTConfig, ASelectDiTModel
from aselect_hf.conversion import set_vae
from aselect_hf.files import write_json
from aselect_hf.selection.probe import fit_probe
from aselect_hf.versions import hardware, installed_versions

RESULT = Path(__file__).parent / "results" / "tiny-autoencoder.json"
TRAIN, PROBE, VALIDATION = 40_000, 2_000, 1_000
TIMESTEPS = (0, 50, 200)
FEATURE = "blocks.3.mlp"
KL = {"latent_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
DIT = {
    "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "patch_size": 2, "sample_size": 16,
    "num_channels": 4, "num_condition_classes": 0, "learned_sigma": False, "feature": FEATURE,
}  # fmt: skip


def train(
    name: str, parameters: Iterator[torch.nn.Parameter], loss_of: Callable[[torch.Tensor], torch.Tensor], steps: int,
    batch_size: int, count: int = TRAIN,
) -> float:  # fmt: skip
    """Train with AdamW in bfloat16 with linear decay; return the mean loss of the last hundred steps."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    losses = []
    for _ in tqdm(range(steps), desc=name, unit="step"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(torch.randint(count, (batch_size,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return float(np.mean(losses[-100:]))


def build_autoencoders(pixels: torch.Tensor, steps: int) -> tuple[AutoencoderKL, AutoencoderTiny, dict[str, float]]:
    """Train the pair; the KL encoder's latents are scaled to a standard deviation of 1."""
    kl = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=1.0, **KL
    )

    def reconstruction(rows: torch.Tensor) -> torch.Tensor:
        posterior = kl.encode(pixels[rows]).latent_dist
        return F.l1_loss(kl.decode(posterior.sample()).sample, pixels[rows]) + 1e-6 * posterior.kl().mean()

    losses = {"reconstruction": train("AutoencoderKL", kl.parameters(), reconstruction, steps, 32)}
    kl.eval().requires_grad_(False)
    means = encode(lambda batch: kl.encode(batch).latent_dist.mean, pixels)
    kl.register_to_config(scaling_factor=1 / means.std().item())
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(32, 32), decoder_block_out_channels=(32, 32), num_encoder_blocks=(1, 3),
        num_decoder_blocks=(3, 1), scaling_factor=1.0,
    )  # fmt: skip
    target = means * kl.config.scaling_factor
    losses["distillation"] = train(
        "AutoencoderTiny",
        tiny.encoder.parameters(),
        lambda rows: F.mse_loss(tiny.encode(pixels[rows]).latents.float(), target[rows]),
        steps,
        32,
    )
    return kl, tiny.eval(), losses


@torch.no_grad()
def encode(encoder: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([encoder(batch).float() for batch in tqdm(pixels.split(250), desc="latents", unit="batch")])


def build_dit(latents: torch.Tensor, steps: int) -> tuple[ASelectDiTModel, float]:
    model = ASelectDiTModel(ASelectDiTConfig(**DIT)).train()
    schedule = model.noise_schedule

    def denoising(rows: torch.Tensor) -> torch.Tensor:
        timesteps, noise = torch.randint(1000, (len(rows),)), torch.randn(len(rows), *latents.shape[1:])
        prediction = model.denoise(schedule.add_noise(latents[rows], noise, timesteps), timesteps)
        return F.mse_loss(prediction.float(), noise)

    loss = train("DiT", model.parameters(), denoising, steps, 64)
    return model.eval(), loss


@torch.no_grad()
def features_of(model: ASelectDiTModel, pixels: torch.Tensor) -> torch.Tensor:
    """Features `(images, timesteps, tokens, width)`, float16."""
    batches = tqdm(pixels.split(100), desc="features", unit="batch")
    found = [model.extract_features(batch, timesteps=TIMESTEPS)[FEATURE].float().half() for batch in batches]
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CIFAR-10 as a folder of parquet files")
    parser.add_argument("--autoencoder_steps", type=int, default=400)
    parser.add_argument("--dit_steps", type=int, default=1000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    data = load_dataset(arguments.data, split="train").with_format("numpy")
    pixels = torch.from_numpy(np.stack(data["image"][:])).permute(0, 3, 1, 2) / 127.5 - 1
    labels = np.asarray(data["label"][:])
    rest = torch.from_numpy(np.random.default_rng(0).permutation(np.arange(TRAIN, len(pixels))))
    probe, validation = rest[:PROBE], rest[PROBE : PROBE + VALIDATION]

    kl, tiny, losses = build_autoencoders(pixels[:TRAIN], arguments.autoencoder_steps)
    latents = encode(lambda batch: kl.encode(batch).latent_dist.mean * kl.config.scaling_factor, pixels[:TRAIN])
    model, losses["denoising"] = build_dit(latents, arguments.dit_steps)
    models = {name: copy.deepcopy(model) for name in ("KL", "KL, bfloat16", "tiny")}
    for name, autoencoder in (("KL", kl), ("KL, bfloat16", copy.deepcopy(kl)), ("tiny", tiny)):
        set_vae(models[name], autoencoder, decoder=False)
    models["KL, bfloat16"].vae.to(torch.bfloat16)
    chosen = pixels[torch.cat([probe, validation])]
    features = {name: features_of(each, chosen) for name, each in models.items()}
    rows = [
        {"encoder": name, "timestep": timestep}
        | compare(features["KL"][:, index], features[name][:, index], labels[rest])
        for name in features
        for index, timestep in enumerate(TIMESTEPS)
    ]
    content = {
        "feature": FEATURE,
        "rows": rows,
        "losses": losses,
        "parameters": {name: sum(p.numel() for p in each.vae.parameters()) for name, each in models.items()},
        "steps": {"autoencoders": arguments.autoencoder_steps, "DiT": arguments.dit_steps},
        "protocol": (__doc__ or "").split("Protocol: ")[1].split("Writes")[0].replace("\n", " "),
        "hardware": hardware(torch.device("cpu")),
        "versions": installed_versions(),
    }
    write_json(RESULT, content)
    print("| encoder | t | cosine similarity | probe, same encoder | probe of KL features |\n" + "|---" * 5 + "|")
    for row in rows:
        print(
            f"| {row['encoder']} | {row['timestep']} | {row['cosine']:.4f} | {100 * row['probe']:.1f} % "
            f"| {100 * row['transferred_probe']:.1f} % |"
        )


def compare(reference: torch.Tensor, other: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    """Compare `other` features `(images, tokens, width)` with those of the KL encoder."""
    cosine = F.cosine_similarity(reference.float(), other.float(), dim=-1).mean().item()
    pooled = {name: each.float().mean(dim=1).numpy() for name, each in (("reference", reference), ("other", other))}
    train_labels, truth = labels[:PROBE], labels[PROBE : PROBE + VALIDATION]

    def accuracy(train_on: str) -> float:
        return fit_probe(
            pooled[train_on][:PROBE], train_labels, pooled["other"][PROBE:], truth, kind="linear"
        ).validation_score

    return {"cosine": cosine, "probe": accuracy("other"), "transferred_probe": accuracy("reference")}


if __name__ == "__main__":
    main()
