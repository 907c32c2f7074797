"""`benchmark_model`: contenders take turns, see the protocol in `aselect_hf.speed`."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from aselect_hf.cost import count_flops
from aselect_hf.modeling.noisy_backbone import NoisyBackbone
from aselect_hf.speed.contenders import DIFFUSERS, VIT, Contender, Peers, checked_feature, dtype_name
from aselect_hf.speed.table import Benchmark, Row
from aselect_hf.versions import hardware, installed_versions

BATCH_SIZES = (1, 8, 64)
MIN_ROUNDS, MAX_ROUNDS = 3, 10
MAX_SECONDS = 20.0


@torch.no_grad()
def benchmark_model(
    model: NoisyBackbone,
    *,
    name: str = "model",
    feature: str | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    pixels: bool = True,
    rounds: int = MAX_ROUNDS,
    max_seconds: float = MAX_SECONDS,
    progress: bool = True,
) -> Benchmark:
    """Compare the speed of a model with its peers, on its device and in its dtype; see the protocol in the package.

    Args:
        name: name of the model in the table.
        feature: feature to compute (default: `blocks.<depth // 2 - 1>.hidden`, the output of the middle block). A model
            with a fixed timestep has only its own feature, and can be compared with the ViT only.
        pixels: also measure from pixels, if the model has a VAE.
        rounds: maximum number of rounds per batch size.
        max_seconds: time limit per batch size for all contenders together; batch sizes over it are skipped, except 1.

    Raises:
        ValueError: an argument is not positive, the feature does not exist or no hook can read it, or contenders
            compute different features.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be positive integers, got {list(batch_sizes)}")
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds must be at least {MIN_ROUNDS}, got {rounds}")
    if not max_seconds > 0:
        raise ValueError(f"max_seconds must be positive, got {max_seconds}")
    config = model.config
    peers = Peers(model.eval(), checked_feature(config, feature))
    kinds = {"latents": (config.num_channels, config.sample_size)}
    if pixels and model.vae is not None:
        kinds["pixels"] = (config.image_channels, config.image_size or 0)
    skipped = [{"model": name, "contender": "diffusers", "reason": peers.no_diffusers}] if peers.no_diffusers else []
    result = Benchmark([], skipped, describe_protocol(model.device, rounds, max_seconds))
    for kind, (channels, side) in kinds.items():
        place = {"model": name, "feature": peers.feature, "input": kind, "dtype": dtype_name(model)}
        generator = torch.Generator().manual_seed(0)
        images = 2 * torch.rand(max(batch_sizes), channels, side, side, generator=generator).to(model.device) - 1
        contenders = peers.from_latents() if kind == "latents" else peers.from_pixels()
        started = time.perf_counter()
        flops = {each.name: count_flops(partial(each.run, images[:1])) for each in contenders}
        per_image = time.perf_counter() - started
        if per_image < max_seconds / 10:  # the first run includes one-time work, so measure another
            per_image = sum(each.timed(images[:1]) for each in contenders)
        for batch_size in sorted(set(batch_sizes)):
            where = place | {"batch_size": batch_size}
            estimate = batch_size * per_image
            if batch_size > 1 and estimate * (1 + MIN_ROUNDS) > max_seconds:
                reason = f"a warm-up and {MIN_ROUNDS} rounds of about {estimate:.3g} s do not fit in {max_seconds:g} s"
                result.skipped.append(where | {"reason": reason})
                continue
            description = ", ".join(map(str, where.values())) if progress else None
            rows = _measure(contenders, images[:batch_size], flops, where, rounds, max_seconds, description)
            per_image = sum(row.median for row in rows) / batch_size
            result.rows += rows
    return result


def describe_protocol(device: torch.device, rounds: int, max_seconds: float) -> dict[str, Any]:
    """Everything besides the model that the numbers depend on, without the date and place of the run."""
    return {
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "rounds": f"{MIN_ROUNDS} to {rounds}, as many as fit in {max_seconds:g} s",
        "times": "medians over rounds in which all contenders take turns; ratios of medians (range over rounds)",
        "file": "bytes of the tensors that the checkpoint stores",
        "peak_memory": "weights plus the memory that one run adds",
        "versions": installed_versions(),
    }


def _measure(
    contenders: list[Contender],
    batch: torch.Tensor,
    flops: dict[str, float],
    where: dict[str, Any],
    rounds: int,
    max_seconds: float,
    description: str | None,
) -> list[Row]:
    """Warm up, compare features, and time all contenders on one batch."""
    gc.collect()
    outputs, peaks, started = [], [], time.perf_counter()
    for each in contenders:
        output, peak = peak_memory(partial(each.run, batch), batch.device)
        outputs.append(output)
        peaks.append(peak)
    differences = _differences(contenders, outputs)
    del outputs
    possible = int(max_seconds / (time.perf_counter() - started)) - 1
    seconds: list[list[float]] = [[] for _ in contenders]
    count = max(MIN_ROUNDS, min(rounds, possible))
    for turn in tqdm(range(count), desc=description, unit="round", disable=description is None):
        for index in range(len(contenders)):
            index = (index + turn) % len(contenders)
            seconds[index].append(contenders[index].timed(batch))
    rows = []
    for each, times, peak, difference in zip(contenders, seconds, peaks, differences, strict=True):
        weights = [tensor for module in each.modules for tensor in module.state_dict().values()]
        stored = sum(tensor.nbytes for tensor in weights)
        rows.append(
            Row(
                **where,
                contender=each.name,
                seconds=times,
                parameters=sum(x.numel() for module in each.modules for x in module.parameters()),
                file_bytes=stored,
                flops_per_image=flops[each.name],
                peak_memory_bytes=None if peak is None else stored + peak,
                max_difference=difference,
            )
        )
    diffusers = next((row for row in rows if row.contender.startswith(DIFFUSERS)), None)
    limit = next((row for row in rows if row.contender == VIT), None)
    for row in rows:
        row.over_diffusers, row.over_limit = row.over(diffusers), row.over(limit)
    return rows


def _differences(contenders: list[Contender], outputs: list[torch.Tensor]) -> list[float | None]:
    """Greatest absolute difference of every feature from the first.

    Raises:
        ValueError: a difference exceeds the contender's tolerance.
    """
    reference = outputs[0].float()
    differences: list[float | None] = []
    for each, output in zip(contenders, outputs, strict=True):
        if each.tolerance is None:
            differences.append(None)
            continue
        difference = float((output.float() - reference).abs().max())
        if not difference <= each.tolerance * float(reference.abs().max()):
            raise ValueError(
                f"{each.name} and {contenders[0].name} compute different features: they differ by {difference:.3g}, "
                f"and the greatest value is {reference.abs().max():.3g}"
            )
        differences.append(difference)
    return differences


def peak_memory(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """The result of `run`, and the bytes that it added to memory use at its peak (`None`: cannot be measured)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return run(), torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return run(), None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # reuse of memory that was freed but not returned would go unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: reset the peak
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return run(), None
    return run(), max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """A field of this process's status file, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
