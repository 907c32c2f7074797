"""The file that holds the features at one timestep. It grows image by image, and is marked while it is unfinished."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from aselect_hf.files import allocate, digest_once, read_json, sealed, sha256_of, write_json

logger = logging.get_logger(__name__)

VALUES = np.dtype("<f4")
CHUNK = 2**24  # bytes read at once
RECORD_BYTES = 2**14
"""Space reserved for the JSON files beside the values."""


@dataclass
class FeatureFile:
    """Features at one timestep: `t00000.npy`, and `t00000.json` with the seconds they took and their checksum."""

    path: Path
    timestep: int
    shape: tuple[int, int]

    @property
    def record(self) -> Path:
        return self.path.with_suffix(".json")

    def bytes_missing(self) -> int:
        """At most how many bytes are not on the disk yet."""
        there = self.path.with_suffix(".partial.npy")
        found = there.stat().st_size if there.exists() else 0
        return max(0, VALUES.itemsize * self.shape[0] * self.shape[1] - found) + 2 * RECORD_BYTES

    def is_whole(self) -> bool:
        """Whether the file exists and matches its checksum; a damaged file is reported and removed."""
        try:
            record = read_json(self.record)
            digest = digest_once(self.path, lambda: sha256_of(self.path))
            if record == sealed({"seconds": float(record["seconds"])}, digest):
                return True
            problem = "its content does not match its checksum"
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"its record {self.record.name} is unreadable: {error!r}"
        logger.warning("%s is damaged (%s): computing it again", self.path, problem)
        self.record.unlink()
        self.path.unlink(missing_ok=True)
        return False


class GrowingFile:
    """An unfinished feature file. Rows are appended; marks record how many images are finished, with a checksum.

    Args:
        file: the file that this one becomes.
        first_rows: see `KeptRows`.

    Attributes:
        images: number of finished images, earlier runs included.
        seconds: time that they took.
    """

    def __init__(self, file: FeatureFile, first_rows: np.ndarray) -> None:
        self.file, self.first_rows, self.timestep = file, first_rows, file.timestep
        self.path, self.mark_path = (file.path.with_suffix(f".partial.{suffix}") for suffix in ("npy", "json"))
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": VALUES.str, "fortran_order": False, "shape": file.shape})
        self.header = header.getvalue()
        self.images, self.seconds = self._found()

    @property
    def bytes_missing(self) -> int:
        return self._size(len(self.first_rows) - 1) - self._size(self.images) + RECORD_BYTES

    def start(self, images: int) -> None:
        """Open the file after its first `images` images, and reserve space for all others."""
        self.images, self.digest = images, self._digest(images)
        self.path.touch()
        self.stream = self.path.open("rb+")
        self.stream.truncate(self._size(images) if images else 0)
        allocate(self.stream, self._size(images) + self.bytes_missing)
        self.stream.write(self.header)
        self.stream.seek(self._size(images))

    def append(self, rows: np.ndarray, num_images: int) -> None:
        """Append the rows of the next images."""
        first, last = self.first_rows[[self.images, self.images + num_images]]
        assert len(rows) == last - first
        content = np.ascontiguousarray(rows, dtype=VALUES).tobytes()
        self.stream.write(content)
        self.digest.update(content)
        self.images += num_images

    def mark(self) -> None:
        """Let a later run continue from here, or from the previous mark if the disk is full."""
        self._sync()
        record = {"images": self.images, "seconds": self.seconds}
        with contextlib.suppress(OSError):
            write_json(self.mark_path, sealed(record, self.digest.hexdigest()))

    def finish(self) -> None:
        """Turn the file into a finished one, after the last image."""
        self.stream.truncate()  # frees the space reserved for the record
        self.mark()
        self.stream.close()
        write_json(self.file.record, sealed({"seconds": self.seconds}, self.digest.hexdigest()))
        os.replace(self.path, self.file.path)
        self.mark_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file. If it is unfinished, mark its progress and free the space reserved for the rest."""
        if self.stream.closed:
            return
        with self.stream, contextlib.suppress(OSError):
            self.stream.truncate(self._size(self.images))
            self.mark()
        if not self.images:
            self.path.unlink()
            self.mark_path.unlink(missing_ok=True)

    def _found(self) -> tuple[int, float]:
        """Images and seconds of an earlier run; a damaged file is reported and removed."""
        try:
            record = read_json(self.mark_path)
            images, seconds = int(record["images"]), float(record["seconds"])
            if record == sealed({"images": images, "seconds": seconds}, self._digest(images).hexdigest()):
                os.truncate(self.path, self._size(images))  # frees the space reserved for the others
                return images, seconds
            problem = "its content does not match its checksum"
        except FileNotFoundError:
            problem = ""
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            problem = f"{self.mark_path.name} is unreadable: {error!r}"
        if problem:
            logger.warning("%s is damaged (%s): computing it again", self.path, problem)
        self.mark_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        return 0, 0.0

    def _size(self, images: int) -> int:
        """Size in bytes of the file with its first `images` images."""
        return len(self.header) + VALUES.itemsize * self.file.shape[1] * int(self.first_rows[images])

    def _digest(self, images: int) -> Any:
        """Running checksum of the file's first `images` images."""
        digest = hashlib.sha256(self.header)
        if images:
            with self.path.open("rb") as file:
                file.seek(len(self.header))
                left = self._size(images) - len(self.header)
                while left and (content := file.read(min(left, CHUNK))):
                    digest.update(content)
                    left -= len(content)
        return digest

    def _sync(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
