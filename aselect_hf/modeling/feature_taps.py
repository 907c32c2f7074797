"""Features of a network of another library, by hooks that stay for its whole life and record only when asked to.

Every thread has its own collector, so that requests which run at the same time on one model do not see each other's.
Since the hooks are registered once, `torch.compile` can trace them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .family import Tap


class StopForwardError(Exception):
    """The last feature that was asked for has been read."""


class Collector:
    """What one run is to read, and what it has read.

    Args:
        names: of the features.
        tokens: number of image tokens.
        stop: whether to raise `StopForwardError` after the last one.
    """

    def __init__(self, names: Sequence[str], tokens: int, stop: bool) -> None:
        self.missing = set(names)
        self.tokens = tokens
        self.stop = stop
        self.found: dict[str, torch.Tensor] = {}

    def record(self, name: str, tap: Tap, value: Any) -> None:
        if name not in self.missing:
            return
        tensor = value if tap.item is None else value[tap.item]
        if tap.part is not None:
            index, count = tap.part
            tensor = tensor.chunk(count, dim=-1)[index]
        if tap.joint:
            tensor = tensor[:, : self.tokens] if tap.joint == "first" else tensor[:, -self.tokens :]
        self.found[name] = tensor.flatten(2).transpose(1, 2) if tap.map else tensor
        self.missing.discard(name)
        if self.stop and not self.missing:
            raise StopForwardError


_STATE = threading.local()


def _before(name: str, tap: Tap, module: nn.Module, arguments: tuple) -> None:
    collector = getattr(_STATE, "collector", None)
    if collector is not None:
        collector.record(name, tap, arguments[0])


def _after(name: str, tap: Tap, module: nn.Module, arguments: tuple, output: Any) -> None:
    collector = getattr(_STATE, "collector", None)
    if collector is not None:
        collector.record(name, tap, output)


def register(block: nn.Module, name: str, tap: Tap) -> None:
    """Let a feature of a block be read, for as long as the block lives."""
    module = block.get_submodule(tap.path)
    if tap.side == "in":
        module.register_forward_pre_hook(functools.partial(_before, name, tap))
    else:
        module.register_forward_hook(functools.partial(_after, name, tap))


def unregister(module: nn.Module, name: str) -> None:
    """Undo `register` on a module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, functools.partial) and hook.func in (_before, _after) and hook.args[0] == name:
                del hooks[key]


@contextmanager
def collecting(collector: Collector) -> Iterator[None]:
    """Record what this thread runs."""
    before = getattr(_STATE, "collector", None)
    _STATE.collector = collector
    try:
        yield
    finally:
        _STATE.collector = before


__all__ = ["Collector", "StopForwardError", "collecting", "register"]
