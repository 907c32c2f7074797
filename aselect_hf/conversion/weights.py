"""Weights on disk: finding their files, reading them, and finding the network in a training checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from aselect_hf.files import read_json

State = dict[str, torch.Tensor]

STEMS = ("diffusion_pytorch_model", "model")
"""File names of a model's weights in diffusers and transformers."""
ANCHOR = "x_embedder.proj.weight"
"""A key of every original DiT; any text before it is a prefix of the whole network."""
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Segments that DDP, `torch.compile`, FSDP and activation checkpointing insert into parameter names."""
MAX_NESTING = 4
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of weights that are not quantized."""


@dataclass(frozen=True)
class Network:
    """A network found inside a training checkpoint.

    Args:
        state: its tensors, without prefixes and wrappers.
        label: its place in the checkpoint, such as `ema`.
        outside: number of tensors of other modules beside it (a VAE, a loss), which are ignored.
    """

    state: State
    label: str = ""
    outside: int = 0


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def refuse_quantized(name: str, config: Mapping[str, Any], weights: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
    """Refuse a network that bitsandbytes, torchao or another library has quantized.

    Args:
        name: of its folder or class, for the error.
        config: of the network.
        weights: their names and values.

    Raises:
        ValueError: its config says so, or a weight is not a plain tensor of floating-point numbers of 16 bits or more.
    """
    reason = "its config has a quantization_config" if config.get("quantization_config") else None
    for key, weight in () if reason else weights:
        kind = type(weight.data)
        if kind is not torch.Tensor or weight.dtype not in PRECISIONS:
            reason = f"{key} is a {kind.__name__} of {weight.dtype}"
            break
    if reason:
        raise ValueError(f"{name} is quantized ({reason}), and cannot be converted: use the original weights")


def with_variant(name: str, variant: str | None) -> str:
    """Name of a weight file with its variant: `model.fp16.safetensors` for `model.safetensors`."""
    if variant is None:
        return name
    start, _, suffix = name.rpartition(".")
    return f"{start}.{variant}.{suffix}"


def file_names(suffix: str, variant: str | None) -> list[tuple[str, str]]:
    """`(weight file, index of its shards)` for every stem; `suffix` is `"safetensors"` or `"bin"`."""
    files = [f"{'pytorch_model' if (stem, suffix) == ('model', 'bin') else stem}.{suffix}" for stem in STEMS]
    return [(with_variant(name, variant), with_variant(f"{name}.index.json", variant)) for name in files]


def shards_of(index: Path, dropped: tuple[str, ...] = ()) -> list[str]:
    """Names of the files that an index of shards lists, all in its own folder.

    Args:
        index: the file, as diffusers and transformers write it.
        dropped: starts of tensor names. A file that holds no other tensors is left out.

    Raises:
        ValueError: the file is not such an index, or it lists files outside of its folder.
    """
    try:
        places = read_json(index)["weight_map"].items()
        names = sorted({shard for tensor, shard in places if not tensor.startswith(dropped)})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not an index of weight files ({type(error).__name__}: {error})") from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{index} names files outside of its folder: {outside[0]!r}")
    return names


def weight_files(
    folder: Path, variant: str | None = None, allow_pickle: bool | None = False, dropped: tuple[str, ...] = ()
) -> list[Path]:
    """The weight files of one model: a single file or the shards of an index; safetensors if present, else pickles.

    Args:
        folder: folder of the model.
        variant: variant of the files, such as `"fp16"`.
        allow_pickle: whether pickles may be read; `None` if they are never read, so that no error suggests it.
        dropped: starts of tensor names that are not needed, as in `shards_of`.

    Raises:
        ValueError: there are no files of this variant and format; the message suggests others that exist.
    """
    for suffix in ("safetensors", "bin") if allow_pickle else ("safetensors",):
        for name, index in file_names(suffix, variant):
            if (folder / name).is_file():
                return [folder / name]
            if (folder / index).is_file():
                return [folder / shard for shard in shards_of(folder / index, dropped)]
    asked = f" of variant {variant!r}" if variant else ""
    wanted = " or ".join(name for name, _ in file_names("safetensors", variant))
    raise ValueError(f"{folder} cannot be read: it holds no weights{asked} ({wanted}){_hint(folder, allow_pickle)}")


def _hint(folder: Path, allow_pickle: bool | None) -> str:
    """The weights that exist instead of the requested ones, and how to request them."""
    pattern = re.compile(rf"(?:{'|'.join(STEMS)})\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")
    matches = (pattern.fullmatch(path.name) for path in folder.glob("*.safetensors"))
    if variants := sorted({match[1] for match in matches if match}):
        return f"; it has another variant: pass variant={' or '.join(map(repr, variants))}"
    if any(folder.glob("*.safetensors")):
        return "; there are safetensors without a variant: leave variant out"
    if allow_pickle is False and any(folder.glob("*.bin")):
        return "; it has no safetensors: pass allow_pickle=True to read pickles (.bin)"
    return ""


