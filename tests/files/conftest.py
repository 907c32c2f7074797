"""What the tests of files share: a full disk, and other processes that write at the same time."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def fill() -> Callable[[Path], None]:
    """`fill(folder)`: a file `filler` there takes all the room that is left."""

    def write(folder: Path) -> None:
        with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    return write


@pytest.fixture
def run_together() -> Callable[..., list[int]]:
    """`run_together(function, *arguments)`: one process for each tuple of arguments, at once; their exit codes."""

    def run(function: Callable[..., Any], *arguments: tuple[Any, ...]) -> list[int]:
        start = FORK.Barrier(len(arguments))
        processes = [FORK.Process(target=_after, args=(start, function, each)) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert not any(process.is_alive() for process in processes)
        return [process.exitcode for process in processes]

    return run


def _after(start: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    start.wait(60)
    function(*arguments)
