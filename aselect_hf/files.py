"""Outputs that are whole or absent: everything is written under a temporary name, then renamed; and read back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from aselect_hf.json_types import check_types


class Record:
    """Base of what is saved as JSON and rebuilt by `from_dict`."""

    kind: ClassVar[str]
    """What such a file is, for errors."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the JSON that `save` wrote.

        Raises:
            ValueError: not such a file.
        """
        try:
            content = json.loads(Path(path).read_text())
            check_types(content, cls)
            return cls.from_dict(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved {cls.kind} ({error})") from error

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Rebuild from the fields that `save` writes."""
        raise NotImplementedError


def check_writable(path: str | Path) -> Path:
    """Return `path` after making sure, before any long work, that it can be created.

    Raises:
        ValueError: its folder cannot be created or written to, or a file stands where a folder should.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"output path {path} is not writable ({error.strerror or error})") from error
    return path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it becomes `path` if the block succeeds and is removed if it does not."""
    path = check_writable(path)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder inside `folder`; if the block succeeds, its files move there, replacing old ones."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".final-") as temporary:
        yield Path(temporary)
        for file in Path(temporary).iterdir():
            os.replace(file, Path(folder) / file.name)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; it becomes `path` if the block succeeds.

    Raises:
        ValueError: `path` exists and is not an empty folder: nothing is ever overwritten.
    """
    path = check_writable(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output path {path} exists already: choose another, or remove it")
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def expand_home(arguments: Iterable[str]) -> list[str]:
    """Command-line arguments with `~` expanded, also in `--option=~/folder`, where a shell leaves it as it is."""
    expanded = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        expanded.append(option + equals + os.path.expanduser(value))
    return expanded
