"""How fast a DiT gives a feature: ours, a hooked diffusers DiT, and a plain ViT of the same size (the limit).

Protocol. All contenders compute one feature of the same inputs with the same weights (the ViT has weights of its own:
only its speed counts). After a warm-up they take turns in one process, one run each a round, each round starting with
another of them, so that whatever else the machine does hits all alike. Times are medians over rounds, ratios are ratios
of medians, and their spread is the least and greatest ratio within a round. Features are compared in the warm-up.
Rounds are as many as fit in `max_seconds`, at most `rounds` and at least three; a batch size with no time for three is
skipped, 1 excepted.
Peak memory is the weights and what the warm-up took beyond what was there before it: resident memory on the CPU (Linux
only), `torch.cuda.max_memory_allocated` on a GPU. FLOPs are counted at batch size 1, two per multiply-add.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import nn
from tqdm.auto import tqdm
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer, ViTPatchEmbeddings

from aselect_hf.conversion import set_vae, to_diffusers
from aselect_hf.cost import count_flops
from aselect_hf.files import atomic_file
from aselect_hf.modeling.configuration_aselect_dit import ASelectDiTConfig
from aselect_hf.modeling.features import FEATURE_KINDS, parse_feature
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.versions import hardware, installed_versions

BATCH_SIZES = (1, 8, 64)
MIN_ROUNDS, MAX_ROUNDS = 3, 10
MAX_SECONDS = 20.0
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""By how much a feature may differ from diffusers', relative to its greatest value, in the least precise dtype used."""

DIFFUSERS = "diffusers, whole network"
CUT = "diffusers, cut in the hook"
VIT = "plain ViT (limit)"
OURS = "ours"
FIXED = "ours, fixed timestep"
HOOKED = {"hidden": "", "query": "attn1.to_q", "key": "attn1.to_k", "value": "attn1.to_v"}
"""Features that a hook can read, with the module of a diffusers block that gives them."""


@dataclass
class Row:
    """One contender at one batch size; a ratio is `[of medians, least, greatest of a round]`, above 1 where it wins."""

    model: str
    feature: str
    input: str
    dtype: str
    batch_size: int
    contender: str
    seconds: list[float]
    parameters: int
    file_bytes: int
    flops_per_image: float
    peak_memory_bytes: int | None
    max_difference: float | None
    """Greatest absolute difference to the feature of the first contender; `None` where it is another function."""
    over_diffusers: list[float] | None = None
    over_limit: list[float] | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.median

    @property
    def flops_per_second(self) -> float:
        return self.flops_per_image * self.images_per_second

    def over(self, other: Row | None) -> list[float] | None:
        """How many times faster than another contender of the same rounds."""
        if other is None:
            return None
        ratios = [theirs / ours for theirs, ours in zip(other.seconds, self.seconds, strict=True)]
        return [other.median / self.median, min(ratios), max(ratios)]

    def columns(self) -> dict[str, str]:
        """The row as text."""
        memory, difference = self.peak_memory_bytes, self.max_difference
        return {
            "model": self.model,
            "from": self.input,
            "dtype": self.dtype,
            "batch": str(self.batch_size),
            "contender": self.contender,
            "images/s": f"{self.images_per_second:.3g}",
            "ms": f"{1000 * self.median:.4g}",
            "speed over diffusers": _ratio(self.over_diffusers),
            "over the limit": _ratio(self.over_limit),
            "parameters": f"{self.parameters / 1e6:.1f} M",
            "file": f"{self.file_bytes / 1e9:.3f} GB",
            "peak memory": "-" if memory is None else f"{memory / 1e9:.3f} GB",
            "GFLOP/image": f"{self.flops_per_image / 1e9:.4g}",
            "GFLOP/s": f"{self.flops_per_second / 1e9:.4g}",
            "max difference": "-" if difference is None else f"{difference:.1g}",
        }


