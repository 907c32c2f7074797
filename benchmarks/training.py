"""What the training loop costs, and what images that are encoded once save.

    OMP_NUM_THREADS=1 python -m benchmarks.training
    OMP_NUM_THREADS=1 python -m benchmarks.training --parts loop tasks --repeats 9
    python -m benchmarks.training --tiny --output /tmp/training.json      # seconds; its figures mean nothing

Three parts, each with arms that take turns for a few steps, `--repeats` times:

- `loop`: the sample model's network denoises the sample, with a weight average. A bare PyTorch loop on pixels in memory
  (`torch.optim.swa_utils` averages), our loop on images encoded once, and our loop on images.
- `latents`: DiT-B/2 behind an encoder of Stable Diffusion's shape, random weights, on images against cached latents.
- `tasks`: the sample model with a classification head: a bare loop, transformers' `Trainer`, and our loop; with a
  frozen backbone (ours trains on features computed once) and whole. No denoising loss, one head, no weight average.

A step is the CPU time of the process between two forward passes, so it includes batches, optimizer and average. CPU
time is disturbed less by other programs than the clock. The first step of every turn is not counted. Ratios are of
medians within a repetition; the file has their median, least and greatest. Writes
`benchmarks/results/training-cpu.json` and prints the tables.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from aselect_hf import ASelectDiTConfig, ASelectDiTForImageClassification, ASelectDiTModel
from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.files import write_json
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.tasks import CLASSIFICATION
from aselect_hf.training.arguments import DataArguments, PretrainingArguments
from aselect_hf.training.frozen_features import keep_features
from aselect_hf.training.latents import encode_once
from aselect_hf.training.loop import Trainer
from aselect_hf.training.objective import HeadSetting, TaskObjective
from aselect_hf.training.pretrain import DenoisingObjective, training_set
from aselect_hf.training.task_dataset import TaskDataset
from aselect_hf.versions import hardware, installed_versions

RESULT = Path(__file__).parent / "results" / "training-cpu.json"
PARTS = ("loop", "latents", "tasks")
RATE, EMA = 1e-4, 0.999
NETWORK = {
    "hidden_size": 144, "num_hidden_layers": 7, "num_attention_heads": 6, "patch_size": 4, "sample_size": 28,
    "num_channels": 1, "num_condition_classes": 0, "learned_sigma": False,
}  # fmt: skip
SD_VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4, "norm_num_groups": 32, "sample_size": 256,
}  # fmt: skip
TINY_VAE = SD_VAE | {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Sizes:
    """How much is measured: images, images per step, steps per turn without the first, side of the latents' images."""

    images: int
    batch: int
    steps: int
    encoded: int
    latent_batch: int
    side: int


FULL = Sizes(images=256, batch=32, steps=3, encoded=4, latent_batch=2, side=64)
SMALL = Sizes(images=8, batch=4, steps=1, encoded=4, latent_batch=2, side=16)

Turn = Callable[[], list[float]]
"""Trains for a few steps and returns the CPU seconds of each but the first."""


@dataclass(frozen=True)
class Bench:
    """What all arms share."""

    sizes: Sizes
    tiny: bool
    folder: Path

    def data_args(self, cached: bool) -> DataArguments:
        return DataArguments(cache_latents=cached, cache_dir=str(self.folder / "cache"))

    def args(self, batch: int, steps: int, ema: float) -> PretrainingArguments:
        return PretrainingArguments(
            output_dir=str(self.folder / "run"), per_device_train_batch_size=batch, max_train_steps=steps + 2,
            learning_rate=RATE, ema_decay=ema, lr_scheduler_type="constant", mixed_precision="no",
        )  # fmt: skip


def step_times(module: nn.Module, train: Callable[[], Any]) -> list[float]:
    """CPU seconds between the forward passes of `module` during `train`, without the first."""
    marks: list[float] = []
    hook = module.register_forward_pre_hook(lambda *_: marks.append(time.process_time()))
    train()
    hook.remove()
    return [end - start for start, end in pairwise(marks[1:])]


def our_turn(
    bench: Bench, objective: nn.Module, dataset: Any, collate: Any, batch: int, steps: int, ema: float
) -> Turn:
    def turn() -> list[float]:
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = Trainer(objective, dataset, collate, bench.args(batch, steps, ema))
        return step_times(objective, trainer.train)

    return turn


