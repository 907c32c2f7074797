"""Values of every image on disk, in shards that any number of processes fill together.

A folder holds one safetensors file per content and shard of consecutive images: the values, the seconds that they took,
and a checksum of both. Files are whole or absent, and are read through memory maps.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.utils import logging

from aselect_hf.data.fingerprint import tensor_bytes
from aselect_hf.data.processes import processes
from aselect_hf.files import atomic_file, check_writable, digest_once, disk_errors, reserved_space

logger = logging.get_logger(__name__)

Compute = Callable[[int, list[str]], Iterator[tuple[dict[str, torch.Tensor], float]]]
"""Computes contents of a shard: yields values by content, as soon as they are complete, and the seconds they took."""

FILE_BYTES = 2**14
"""Room that a file needs besides its values, while it is written."""


@dataclass(eq=False)
class ShardStore:
    """A folder of shards.

    Args:
        folder: where they lie.
        num_images: number of images.
        contents: names of what is stored of every image.
        shard_size: images per shard.
        dtype: dtype on disk.
        seconds: time that computing took, summed over all processes, earlier runs included; known after `fill`.
    """

    folder: Path
    num_images: int
    contents: tuple[str, ...]
    shard_size: int
    dtype: torch.dtype
    seconds: float = field(default=0.0, kw_only=True)

    what: ClassVar[str]
    """How errors refer to the values."""

    def shard_shape(self, shard: int) -> tuple[int, ...]:
        """Shape of each content of a shard."""
        raise NotImplementedError

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def shard_file(self, content: str, shard: int) -> Path:
        return self.folder / f"{content}-{shard:05d}.safetensors"

    def shard_images(self, shard: int) -> range:
        """Indices of a shard's images."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def open_shard(self, content: str, shard: int) -> tuple[torch.Tensor, dict[str, str]]:
        """Memory map and metadata of a file, after cheap checks of header, file size, shape and dtype."""
        with safe_open(self.shard_file(content, shard), framework="pt") as file:
            values, metadata = file.get_tensor("values"), file.metadata() or {}
        expected = self.shard_shape(shard)
        if (tuple(values.shape), values.dtype) != (expected, self.dtype):
            raise ValueError(f"it holds {values.dtype} {tuple(values.shape)}, not {self.dtype} {expected}")
        return values, metadata

    def verify_shard(self, content: str, shard: int) -> float:
        """Seconds that a file took, after all checks; the checksum is computed once per process and file."""
        values, metadata = self.open_shard(content, shard)
        seconds = metadata.get("seconds", "")
        if digest_once(self.shard_file(content, shard), lambda: _checksum(values, seconds)) != metadata.get("sha256"):
            raise ValueError("its content does not match its checksum")
        return float(seconds)

    def missing(self, shard: int, warn: bool = False) -> list[str]:
        """Contents of a shard that are absent or damaged."""
        missing = []
        for content in self.contents:
            try:
                self.verify_shard(content, shard)
            except FileNotFoundError:
                missing.append(content)
            except (SafetensorError, ValueError, OSError) as error:
                missing.append(content)
                if warn:
                    logger.warning("%s is damaged (%s): computing it again", self.shard_file(content, shard), error)
        return missing

    @contextmanager
    def progress_bar(self, name: str, shown: bool, steps: int = 1, unit: str = "image") -> Iterator[tqdm]:
        """A bar over the images that are not whole yet; none if all are, or unless `shown`.

        Args:
            steps: steps of the bar per image.
        """
        left = sum(len(self.shard_images(shard)) for shard in range(self.num_shards) if self.missing(shard))
        total, done = steps * self.num_images, steps * (self.num_images - left)
        with tqdm(total=total, initial=done, desc=name, unit=unit, disable=not (shown and left)) as bar:
            yield bar
            bar.update(total - bar.n)  # what other processes have done

    def fill(self, compute: Compute) -> None:
        """Compute what is missing, together with other processes that do the same; return when all shards are whole.

        A killed run leaves whole files, and the next run computes the rest. Space for all files is reserved first.

        Raises:
            ValueError: the folder is not writable or has too little space left.
        """
        missing = {shard: contents for shard in range(self.num_shards) if (contents := self.missing(shard))}
        if missing:
            self._fill(missing, compute)
        self.seconds = sum(
            self.verify_shard(content, each) for content in self.contents for each in range(self.num_shards)
        )

    def _fill(self, missing: dict[int, list[str]], compute: Compute) -> None:
        check_writable(self.folder / "locks" / "lock")
        needed = sum(len(contents) * self._shard_bytes(shard) for shard, contents in missing.items())
        with (
            disk_errors(self.folder),
            reserved_space(
                self.folder.parent, needed // processes().count, f"these {self.what}", name="cache_dir"
            ) as give_back,
        ):

            def finish(shard: int) -> None:
                if contents := self.missing(shard, warn=True):
                    self._remove_leftovers(shard, contents)
                    for values, seconds in compute(shard, contents):
                        give_back(len(values) * self._shard_bytes(shard))
                        for content, tensor in values.items():
                            self._write(content, shard, tensor, seconds / len(values))

            take_turns(missing, self._lock, finish)

    def _write(self, content: str, shard: int, values: torch.Tensor, seconds: float) -> None:
        text = f"{seconds:.6f}"
        with atomic_file(self.shard_file(content, shard)) as temporary:
            save_file({"values": values}, temporary, {"sha256": _checksum(values, text), "seconds": text})

    def _remove_leftovers(self, shard: int, contents: list[str]) -> None:
        """Remove the temporary files of killed writers; the lock is held."""
        for content in contents:
            for leftover in self.folder.glob(f".{self.shard_file(content, shard).name}*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _lock(self, shard: int, timeout: float) -> FileLock:
        return FileLock(self.folder / "locks" / f"{shard:05d}.lock", timeout=timeout)

    def _shard_bytes(self, shard: int) -> int:
        """Room that one content of a shard needs."""
        return torch.Size(self.shard_shape(shard)).numel() * self.dtype.itemsize + FILE_BYTES


def take_turns(shards: Iterable[int], lock: Callable[[int, float], FileLock], finish: Callable[[int], None]) -> None:
    """Finish every shard under its lock, together with other processes that do the same.

    Processes begin with shards of their own. First come the shards that nobody works on; then this waits for the
    others, or takes over from killed processes.

    Args:
        lock: the lock of a shard, with the seconds to wait for it; -1 is without a limit.
        finish: computes a shard unless it is whole by now.
    """
    here = processes()
    waiting = sorted(shards, key=lambda shard: (shard - here.index) % here.count)
    for timeout in (0, -1):
        for shard in list(waiting):
            try:
                with lock(shard, timeout):
                    finish(shard)
            except Timeout:
                continue
            waiting.remove(shard)


def _checksum(values: torch.Tensor, seconds: str) -> str:
    digest = hashlib.sha256(tensor_bytes(values))
    digest.update(seconds.encode())
    return digest.hexdigest()
