"""Training on latents that are encoded once: the same training as with images, and exact resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

from aselect_hf import ASelectDiTModel
from aselect_hf.conversion import save_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import cached_latents
from aselect_hf.tasks import CLASSIFICATION
from aselect_hf.training.arguments import (
    DataArguments,
    PretrainingArguments,
    PretrainModelArguments,
    TaskDataArguments,
    TaskModelArguments,
    TrainingArguments,
)
from aselect_hf.training.draws import SampleDraws
from aselect_hf.training.latents import cached_inputs, clean_latents
from aselect_hf.training.parsing import parse_arguments
from aselect_hf.training.pretrain import pretrain
from aselect_hf.training.task import TaskRun

ROOT = Path(__file__).parents[2]
PRETRAIN = (PretrainModelArguments, DataArguments, PretrainingArguments)
TASK = (TaskModelArguments, TaskDataArguments, TrainingArguments)


@pytest.fixture
def latent_model(make_model, tiny_kl):
    config = dict(tiny_kl.config) | {"_class_name": "AutoencoderKL"}
    model = make_model(0, num_channels=4, sample_size=8, num_condition_classes=2, vae_config=config)
    model.vae.load_state_dict(tiny_kl.state_dict(), strict=False)
    return model


@pytest.fixture
def flags(latent_model, tmp_path):
    """`flags(name, **arguments)`: a command line that trains a latent DiT on a folder of 22 images of two classes."""
    save_model(latent_model, tmp_path / "model")
    generator = np.random.default_rng(0)
    for index in range(22):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), np.uint8)).save(path)

    def build(name: str, **arguments) -> list[str]:
        values = {
            "model_name_or_path": tmp_path / "model",
            "train_dir": tmp_path / "images",
            "output_dir": tmp_path / name,
            "cache_dir": tmp_path / "cache",
            "per_device_train_batch_size": 4,
            "max_train_steps": 8,
            "logging_steps": 1,
        }
        return [f"--{key}={value}" for key, value in (values | arguments).items()]

    return build


@pytest.fixture
def run(flags, tmp_path):
    """`run(name, **arguments)`: pretrains; the final weights."""

    def run(name: str, **arguments) -> dict[str, torch.Tensor]:
        pretrain(*parse_arguments(PRETRAIN, None, flags(name, **arguments)))
        return load_file(tmp_path / name / "model.safetensors")

    return run


def test_cached_and_encoded_latents_are_the_same_samples(latent_model, normal, tmp_path):
    """Of a batch in any order, half of it mirrored; both arms draw the same numbers."""
    images = normal(6, 3, 16, 16).clamp(-1, 1)
    cache = cached_latents(latent_model, ImageData(images), flipped=True, log_variance=True, cache_dir=tmp_path)
    rows, flip = [4, 0, 5, 2], torch.tensor([True, False, False, True])
    stored = cached_inputs(cache, rows)
    assert set(stored) == {"latents", "flipped_latents", "log_variance", "flipped_log_variance"}

    def latents(batch, epoch=0, sampled=True):
        return clean_latents(latent_model, batch, SampleDraws(0, epoch, range(4)), flip, sampled)

    pixels = {"pixel_values": images[rows]}
    for sampled in (True, False):
        torch.testing.assert_close(latents(stored, 0, sampled), latents(pixels, 0, sampled))
    mean = latents(stored, sampled=False)
    torch.testing.assert_close(mean[0], latent_model.encode(images[4:5].flip(-1))[0])
    assert not torch.allclose(mean[0], cache[4].flip(-1), atol=1e-3), "a mirrored latent is another latent"
    assert not torch.equal(latents(stored, epoch=0), latents(stored, epoch=1))
    noise = SampleDraws(0, 0, range(4)).normal(4, 8, 8)
    deviation = (
        torch.where(flip[:, None, None, None], stored["flipped_log_variance"], stored["log_variance"]) / 2
    ).exp()
    torch.testing.assert_close(latents(stored), mean + deviation * noise)


def test_pretraining_on_a_cache_encodes_once_and_ends_in_the_same_weights(run, monkeypatch):
    encoded = []
    encode = ASelectDiTModel.encode_posterior
    monkeypatch.setattr(ASelectDiTModel, "encode_posterior", lambda self, x: encoded.append(len(x)) or encode(self, x))
    cached = run("cached", ema_decay=0.5)
    assert sum(encoded) == 2 * 22, "every image and its mirror image, once"
    plain = run("plain", ema_decay=0.5, cache_latents=False)
    assert sum(encoded) == 2 * 22 + 8 * 4
    for name, value in cached.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-5)


def test_cached_pixels_are_the_very_same_training(make_model, run, tmp_path):
    save_model(make_model(0, num_channels=3, sample_size=16, num_condition_classes=2), tmp_path / "model")
    cached, plain = run("cached"), run("plain", cache_latents=False)
    assert all(torch.equal(cached[name], plain[name]) for name in plain)


def test_resume_on_a_cache_ends_in_the_very_same_weights(run, tmp_path):
    """Stopped in the middle of the second epoch; the second cache is empty."""
    whole = run("whole", checkpointing_steps=7, ema_decay=0.5)
    checkpoint = tmp_path / "whole" / "checkpoint-7"
    resumed = run("resumed", ema_decay=0.5, resume_from_checkpoint=checkpoint, cache_dir=tmp_path / "other")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_two_processes_share_a_cache(run, flags, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "aselect_hf.training.pretrain", *flags("two", per_device_train_batch_size=2)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = load_file(tmp_path / "two" / "model.safetensors"), run("one")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-3, atol=1e-5)


def test_a_whole_backbone_trains_on_samples_and_a_frozen_one_on_means(flags, monkeypatch):
    kinds = []
    monkeypatch.setattr(
        "aselect_hf.training.latents.cached_latents",
        lambda *args, **options: (
            kinds.append((options["flipped"], options["log_variance"])) or cached_latents(*args, **options)
        ),
    )
    options = {"train_val_split": 0.3, "method": "fixed", "timestep": 50, "max_train_steps": 2}
    for frozen in (False, True):
        arguments = flags(f"frozen-{frozen}", **options, freeze_backbone=frozen)
        TaskRun(CLASSIFICATION, *parse_arguments(TASK, None, arguments)).run()
    assert kinds == [(True, True), (False, False), (True, False), (False, False)]


def test_a_disk_without_room_is_named_before_training(run, small_disk, tmp_path):
    with pytest.raises(ValueError, match=r"cache_dir .* GB free, but .* GB is needed for these latents"):
        run("run", cache_dir=small_disk(20_000))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_an_output_folder_in_use_is_said_before_images_are_encoded(flags, tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="is in use by another run"):
        pretrain(*parse_arguments(PRETRAIN, None, flags("run")))
    assert not (tmp_path / "cache").exists()


def test_an_earlier_run_is_said_before_images_are_encoded(flags, tmp_path):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match="output_dir holds checkpoint-3 of an earlier run: resume it with"):
        pretrain(*parse_arguments(PRETRAIN, None, flags("run")))
    assert not (tmp_path / "cache").exists()