@dataclass
class Benchmark:
    """Rows, what was skipped and why, and the protocol."""

    rows: list[Row]
    skipped: list[dict[str, Any]]
    protocol: dict[str, Any]

    def markdown(self) -> str:
        """The table, what was skipped, and the protocol."""
        table = [row.columns() for row in self.rows]
        lines: list[str] = []
        if table:
            lines = ["| " + " | ".join(table[0]) + " |", "|" + "---|" * len(table[0])]
            lines += ["| " + " | ".join(row.values()) + " |" for row in table]
            lines += [""] * bool(self.skipped)
        for skip in self.skipped:
            place = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in skip.items() if name != "reason")
            lines.append(f"- Skipped: {place}: {skip['reason']}.")
        entries = self.protocol | self.protocol["versions"]
        described = (f"{name.replace('_', ' ')} {value}" for name, value in entries.items() if name != "versions")
        return "\n".join([*lines, "", "Protocol: " + "; ".join(described) + "."]) + "\n"

    def save(self, path: str | Path) -> None:
        """Write everything as JSON to `path`, and the table beside it as `.md`."""
        derived = ("median", "images_per_second", "flops_per_second")
        rows = [dataclasses.asdict(row) | {name: getattr(row, name) for name in derived} for row in self.rows]
        content = {"protocol": self.protocol, "rows": rows, "skipped": self.skipped}
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1))
        with atomic_file(Path(path).with_suffix(".md")) as temporary:
            temporary.write_text(self.markdown())


@torch.no_grad()
def benchmark_model(
    model: ASelectDiTModel,
    *,
    name: str = "model",
    feature: str | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    pixels: bool = True,
    rounds: int = MAX_ROUNDS,
    max_seconds: float = MAX_SECONDS,
    progress: bool = True,
) -> Benchmark:
    """Measure a model against its peers, on the device and in the dtype that it has; the protocol is the module's.

    Args:
        name: of the model, for the table.
        feature: default the output of the middle block, `blocks.<depth // 2 - 1>.hidden`: half of the network. A model
            whose timestep is fixed has only its own, and only the ViT to compare with.
        pixels: also measure from pixels, where the model has a VAE.
        rounds: at most so many, per batch size.
        max_seconds: for all contenders together, per batch size; one that would take longer is skipped, 1 excepted.

    Raises:
        ValueError: an argument that is not positive, a feature that no hook reads or that is not there, or contenders
            that do not give the same feature.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be positive integers, got {list(batch_sizes)}")
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds must be at least {MIN_ROUNDS}, got {rounds}")
    if not max_seconds > 0:
        raise ValueError(f"max_seconds must be positive, got {max_seconds}")
    config = model.config
    peers = _Peers(model.eval(), _checked_feature(config, feature))
    kinds = {"latents": (config.num_channels, config.sample_size)}
    if pixels and model.vae is not None:
        kinds["pixels"] = (model.vae.config.in_channels, config.image_size or 0)
    skipped = [{"model": name, "contender": "diffusers", "reason": peers.no_diffusers}] if peers.no_diffusers else []
    result = Benchmark([], skipped, describe_protocol(model.device, rounds, max_seconds))
    for kind, (channels, side) in kinds.items():
        place = {"model": name, "feature": peers.feature, "input": kind, "dtype": _dtype(model)}
        generator = torch.Generator().manual_seed(0)
        images = 2 * torch.rand(max(batch_sizes), channels, side, side, generator=generator).to(model.device) - 1
        contenders = peers.from_latents() if kind == "latents" else peers.from_pixels()
        started = time.perf_counter()
        flops = {each.name: count_flops(partial(each.run, images[:1])) for each in contenders}
        per_image = time.perf_counter() - started
        if per_image < max_seconds / 10:  # a first run does what is done only once: another knows better
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
    """What the numbers depend on beside the model; nothing of when or where they were taken."""
    return {
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "rounds": f"{MIN_ROUNDS} to {rounds}, as fit in {max_seconds:g} s",
        "times": "medians over rounds in which all contenders take turns; ratios of medians (range over rounds)",
        "file": "bytes of the tensors that the checkpoint stores",
        "peak_memory": "weights, and what one run takes beyond them",
        "versions": installed_versions(),
    }


@dataclass
class _Contender:
    """Something that gives the feature `(batch, tokens, width)` of an input, with all the weights that it needs."""

    name: str
    run: Callable[[torch.Tensor], torch.Tensor]
    modules: Sequence[nn.Module]
    tolerance: float | None
    """How far its feature may be from the first contender's, relative to its size; `None`: it is another function."""

    def timed(self, batch: torch.Tensor) -> float:
        """Seconds of one run."""
        _synchronize(batch.device)
        started = time.perf_counter()
        self.run(batch)
        _synchronize(batch.device)
        return time.perf_counter() - started


