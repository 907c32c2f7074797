"""Small WebDataset tars for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_tars(folder: Path, counts: list[int], start: str = "part", labels: bool = True) -> Path:
    """Tars `part-0.tar`, ... of so many gray pictures each; picture n has the value n and the label n % 2."""
    folder.mkdir(exist_ok=True, parents=True)
    number = 0
    for index, count in enumerate(counts):
        with tarfile.open(folder / f"{start}-{index}.tar", "w") as tar:
            for _ in range(count):
                content = io.BytesIO()
                Image.fromarray(np.full((8, 8), number, np.uint8)).save(content, "PNG")
                _add(tar, f"{number:04d}.png", content.getvalue())
                if labels:
                    _add(tar, f"{number:04d}.cls", str(number % 2).encode())
                number += 1
    return folder


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
