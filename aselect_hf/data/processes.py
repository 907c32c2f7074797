"""Work shared by the processes that a launcher started: who does what, and how results come together.

`accelerate launch`, `torchrun` and `srun` start the same command several times; `join_processes` connects them. Inside
`shared_work()`, sweeps divide their images over all of them. A process never waits for another inside of a collective,
which would end after the collective's timeout: it first waits at a meeting point on the launcher's key-value store, as
long as the others live. A process that gives no sign of life for a minute ends the others in one error.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import PrefixStore, TCPStore

ARRIVAL_SECONDS = 600.0
"""How long processes wait for each other at the start."""
BEAT_SECONDS = 5.0
"""Time between two signs of life."""
SILENCE_SECONDS = 60.0
"""A process without a sign of life for so long counts as lost."""
POLL_SECONDS = 0.05

Value = TypeVar("Value")
Run = Callable[[Iterable[Callable[[], Any]]], Iterable[Any]]


def join_processes() -> PartialState:
    """Connect to the other processes of the launcher, if there are any, and return this process's state.

    Only the first process on each machine shows this package's warnings, which are the same on all of them.

    Raises:
        TimeoutError: another process did not arrive within 10 minutes.
    """
    no_accelerator = not (torch.accelerator.is_available() and torch.accelerator.device_count())
    cpu = no_accelerator or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    options = {"timeout": timedelta(seconds=ARRIVAL_SECONDS)} if launched() else {}
    try:
        state = PartialState(cpu=cpu, **options)
    except torch.distributed.DistStoreError as error:
        raise TimeoutError(
            f"not all of {os.environ['WORLD_SIZE']} processes arrived within {ARRIVAL_SECONDS:.0f} s at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: see whether all were started, and "
            f"whether they reach this address ({str(error).splitlines()[0]})"
        ) from error
    if not state.is_local_main_process:
        logging.getLogger("aselect_hf").setLevel(logging.ERROR)
    atexit.register(state.destroy_process_group)
    return state


def launched() -> bool:
    """Whether a launcher started several processes of this command."""
    return {"LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys() and int(os.environ["WORLD_SIZE"]) > 1


def map_calls(calls: Iterable[Callable[[], Value]]) -> Iterator[Value]:
    """The results of calls, one after another."""
    return (call() for call in calls)


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work.

    Args:
        index: its number, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.index == 0

    def block(self, num_images: int, batch_size: int) -> range:
        """The images of this process: whole batches in a row, so that every batch is that of a single process."""
        batches = -(-num_images // batch_size)
        first, last = (-(-batches * each // self.count) * batch_size for each in (self.index, self.index + 1))
        return range(min(first, num_images), min(last, num_images))

    def every(self, num_images: int) -> range:
        """The images of this process, as every `count`-th one."""
        return range(self.index, num_images, self.count)

    def spread(self, calls: Sequence[Callable[[], Value]], run: Run = map_calls) -> list[Value]:
        """The results of calls, of which each process does every `count`-th one.

        Args:
            run: does this process's calls, in order.
        """
        parts = self.gather([*run(calls[self.index :: self.count])])
        return [parts[number % self.count][number // self.count] for number in range(len(calls))]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order of their numbers.

        Raises:
            TimeoutError: a process ended, or gave no sign of life for a minute.
        """
        if self.count == 1:
            return [value]
        _board().meet(self)
        return gather_object([value])


_SHARED: ContextVar[Processes | None] = ContextVar("shared_work", default=None)


def processes() -> Processes:
    """The processes that share the work here: one outside of `shared_work`."""
    return _SHARED.get() or Processes()


@contextmanager
def shared_work() -> Iterator[Processes]:
    """In the block, sweeps are shared by all processes; every process must run the same ones, in the same order.

    The processes leave the block together, so that none misses one that holds the launcher's store.
    """
    found = Processes()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found = Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    token = _SHARED.set(found)
    try:
        if found.count > 1:
            _board()  # gives the first sign of life
        yield found
        found.gather(None)
    finally:
        _SHARED.reset(token)


class _Board:
    """Meeting points and signs of life on the launcher's key-value store."""

    def __init__(self) -> None:
        self.store, self.numbers = _connect(), itertools.count()
        threading.Thread(target=self._beat, daemon=True, name="sign of life").start()

    def meet(self, here: Processes) -> None:
        """Wait until all processes are here."""
        number = next(self.numbers)
        self.store.set(f"meeting {number}: {here.index}", "")
        for other in range(here.count):
            heard, since = b"", time.monotonic()
            while not self._has(f"meeting {number}: {other}"):
                sign = self.store.get(f"sign: {other}") if self._has(f"sign: {other}") else b""
                if sign != heard:
                    heard, since = sign, time.monotonic()
                elif time.monotonic() - since > SILENCE_SECONDS:
                    raise TimeoutError(
                        f"process {other} of {here.count} (from 0) ended or gave no sign of life for "
                        f"{SILENCE_SECONDS:.0f} s: see its own messages; finished work is kept, run the same command "
                        "to continue"
                    )
                time.sleep(POLL_SECONDS)

    def _has(self, key: str) -> bool:
        return bool(self.store.check([key]))

    def _beat(self) -> None:
        store, rank = _connect(), torch.distributed.get_rank()
        with contextlib.suppress(RuntimeError):  # the store is gone: all processes are about to end
            for count in itertools.count():
                store.set(f"sign: {rank}", str(count))
                time.sleep(BEAT_SECONDS)


@cache
def _board() -> _Board:
    return _Board()


def _connect() -> PrefixStore:
    """A connection of its own to the launcher's store; a restarted launch has keys of its own."""
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return PrefixStore(f"aselect {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
