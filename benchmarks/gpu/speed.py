"""Speed of features compared with peers, with `torch.compile` and by attention kernel; and HFR's batch size."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

from aselect_hf import ASelectDiTConfig, ASelectDiTModel
from aselect_hf.data.image_data import ImageData
from aselect_hf.selection import default_timesteps
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.selection.sweep import HFRSweep
from aselect_hf.speed import FIXED, OURS, benchmark_model
from aselect_hf.speed.measure import peak_memory
from benchmarks.gpu.stage import Stage, timed
from benchmarks.throughput import random_model

TIMESTEP = 100
WARM_UPS, RUNS = 3, 15
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "sample_size": 8, "patch_size": 2}
KERNELS = {
    "sdpa: flash": SDPBackend.FLASH_ATTENTION,
    "sdpa: cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa: efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa: math": SDPBackend.MATH,
}
IMPLEMENTATIONS = ("sdpa", "eager", *(["flash_attention_2"] if is_flash_attn_2_available() else []))
HFR_IMAGES, HFR_BATCHES = 64, (8, 64, 256)
HEADROOM = (6 * 2**30, 2 * 2**30)
"""Bytes beyond the weights to which memory is limited, so that HFR's first batch does not fit."""


def shapes(tiny: bool) -> dict[str, dict[str, Any]]:
    """Networks to time, by name."""
    if tiny:
        return {"tiny": TINY}
    return {name: {"preset": name} for name in ("DiT-S/2", "DiT-B/2", "DiT-XL/2")}


def build(shape: dict[str, Any], device: torch.device) -> ASelectDiTModel:
    """A model with random weights for 32 x 32 x 4 latents, that is, 256 pixels."""
    common: dict[str, Any] = {"timestep": TIMESTEP, "timestep_freq_shift": 1}
    if "preset" in shape:
        config = ASelectDiTConfig.from_preset(shape["preset"], **common)
    else:
        config = ASelectDiTConfig(**shape | common)
    with device:  # initializing a large network is much faster on its device
        return random_model(config)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions of float32."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def throughput(stage: Stage) -> None:
    """Run `aselect benchmark` on the published shapes: diffusers whole and cut, ours, ours fixed, a plain ViT."""
    sizes = (1, 2) if stage.setting.tiny else (1, 8, 64, 256)
    for name, shape in shapes(stage.setting.tiny).items():
        model = build(shape, stage.device)
        for precision in ("float32", "float32, tf32", "bfloat16"):  # the last rounds the weights
            what = f"{name}, {precision}"
            if not stage.has_time_for(what, 0 if stage.setting.tiny else 8):
                continue
            with stage.attempt(what), tf32("tf32" in precision):
                model = model.to(getattr(torch, precision.split(",")[0]))
                seconds = max(0.5, min(3.0, stage.left / 8))
                result = benchmark_model(model, name=name, batch_sizes=sizes, max_seconds=seconds, progress=False)
                for row in result.rows:
                    stage.add("rows", summary(row.seconds, row.batch_size) | {
                        "model": name, "precision": precision, "batch": row.batch_size, "contender": row.contender,
                        "over_diffusers": row.over_diffusers, "over_limit": row.over_limit,
                        "peak_memory_bytes": row.peak_memory_bytes, "gflop_per_image": row.flops_per_image / 1e9,
                        "max_difference": row.max_difference,
                    })  # fmt: skip
                for skipped in result.skipped:
                    stage.skip(what, ", ".join(f"{key} {value}" for key, value in skipped.items()))
                stage.note("protocol", result.protocol)
        del model
        free()


def attention_and_compile(stage: Stage) -> None:
    """Time a middle feature, ours and ours fixed, with every attention, then with `torch.compile` as time allows."""
    tiny = stage.setting.tiny
    models = {name: build(shapes(tiny)[name], stage.device) for name in (["tiny"] if tiny else ["DiT-S/2", "DiT-XL/2"])}
    batches = (2,) if tiny else (64, 1)
    for dtype in (torch.float32, torch.bfloat16):  # the last rounds the weights
        for name, model in models.items():
            for contender, network in contenders_of(model.to(dtype)):
                for batch in batches:
                    compare_attention(stage, network, *question(model, name, contender, batch))
    for batch in batches:
        for name, model in models.items():
            for contender, network in contenders_of(model):
                compare_compiled(stage, network, *question(model, name, contender, batch))
    del models, model, network
    free()


def middle(model: ASelectDiTModel) -> str:
    """Name of the middle block's output."""
    return f"blocks.{max(0, model.config.num_hidden_layers // 2 - 1)}.hidden"


def contenders_of(model: ASelectDiTModel) -> list[tuple[str, ASelectDiTModel]]:
    return [(FIXED, model.fix_timestep(TIMESTEP, middle(model)).eval()), (OURS, model)]


def question(model: ASelectDiTModel, name: str, contender: str, batch: int) -> tuple[str, torch.Tensor, dict[str, Any]]:
    """The feature, latents, and the cells of a row that describe them."""
    latents = torch.randn(batch, 4, *(model.config.sample_size,) * 2, device=model.device)
    where = {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "batch": batch, "contender": contender}
    return middle(model), latents, where