def read_state(files: Iterable[Path]) -> State:
    """Read all tensors of a model's weight files, on the CPU.

    Raises:
        ValueError: a file is damaged, or is not a state dict.
    """
    state: State = {}
    for path in files:
        content = read_file(path, allow_pickle=True)
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a state dict but a {type(content).__name__}")
        state |= {name: tensor for name, value in content.items() if (tensor := _tensor(value)) is not None}
    return state


def read_file(path: Path, allow_pickle: bool) -> Any:
    """Read one weight file. A pickle is read with `weights_only=True`, so that none of its code runs.

    Raises:
        ValueError: the file is damaged, or is a pickle without `allow_pickle`.
    """
    if path.suffix != ".safetensors" and not allow_pickle:
        raise ValueError(f"{path.name} is a pickle: pass allow_pickle=True to read it (with weights_only=True)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_harmless_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a state dict: {first_line(error)}") from error


def stored_names(files: Iterable[Path]) -> list[str]:
    """Names of the tensors in weight files; for safetensors, only the headers are read.

    Raises:
        ValueError: a file is damaged or missing.
    """
    names: list[str] = []
    for path in files:
        if path.suffix != ".safetensors":
            names += read_state([path])
            continue
        try:
            with safe_open(path, framework="np") as tensors:
                names += tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    return names


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Number of blocks with parameters in a list of modules: distinct `i` in names `<prefix>.<i>.*`."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


def check_depth(source: Any, said: int, names: Iterable[str], prefix: str) -> None:
    """Check, before anything is built, that a config has as many blocks as the weights.

    Raises:
        ValueError: the numbers differ.
    """
    found = count_blocks(names, prefix)
    if said != found:
        raise ValueError(f"{source} does not fit its weights: {said} blocks in {prefix}, the weights have {found}")


def find_network(content: Any, name: str) -> Network:
    """Find the DiT in the content of a weight file: bare, with a prefix, or in nested dictionaries.

    Args:
        content: a state dict, or dictionaries that hold one, as training scripts save them.
        name: how errors refer to the file.

    Raises:
        ValueError: there is no network, or there are several and not exactly one of them is an average (EMA).
    """
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a DiT state dict but a {type(content).__name__}")
    networks = list(_networks(content))
    if not networks:
        raise ValueError(f"{name} is not a DiT state dict: {ANCHOR} is missing" + _other_names(content))
    averaged = [network for network in networks if "ema" in re.findall("[a-z]+", network.label.lower())]
    candidates = averaged or networks
    if len(candidates) > 1:
        labels = ", ".join(network.label or "(no prefix)" for network in candidates)
        raise ValueError(f"{name} holds several networks ({labels}): pass the state dict of one")
    return candidates[0]


def training_arguments(content: Any) -> dict[str, Any]:
    """The arguments that a training script saved with its weights, under `args`."""
    arguments = content.get("args") if isinstance(content, dict) else None
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    return arguments if isinstance(arguments, dict) else {}


def _networks(content: dict[Any, Any], trail: tuple[str, ...] = ()) -> Iterator[Network]:
    tensors = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): tensor
        for name, value in content.items()
        if isinstance(name, str) and (tensor := _tensor(value)) is not None
    }
    for anchor in tensors:
        if anchor == ANCHOR or anchor.endswith(f".{ANCHOR}"):
            prefix = anchor.removesuffix(ANCHOR)
            state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            label = ".".join([*trail, *prefix.split(".")]).rstrip(".")
            yield Network(state, label, len(tensors) - len(state))
    for name, value in content.items():
        if isinstance(value, dict) and len(trail) < MAX_NESTING:
            yield from _networks(value, (*trail, str(name)))


def _other_names(content: dict[Any, Any]) -> str:
    if any(isinstance(name, str) and "transformer_blocks." in name for name in content):
        return "; the names are those of diffusers: give the folder with the config.json"
    return ""


def _tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.tensor(value)
    return value.detach() if isinstance(value, torch.Tensor) else None


def _harmless_globals() -> list[Any]:
    """Types that training scripts store besides tensors: arguments, numpy arrays and numbers. They run no code."""
    allowed: list[Any] = [argparse.Namespace, np.ndarray, np.dtype]
    allowed += [type(np.dtype(name)) for name in ("bool", "float16", "float32", "float64", "int32", "int64", "uint8")]
    with contextlib.suppress(AttributeError):  # numpy 1 has no `_core`
        for function in (np._core.multiarray._reconstruct, np._core.multiarray.scalar):  # type: ignore[attr-defined]
            allowed += [function, (function, f"numpy.core.multiarray.{function.__name__}")]
    return allowed