class _Peers:
    """Everything that the contenders are made of, built from one model."""

    def __init__(self, model: ASelectDiTModel, feature: str) -> None:
        config = model.config
        self.model, self.feature, self.timestep = model, feature, model.default_timestep
        self.fixed = model if config.fixed_timestep else model.fix_timestep(self.timestep, feature).eval()
        self.vit = PlainViT(config, feature).to(model.device, model.dtype).eval()
        self.transformer: Any = None
        self.no_diffusers = ""
        twin = _with_vae(model, None)
        twin.config.timestep_freq_shift = 1  # the only one that diffusers can save; what the model has is set below
        try:
            self.transformer, self.scheduler = to_diffusers(twin)
        except ValueError as error:
            self.no_diffusers = str(error)
            return
        self.transformer.to(model.device)
        for block in self.transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = config.timestep_freq_shift

    def from_latents(self) -> list[_Contender]:
        """All that start at what the DiT sees."""
        tolerance = TOLERANCES[self.model.dtype]
        contenders = []
        if self.transformer is not None:
            for name, cut in ((DIFFUSERS, False), (CUT, True)):
                contenders.append(_Contender(name, self._hooked(cut), [self.transformer], tolerance))
        if self.fixed is not self.model:
            dit = _with_vae(self.model, None)
            contenders.append(_Contender(OURS, self._ours(dit, "latents"), [dit], tolerance))
        dit = _with_vae(self.fixed, None)
        contenders.append(_Contender(FIXED, self._ours(dit, "latents"), [dit], tolerance))
        return [*contenders, _Contender(VIT, self.vit, [self.vit], None)]

    def from_pixels(self) -> list[_Contender]:
        """All that start at pixels: diffusers with the model's own VAE, ours with several."""
        config, vae = self.model.config, self.model.vae
        contenders = []
        if self.transformer is not None:
            hooked, tolerance = self._hooked(cut=False), TOLERANCES[self.model.dtype]
            name = f"{DIFFUSERS}, VAE {_dtype(vae)}"
            run = lambda pixels: hooked(self.model.encode(pixels))  # noqa: E731
            contenders.append(_Contender(name, run, [self.transformer, vae], tolerance))
        fast = copy.deepcopy(vae).to(torch.bfloat16, memory_format=torch.channels_last)
        vaes = {"VAE float32": copy.deepcopy(vae).float(), "VAE bfloat16 channels-last": fast}
        if config.vae_downsampling == 8 and not isinstance(vae, AutoencoderTiny):
            tiny: Any = AutoencoderTiny(latent_channels=config.num_channels)
            vaes["AutoencoderTiny (random weights)"] = tiny.to(self.model.device, self.model.dtype)
        for name, each in vaes.items():
            dit, same = _with_vae(self.fixed, each), type(each) is type(vae)
            tolerance = max(TOLERANCES[x.dtype] for x in (self.model, vae, each))
            run = self._ours(dit, "pixel_values")
            contenders.append(_Contender(f"{FIXED}, {name}", run, [dit], tolerance if same else None))
        return contenders

    def _ours(self, model: ASelectDiTModel, argument: str) -> Callable[[torch.Tensor], torch.Tensor]:
        chosen: dict[str, Any] = {"feature": self.feature, "timestep": self.timestep}
        return lambda batch: model(**{argument: batch}, **chosen).last_hidden_state

    def _hooked(self, cut: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        """The feature as a forward hook on diffusers' DiT finds it; `cut` leaves the network there."""
        config = self.model.config
        index, kind = parse_feature(self.feature, config.num_hidden_layers)
        module = self.transformer.transformer_blocks[index].get_submodule(HOOKED[kind])

        def run(latents: torch.Tensor) -> torch.Tensor:
            found: list[torch.Tensor] = []

            def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
                found.append(output)
                if cut:
                    raise _FoundError

            draws = self.model.stored_noise(latents).float()
            noise = draws.expand(-1, len(latents), -1, -1, -1)
            steps = torch.full((len(latents),), self.timestep, device=latents.device)
            noisy = torch.cat([self.scheduler.add_noise(latents.float(), each, steps) for each in noise])
            steps = steps.repeat(len(draws))
            labels = torch.full_like(steps, config.num_condition_classes)
            handle = module.register_forward_hook(hook)
            try:
                self.transformer(noisy.to(self.transformer.dtype), timestep=steps, class_labels=labels)
            except _FoundError:
                pass
            finally:
                handle.remove()
            return found[0] if len(draws) == 1 else found[0].unflatten(0, (len(draws), -1)).mean(dim=0)

        return run


class _FoundError(Exception):
    """Leaves a network from inside a hook."""


class PlainViT(nn.Module):
    """transformers' ViT layers on the same tokens: as many whole blocks as the feature takes, no class token."""

    def __init__(self, config: ASelectDiTConfig, feature: str) -> None:
        super().__init__()
        index, kind = parse_feature(feature, config.num_hidden_layers)
        attends = FEATURE_KINDS.index(kind) > FEATURE_KINDS.index("value")
        vit = ViTConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=int(config.hidden_size * config.mlp_ratio),
            hidden_act=config.hidden_act,
            qkv_bias=config.attention_bias,
            image_size=config.sample_size,
            patch_size=config.patch_size,
            num_channels=config.num_channels,
        )
        vit._attn_implementation = "sdpa"
        self.num_noise_draws = config.num_noise_draws
        self.patch_embeddings = ViTPatchEmbeddings(vit)
        self.position_embeddings = nn.Parameter(torch.randn(1, config.num_patches, config.hidden_size))
        self.layers = nn.ModuleList(ViTLayer(vit) for _ in range(index + attends))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """`(batch * draws, tokens, width)`: every noise draw of a DiT is one more image for a ViT."""
        latents = latents.repeat(self.num_noise_draws, 1, 1, 1).to(self.position_embeddings.dtype)
        hidden_states = self.position_embeddings + self.patch_embeddings(latents)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def _measure(
    contenders: list[_Contender],
    batch: torch.Tensor,
    flops: dict[str, float],
    where: dict[str, Any],
    rounds: int,
    max_seconds: float,
    description: str | None,
) -> list[Row]:
    """Warm up, compare the features, and time all contenders on one batch."""
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


