"""Pretrain a DiT as a diffusion model: on any Hub data set, parquet folder or folder of images.

    accelerate launch -m aselect_hf.training.pretrain --dataset_name zalando-datasets/fashion_mnist \\
        --config_overrides hidden_size=144,num_hidden_layers=7,num_attention_heads=6,patch_size=4,sample_size=28,\\
num_channels=1,num_condition_classes=0,learned_sigma=false --output_dir runs/fashion-mnist \\
        --per_device_train_batch_size 256 --learning_rate 1e-3 --mixed_precision bf16 --ema_decay 0.999

The loss is the mean squared error of the network's prediction at a uniformly drawn timestep (Ho et al. 2020, "simple"
loss; the learned variance of a DiT is left untrained). Images are encoded once (`--cache_latents`),
and a VAE's latents are sampled from its posterior in every step. Labels are used only if the model is class-conditional
(`num_condition_classes > 0`). `--log_icr 500` also records, every 500 steps, how much the features depend on crops and
noise (`training/invariance.py`): the number rises again when the model begins to memorize its images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from aselect_hf.conversion import load_model, save_model
from aselect_hf.cost import weight_bytes
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.images import image_pixels
from aselect_hf.data.latent_cache import LatentCache
from aselect_hf.data.sources import load_images
from aselect_hf.errors import one_line_errors
from aselect_hf.files import atomic_files, write_json
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.configuration_noisy_backbone import NoisyBackboneConfig
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.training.arguments import DataArguments, PretrainingArguments, PretrainModelArguments, public_arguments
from aselect_hf.training.batches import Batch, Collate
from aselect_hf.training.draws import SampleDraws
from aselect_hf.training.invariance import icr_of_training
from aselect_hf.training.latents import cached_inputs, clean_latents, encode_once
from aselect_hf.training.loop import Trainer
from aselect_hf.training.output_dir import hold_output_dir
from aselect_hf.training.parsing import parse_arguments
from aselect_hf.training.processes import this_process
from aselect_hf.training.publish import check_push, push_output
from aselect_hf.training.sharding import is_sharded, refuse_sharding, whole_weights

NEXT_FIELD = r",(?=\s*\w+=|$)"
"""Commas between two `field=value`, and not those inside a JSON value."""


class DenoisingObjective(nn.Module):
    """Denoising loss of a DiT on `labels` and `pixel_values`, or what `cached_inputs` returns instead of pixels."""

    def __init__(self, model: NoisyBackbone, condition_dropout: float = 0.1, random_flip: bool = False) -> None:
        super().__init__()
        self.model = model
        self.condition_dropout = condition_dropout
        self.random_flip = random_flip

    def forward(self, batch: dict[str, torch.Tensor], draws: SampleDraws) -> dict[str, torch.Tensor]:
        schedule, config = self.model.noise_schedule, self.model.config
        inputs = batch["latents"] if "latents" in batch else batch["pixel_values"]
        flip = (draws.uniform() < 0.5).to(inputs.device) if self.random_flip else None
        latents = clean_latents(self.model, batch, draws, flip, sampled=True)
        first = 1 if schedule.type == "flow_matching" else 0
        timesteps = draws.integers(first, schedule.num_train_timesteps).to(latents.device)
        noise = draws.normal(*latents.shape[1:]).to(latents.device)
        labels = None
        if config.null_class:
            dropped = (draws.uniform() < self.condition_dropout).to(latents.device)
            labels = torch.where(dropped, config.null_class, batch["labels"])
        prediction = self.model.denoise(schedule.add_noise(latents, noise, timesteps), timesteps, labels)
        target = schedule.training_target(latents, noise, timesteps)
        return {"loss": nn.functional.mse_loss(prediction.float(), target)}


def build_config(args: PretrainModelArguments) -> ASelectDiTConfig:
    """A config from a preset and `field=value` overrides, whose values are read as JSON."""
    overrides: dict[str, Any] = {}
    for pair in filter(None, re.split(NEXT_FIELD, args.config_overrides or "")):
        name, separator, value = pair.partition("=")
        if not separator or name not in ASelectDiTConfig.__dataclass_fields__:
            raise ValueError(f"config_overrides: {pair!r} is not 'field=value' with a field of ASelectDiTConfig")
        try:
            overrides[name] = json.loads(value)
        except json.JSONDecodeError:
            overrides[name] = value
    if args.preset:
        return ASelectDiTConfig.from_preset(args.preset, **overrides)
    return ASelectDiTConfig(**overrides)


def make_collate(config: NoisyBackboneConfig) -> Callable[[list[tuple[Any, int | None]]], dict[str, torch.Tensor]]:
    """Collate images to normalized pixels, with integer labels if the model is conditional."""
    return partial(_collate, image_pixels(config), bool(config.null_class))


def _collate(pixels: Any, labeled: bool, rows: list[tuple[Any, int | None]]) -> dict[str, torch.Tensor]:
    images, labels = zip(*rows, strict=True)
    batch = {"pixel_values": pixels(list(images))}
    if labeled:
        batch["labels"] = torch.tensor(labels)
    return batch


def _collate_latents(cache: LatentCache, labels: torch.Tensor | None, indices: list[int]) -> Batch:
    batch = cached_inputs(cache, indices)
    if labels is not None:
        batch["labels"] = labels[indices]
    return batch


def training_set(
    model: NoisyBackbone, data: ImageData, data_args: DataArguments, batch_size: int
) -> tuple[Any, Collate]:
    """Items to draw and how to collate them: indices of images encoded once or, without `cache_latents`, images."""
    cache = encode_once(model, data, data_args, batch_size, flipped=data_args.random_flip, sampled=True)
    if cache is None:
        return data, make_collate(model.config)
    labels = torch.from_numpy(data.labels) if model.config.null_class and data.labels is not None else None
    return range(len(data)), partial(_collate_latents, cache, labels)


def check_labels(data: ImageData, config: NoisyBackboneConfig) -> None:
    """Check that the labels fit a class-conditional model."""
    classes = config.null_class
    if classes and (data.labels is None or not 0 <= data.labels.min() <= data.labels.max() < classes):
        found = f"none ({data.no_labels})" if data.labels is None else f"{data.labels.min()}..{data.labels.max()}"
        raise ValueError(
            f"num_condition_classes={classes} needs labels in 0..{classes - 1}, found {found}; "
            "for an unconditional model set num_condition_classes=0 in config_overrides"
        )


def pretrain(
    model_args: PretrainModelArguments, data_args: DataArguments, training_args: PretrainingArguments
) -> NoisyBackbone:
    """Pretrain and save to `output_dir`: weights, config, image processor, `training.json`.

    A run stopped by a signal leaves a checkpoint but no final model.
    """
    source = data_args.train_dir or data_args.dataset_name
    if not source or not training_args.output_dir:
        raise ValueError("give --dataset_name or --train_dir, and --output_dir")
    output_dir = Path(training_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    state = this_process()
    images = load_images(source, data_args.train_split, data_args.dataset_config_name)
    data = ImageData.of(images, image_column=data_args.image_column_name, label_column=data_args.label_column_name)
    set_seed(training_args.seed)
    if model_args.model_name_or_path:
        model = load_model(model_args.model_name_or_path, dtype=torch.float32)
    else:
        model = ASelectDiTModel(build_config(model_args))
    model.set_attn_implementation(model_args.attn_implementation)
    if model.config.null_class and data.labels is not None:
        data = data.labeled()
    check_labels(data, model.config)
    data = data.sample(data_args.max_train_samples, training_args.seed, per_class=1).readable(data_args.on_error)
    check_push(training_args, model.config)
    if model.vae is not None:
        model.vae.requires_grad_(False)
    objective = DenoisingObjective(model.to(state.device), training_args.condition_dropout, data_args.random_flip)
    resume = training_args.resume_from_checkpoint
    with hold_output_dir(output_dir, weight_bytes(model), resume) as give_back_room:  # before any long work
        dataset, collate = training_set(model, data, data_args, training_args.per_device_train_batch_size)
        evaluate = icr_of_training(model, data, training_args.seed) if model_args.log_icr else None
        trainer = Trainer(
            objective,
            dataset,
            collate,
            training_args,
            num_workers=data_args.dataloader_num_workers,
            evaluate=evaluate,
            evaluate_every=model_args.log_icr,
        )
        if evaluate is not None:
            refuse_sharding(trainer.accelerator, "log_icr")
        record = trainer.train()
        if is_sharded(trainer.accelerator):
            weights = whole_weights(trainer.accelerator, trainer.objective)
            model = type(model)(model.config)
            DenoisingObjective(model).load_state_dict(weights)
        give_back_room()
        if trainer.accelerator.is_main_process and not record["interrupted"]:
            arguments = public_arguments(model_args, data_args, training_args)
            with atomic_files(output_dir) as folder:
                save_model(model, folder)
                write_json(folder / "training.json", {"arguments": arguments} | record)
            loss = next(entry["loss"] for entry in reversed(record["history"]) if "loss" in entry)
            trainer.accelerator.print(f"saved to {output_dir}, final loss {loss:.4f}")
            push_output(training_args)
    trainer.finish()
    return model


def main() -> None:
    with one_line_errors("pretrain"):
        pretrain(*parse_arguments((PretrainModelArguments, DataArguments, PretrainingArguments), __doc__))


if __name__ == "__main__":
    main()