def bare_turn(
    module: nn.Module, loss_of: Callable[..., torch.Tensor], data: Any, batch: int, steps: int, ema: float
) -> Turn:
    """A loop as in a tutorial: `loss_of(*batch)`, gradients clipped, AdamW and, if asked for, an averaged copy."""

    def batches() -> Iterator[Any]:
        while True:
            yield from DataLoader(data, batch_size=batch, shuffle=True, drop_last=True)

    def train() -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
        module.train()
        for _, inputs in zip(range(steps + 2), batches(), strict=False):
            loss_of(*inputs).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update_parameters(module)

    return lambda: step_times(module, train)


class BareDenoiser(nn.Module):
    """The loss of pretraining with noise, timesteps and flips from torch's own generator."""

    def __init__(self, model: NoisyBackbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        flip = torch.rand(len(pixels), 1, 1, 1) < 0.5
        pixels = torch.where(flip, pixels.flip(-1), pixels)
        schedule = self.model.noise_schedule
        timesteps = torch.randint(schedule.num_train_timesteps, (len(pixels),))
        noise = torch.randn_like(pixels)
        prediction = self.model.denoise(schedule.add_noise(pixels, noise, timesteps), timesteps)
        return nn.functional.mse_loss(prediction, schedule.training_target(pixels, noise, timesteps))


def loop_arms(bench: Bench) -> dict[str, Turn]:
    sizes = bench.sizes
    data = ImageData.of("sample", split="train").sample(sizes.images, 0)

    def model() -> ASelectDiTModel:
        torch.manual_seed(0)
        return ASelectDiTModel(ASelectDiTConfig(**NETWORK | (TINY if bench.tiny else {})))

    def ours(cached: bool) -> Turn:
        network = model()
        dataset, collate = training_set(network, data, bench.data_args(cached), sizes.batch)
        objective = DenoisingObjective(network, random_flip=True)
        return our_turn(bench, objective, dataset, collate, sizes.batch, sizes.steps, EMA)

    bare = BareDenoiser(model())
    pixels = TensorDataset(torch.cat(list(data.batches(bare.model.config, 64))))
    return {
        "bare loop": bare_turn(bare, bare, pixels, sizes.batch, sizes.steps, EMA),
        "ours": ours(cached=True),
        "ours, images": ours(cached=False),
    }


def latent_arms(bench: Bench) -> dict[str, Turn]:
    sizes, vae = bench.sizes, TINY_VAE if bench.tiny else SD_VAE
    options = {"sample_size": sizes.side // 8, "num_condition_classes": 0, "vae_config": vae}
    torch.manual_seed(0)
    config = ASelectDiTConfig.from_preset("DiT-B/2", **options | (TINY if bench.tiny else {}))
    model = ASelectDiTModel(config)
    model.vae.requires_grad_(False)
    noise = np.random.default_rng(0).random((sizes.encoded, 3, sizes.side, sizes.side), dtype=np.float32)
    data = ImageData(torch.from_numpy(noise * 2 - 1), name="noise")
    arms = {}
    for name, cached in (("images", False), ("cached latents", True)):
        dataset, collate = training_set(model, data, bench.data_args(cached), sizes.latent_batch)
        objective = DenoisingObjective(model, random_flip=True)
        arms[name] = our_turn(bench, objective, dataset, collate, sizes.latent_batch, 1, 0.0)
    return arms


def task_arms(bench: Bench, frozen: bool) -> dict[str, Turn]:
    sizes = bench.sizes
    data = ImageData.of("sample", split="train").sample(sizes.images, 0)
    assert data.labels is not None

    def classifier() -> ASelectDiTForImageClassification:
        torch.manual_seed(0)
        model = load_model("sample", ASelectDiTForImageClassification, new_head=True, num_labels=10)
        if frozen:
            model.freeze_backbone()
        return model

    bare, hugging = classifier(), classifier()
    pixels = torch.cat(list(data.batches(bare.config, 64)))
    labels = torch.from_numpy(data.labels)

    def loss_of(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return bare(pixel_values=images, labels=targets).loss

    return {
        "bare loop": bare_turn(bare, loss_of, TensorDataset(pixels, labels), sizes.batch, sizes.steps, 0.0),
        "transformers Trainer": hugging_turn(bench, hugging, pixels, labels),
        "ours": our_task_turn(bench, classifier(), data, frozen),
    }


def hugging_turn(bench: Bench, model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> Turn:
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]

    def turn() -> list[float]:
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = transformers.TrainingArguments(
            output_dir=str(bench.folder / "trainer"), per_device_train_batch_size=bench.sizes.batch,
            max_steps=bench.sizes.steps + 2, learning_rate=RATE, lr_scheduler_type="constant", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        return step_times(model, transformers.Trainer(model, arguments, train_dataset=rows).train)

    return turn


def our_task_turn(bench: Bench, model: ASelectDiTForImageClassification, data: ImageData, frozen: bool) -> Turn:
    sizes = bench.sizes
    cache = encode_once(
        model.base_model, data, bench.data_args(True), sizes.batch, flipped=False, sampled=not frozen, whole_image=False
    )
    objective = TaskObjective(model, [HeadSetting(RATE, 0.0)])
    dataset = TaskDataset(data, model.config, CLASSIFICATION, cache)
    if frozen:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Trainer(objective, dataset, dataset.collate, bench.args(sizes.batch, 1, 0.0)).accelerator
        path = bench.folder / "features.npy"
        dataset.tokens = keep_features(objective.eval(), dataset, path, accelerator, sizes.batch, False)
    return our_turn(bench, objective, dataset, dataset.collate, sizes.batch, sizes.steps, 0.0)


def measure(arms: dict[str, Turn], batch: int, repeats: int) -> dict[str, Any]:
    """Images per CPU second of all arms, and the step of the first arm over that of each, repetition by repetition."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        order = list(arms) if repeat % 2 == 0 else list(arms)[::-1]
        for name in order:
            seconds[name].append(median(arms[name]()))
    first = seconds[next(iter(arms))]
    return {
        name: {
            "images_per_cpu_second": _spread([batch / value for value in values]),
            "speed_over_first": _spread([one / value for one, value in zip(first, values, strict=True)]),
        }
        for name, values in seconds.items()
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "greatest": max(values)}


def run(bench: Bench, parts: list[str], repeats: int) -> dict[str, Any]:
    """Measure and print part by part."""
    sizes = bench.sizes
    makers: dict[str, tuple[str, Callable[[], dict[str, Turn]], int]] = {
        "loop": ("loop", lambda: loop_arms(bench), sizes.batch),
        "latents": ("latents", lambda: latent_arms(bench), sizes.latent_batch),
        "tasks, frozen": ("tasks", lambda: task_arms(bench, frozen=True), sizes.batch),
        "tasks, whole": ("tasks", lambda: task_arms(bench, frozen=False), sizes.batch),
    }
    found: dict[str, Any] = {}
    for name, (part, make, batch) in makers.items():
        if part in parts:
            found[name] = measure(make(), batch, repeats)
            print(table({name: found[name]}), flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    lines = ["| part | arm | images per CPU second | speed over the first arm |", "|---|---|---|---|"]
    for part, arms in found.items():
        for name, each in arms.items():
            rate, ratio = each["images_per_cpu_second"], each["speed_over_first"]
            span = f"{ratio['median']:.2f}x ({ratio['least']:.2f} to {ratio['greatest']:.2f})"
            lines.append(f"| {part} | {name} | {rate['median']:.3g} | {span} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every arm")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and one repetition, for tests")
    parser.add_argument("--output", type=Path, default=RESULT, help="file to write")
    arguments = parser.parse_args(argv)
    sizes, repeats = (SMALL, 1) if arguments.tiny else (FULL, arguments.repeats)
    with tempfile.TemporaryDirectory() as folder:
        found = run(Bench(sizes, arguments.tiny, Path(folder)), arguments.parts, repeats)
    protocol = vars(sizes) | {
        "repeats": repeats,
        "tiny": arguments.tiny,
        "threads": torch.get_num_threads(),
        "hardware": hardware(torch.device("cpu")),
        "versions": installed_versions(),
    }
    write_json(arguments.output, found | {"protocol": protocol})


if __name__ == "__main__":
    main()