def _differences(contenders: list[_Contender], outputs: list[torch.Tensor]) -> list[float | None]:
    """Greatest absolute difference of every feature to the first.

    Raises:
        ValueError: one is beyond its tolerance.
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
                f"{each.name} and {contenders[0].name} do not give the same feature: they differ by {difference:.3g}, "
                f"the greatest value is {reference.abs().max():.3g}"
            )
        differences.append(difference)
    return differences


def peak_memory(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What `run` gives, and the bytes it took beyond those in use before; `None` where that cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return run(), torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return run(), None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but not given back would be used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        return run(), None
    return run(), max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _checked_feature(config: ASelectDiTConfig, feature: str | None) -> str:
    """The feature to measure."""
    middle = f"blocks.{max(0, config.num_hidden_layers // 2 - 1)}.hidden"
    default = str(config.feature) if config.fixed_timestep else middle
    name = parse_feature(feature or default, config.num_hidden_layers)
    if config.fixed_timestep and str(name) not in (config.fixed_to or {})["features"]:
        raise config.fixed_error(f"feature {feature!r}")
    if not config.fixed_timestep and name.kind not in HOOKED:
        raise ValueError(f"feature must be of a kind that a hook reads ({', '.join(HOOKED)}), got {feature!r}")
    return str(name)


def _with_vae(model: ASelectDiTModel, vae: Any) -> ASelectDiTModel:
    """A model that shares all weights with `model` but the VAE; `None` takes it out."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin.config = copy.deepcopy(model.config)
    if vae is None:
        twin.vae = None
    else:
        set_vae(twin, vae, decoder=False)
    return twin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _ratio(ratio: list[float] | None) -> str:
    return "-" if ratio is None else f"{ratio[0]:.2f}x ({ratio[1]:.2f}-{ratio[2]:.2f})"
