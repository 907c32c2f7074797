"""Outputs that are whole or absent: written to a temporary place, synced to the disk, and renamed; and their readers.

Every output of the package is written by `atomic_file`, `atomic_files` or `atomic_directory`. Each writer works in its
own folder, so that several writers of one output do not interfere: the last complete one wins, and an existing folder
is never overwritten. Permissions follow the umask, whichever library wrote the file.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, Self

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEFTOVER_SECONDS = 24 * 3600
"""Age at which the next writer of an output removes the temporary files of a killed writer."""
MAX_SHOWN = 60
"""Number of characters of a wrong JSON value that an error shows."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_digests: dict[tuple[str, int, int, int], str] = {}
"""Checksums that this process has computed, by path, inode, size and modification time."""


class Record:
    """Base of results that are saved as JSON and rebuilt by `from_dict`."""

    kind: ClassVar[str]
    """How errors refer to such a file."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read the JSON that `save` wrote.

        Raises:
            ValueError: the file cannot be read, or does not hold such a record.
        """
        try:
            content = read_json(path)
            check_types(content, cls)
            return cls.from_dict(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved {cls.kind} ({error})") from error

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Rebuild from the fields that `save` writes."""
        raise NotImplementedError


def as_path(path: str | Path) -> Path:
    """Convert a path given by a user; a leading `~` is their home folder."""
    return Path(os.path.expanduser(path))


def check_writable(path: str | Path) -> Path:
    """Check, before any long work, that a file can be written to `path`, and return `path`.

    Raises:
        ValueError: the folder cannot be created or written to, one of its parents is a file, or `path` is a folder.
    """
    path = as_path(path)
    if path.is_dir():
        raise ValueError(f"output path {path} is a folder: give the path of a file")
    _check_folder(path)
    return path


def check_absent(path: str | Path) -> Path:
    """Check, before any long work, that a folder can be written to `path`, and return `path`.

    Raises:
        ValueError: see `check_writable`; or `path` exists and is not an empty folder, because nothing is overwritten.
    """
    path = as_path(path)
    _check_folder(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output path {path} already exists: choose another, or remove it")
    return path


def check_space(folder: Path, needed: int, what: str, *, name: str = "output folder", hint: str = "") -> None:
    """Check, before any long work, that a disk has enough space.

    Args:
        folder: existing folder to write to.
        needed: bytes needed.
        what: how the error refers to the output that needs the space.
        name: how the error refers to the folder, such as the argument that chose it.
        hint: end of the error message, such as another solution.

    Raises:
        ValueError: the disk has less than `needed` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        has = f"{name} {folder} has {free / 1e9:.2f} GB free"
        raise ValueError(f"{has}, but {needed / 1e9:.2f} GB is needed for {what}{hint}")


@contextmanager
def reserved_space(
    folder: str | Path, num_bytes: int, what: str, *, name: str = "output folder"
) -> Iterator[Callable[[int], None]]:
    """Reserve space on the disk of `folder` while the block runs, so that its result can be written afterwards.

    Yields a function that gives some bytes back before the end. An unnamed file holds the space and vanishes with the
    process. If the system cannot reserve space, it is only checked.

    Raises:
        ValueError: the disk has less than `num_bytes` free.
    """
    check_space(as_path(folder), num_bytes, what, name=name)
    with tempfile.TemporaryFile(dir=as_path(folder)) as held:
        allocate(held, num_bytes)

        def give_back(some: int) -> None:
            held.truncate(max(0, os.fstat(held.fileno()).st_size - some))

        try:
            yield give_back
        finally:
            held.truncate(0)  # a process forked in the meantime may still hold the file open


def allocate(file: IO[bytes], num_bytes: int) -> None:
    """Reserve disk space for the first bytes of an open file, if the system supports it."""
    if not num_bytes or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path for the block to write. It is renamed to `path` on success and removed on failure.

    Raises:
        OSError: the disk is full. The message names `path`, which keeps its old content.
    """
    path = _resolved(check_writable(path))
    with _aside(path.parent, path.name, path) as folder:
        yield folder / path.name
        settle(folder)
        os.replace(folder / path.name, path)
    _sync_folder(path.parent)


@contextmanager
def atomic_files(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; if the block succeeds, its files move to `folder` together and replace old ones.

    Raises:
        OSError: the disk is full; `folder` keeps its old content.
    """
    folder = _resolved(check_writable(as_path(folder) / "file").parent)
    with _aside(folder, "files", folder) as temporary:
        yield temporary
        settle(temporary)
        with _alone(folder):
            for file in temporary.iterdir():
                os.replace(file, folder / file.name)
    _sync_folder(folder)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder; it becomes `path` if the block succeeds.

    Raises:
        ValueError: `path` exists before or after the block and is not an empty folder; nothing is overwritten.
        OSError: the disk is full.
    """
    path = _resolved(check_absent(path))
    with _aside(path.parent, path.name, path) as folder:
        yield folder
        settle(folder)
        with contextlib.suppress(OSError):
            path.rmdir()  # an empty folder; Windows cannot rename over an existing one
        try:
            os.rename(folder, path)
        except OSError as error:
            if not path.exists():
                raise
            raise ValueError(f"another process has written output path {path}: choose another") from error
    _sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text in UTF-8, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # for undecodable file names
    return as_path(path)


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON, whole or not at all."""
    return write_text(path, json.dumps(content, indent=1))


def read_json(path: str | Path) -> Any:
    """Read JSON from a file in any Unicode encoding.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not JSON.
    """
    return json.loads(as_path(path).read_bytes())


def sealed(record: dict[str, Any], digest: str = "") -> dict[str, Any]:
    """Add a checksum to a record; it covers the record and `digest`, the checksum of the values that it describes."""
    text = digest + json.dumps(record, sort_keys=True)
    return record | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_once(path: Path, compute: Callable[[], str]) -> str:
    """The checksum of a file from `compute()`, called once per process and state of the file."""
    status = path.stat()
    state = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
    if state not in _digests:
        _digests[state] = compute()
    return _digests[state]


@contextmanager
def disk_errors(target: Any) -> Iterator[None]:
    """Turn a full disk into one `OSError` that names `target`, whichever library was writing it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in NO_ROOM:
            raise
        raise OSError(
            f"{target} could not be written ({os.strerror(number)}): free some space, or choose another path; "
            "no partial output is left"
        ) from error


def settle(folder: Path) -> None:
    """Give everything in a folder the permissions that the umask gave the folder, and sync it to the disk."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            path.chmod(mode)
            _sync_folder(path)
        else:
            path.chmod(mode & 0o666)
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _check_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"output path {path} is not writable ({error.strerror or error})") from error