def compare_attention(
    stage: Stage, network: ASelectDiTModel, feature: str, latents: torch.Tensor, where: dict[str, Any]
) -> None:
    """Add a row for every attention implementation in transformers and every kernel in PyTorch."""
    run = feature_of(network, feature)
    reference: torch.Tensor | None = None
    for attention in (*IMPLEMENTATIONS, *KERNELS):
        what = ", ".join(map(str, [*where.values(), attention]))
        if not stage.has_time_for(what, 1):
            continue
        implementation, _, kernel = attention.partition(":")
        try:
            with stage.attempt(what), sdpa_kernel(KERNELS[attention]) if kernel else nullcontext(), torch.no_grad():
                network.set_attn_implementation(implementation)
                seconds, output, peak = measure(lambda: run(latents), stage.device)
                reference = output if reference is None else reference
                row = {"attention": attention, "compiled": "no"} | extras(output, reference, peak)
                stage.add("rows", where | summary(seconds, len(latents)) | row)
        finally:
            network.set_attn_implementation("sdpa")


def compare_compiled(
    stage: Stage, network: ASelectDiTModel, feature: str, latents: torch.Tensor, where: dict[str, Any]
) -> None:
    """Add a row with Inductor; for a single image, also one with CUDA graphs, which avoid kernel launches."""
    backend: dict[str, Any] = {"backend": "eager"} if stage.setting.tiny else {}
    modes = ["default"] + ["reduce-overhead"] * (len(latents) == 1 and stage.device.type == "cuda")
    for mode in modes:
        what = ", ".join(map(str, [*where.values(), "torch.compile", mode]))
        if not stage.has_time_for(what, 0 if backend else 20):
            continue
        with stage.attempt(what), torch.no_grad():
            torch.compiler.reset()
            options = backend or {"mode": mode}
            compiled = feature_of(torch.compile(network, fullgraph=True, dynamic=False, **options), feature)
            _, first = timed(lambda: compiled(latents), stage.device)  # noqa: B023
            seconds, output, peak = measure(lambda: compiled(latents), stage.device)  # noqa: B023
            row = {"attention": "sdpa", "compiled": mode, "compile_seconds": first}
            row |= extras(output, feature_of(network, feature)(latents), peak)
            stage.add("rows", where | summary(seconds, len(latents)) | row)


def feature_of(network: Any, feature: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda latents: network(latents=latents, timestep=TIMESTEP, feature=feature).last_hidden_state


def measure(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[list[float], torch.Tensor, int | None]:
    """Seconds of consecutive runs after a warm-up, the output, and the bytes that one run adds to memory use."""
    for _ in range(WARM_UPS):
        output = run().clone()
    _, peak = peak_memory(run, device)
    return [timed(run, device)[1] for _ in range(RUNS)], output, peak


def summary(seconds: list[float], batch: int) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {"seconds": [median, min(seconds), max(seconds)], "runs": len(seconds), "images_per_second": batch / median}


def extras(output: torch.Tensor, reference: torch.Tensor, peak: int | None) -> dict[str, Any]:
    difference = float((output.float() - reference.float()).norm() / reference.float().norm())
    return {"relative_difference": difference, "run_memory_bytes": peak}


def hfr_batch_size(stage: Stage) -> None:
    """Compare HFR's automatic batch size with fixed ones, with all and with little memory.

    Every setting runs twice. The second run is timed, because the first allocates memory and chooses kernels.
    """
    tiny = stage.setting.tiny
    for name in ["tiny"] if tiny else ["DiT-S/2", "DiT-XL/2"]:
        with stage.attempt(name):
            model = build(shapes(tiny)[name], stage.device).to(torch.bfloat16)
            images = torch.randn(8 if tiny else HFR_IMAGES, 4, *(model.config.sample_size,) * 2)
            reference: np.ndarray | None = None
            for batch in (None, *HFR_BATCHES):
                if not stage.has_time_for(f"{name}, batch {batch}", 0 if tiny else 3):
                    continue
                sweep_once(model, images, batch)
                found, row = sweep_once(model, images, batch)
                reference = found if reference is None else reference
                row["max_difference"] = float(np.abs(found - reference).max())
                stage.add("rows", {"model": name, "memory": "all"} | row)
            if stage.device.type == "cuda":
                little_memory(stage, name, model, images, reference)
        free()


def little_memory(
    stage: Stage, name: str, model: ASelectDiTModel, images: torch.Tensor, reference: np.ndarray | None
) -> None:
    """Repeat with little memory for this process, so that the first batch fails and is halved."""
    total, index = torch.cuda.get_device_properties(stage.device).total_memory, torch.cuda.current_device()
    for headroom in HEADROOM:
        free()
        allowed = torch.cuda.memory_allocated(stage.device) + headroom
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), index)
        try:
            with stage.attempt(f"{name}, {headroom / 2**30:.0f} GiB"):
                found, row = sweep_once(model, images, None)
                difference = None if reference is None else float(np.abs(found - reference).max())
                memory = f"{headroom / 2**30:.0f} GiB beyond the weights"
                stage.add("rows", {"model": name, "memory": memory, "max_difference": difference} | row)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, index)


def sweep_once(model: ASelectDiTModel, images: torch.Tensor, batch_size: int | None) -> tuple[np.ndarray, dict]:
    """Noise-corrected HFR of all images at 20 timesteps, and a row with its batch size and speed."""
    timesteps = default_timesteps(model.noise_schedule)
    feature = str(model.config.feature)
    inputs = SelectionInputs(model, ImageData(images), None, feature, timesteps, 0, batch_size, None, False)

    def run() -> HFRSweep:
        sweep = HFRSweep(inputs, {}, False)
        with torch.inference_mode():
            sweep.run([*range(len(timesteps))], len(images))
        return sweep

    sweep, seconds = timed(run, model.device)
    passes = 2 * len(images) * len(timesteps)
    row = {"asked": batch_size, "batch": sweep.batch_size, "seconds": seconds, "passes_per_second": passes / seconds}
    return sweep.raw - sweep.control, row


def free() -> None:
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
