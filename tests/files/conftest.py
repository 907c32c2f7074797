"""What the tests of files share: a disk that is small, and other processes that write at the same time."""

from __future__ import annotations

import multiprocessing
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(num_bytes)`: a folder on a file system of its own; skips where mounting is refused."""
    mounted: list[Path] = []

    def mount(num_bytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs the right to mount a small file system ({error})")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


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