def _resolved(path: Path) -> Path:
    """Resolve links, so that a link itself is never replaced."""
    return Path(os.path.realpath(path))


@contextmanager
def _aside(parent: Path, name: str, target: Path) -> Iterator[Path]:
    """Yield a new empty folder in `parent`; it is always removed at the end."""
    prefix = f".{name[:50]}."
    _remove_leftovers(parent, prefix)
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix=prefix, suffix=".partial", ignore_cleanup_errors=True) as outer,
        disk_errors(target),
    ):
        folder = Path(outer) / "content"
        folder.mkdir()  # unlike `outer`, it follows the umask
        yield folder


def _remove_leftovers(parent: Path, prefix: str) -> None:
    for leftover in parent.glob(f"{glob.escape(prefix)}*.partial"):
        with contextlib.suppress(OSError):  # its writer may be removing it
            last_change = max(path.stat().st_mtime for path in [leftover, *leftover.rglob("*")])
            if time.time() - last_change > LEFTOVER_SECONDS:
                shutil.rmtree(leftover)


def _sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk, if the system supports it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock `folder`, if the system can, so that sets of files renamed into it never mix."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_types(content: Any, kind: Any) -> None:
    """Check that JSON content has a type.

    Args:
        content: the result of `json.loads`.
        kind: a dataclass, a `TypedDict`, or any other type; extra fields are allowed.

    Raises:
        ValueError: a field is missing or has another type; the message names the field and shows its value.
    """
    try:
        TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        field = ".".join(map(str, wrong["loc"])) or "the file"
        if wrong["type"] == "missing":
            raise ValueError(f"field {field} is missing") from error
        found = repr(wrong["input"])
        shown = found if len(found) <= MAX_SHOWN else found[:MAX_SHOWN] + "..."
        reason = wrong["msg"].removeprefix("Input ").removeprefix("Value error, ")
        raise ValueError(f"{field}: {reason}, got {shown}") from error
