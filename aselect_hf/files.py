"""Outputs that are whole or absent: written aside, through to the disk, then renamed; and how they are read back.

Every output of the package is written by `atomic_file`, `atomic_files` or `atomic_directory`. Each writer works in a
folder of its own, so that several writers of one output never meet: the last complete one wins, and a folder that
stands already is never overwritten. Permissions are those of the umask, whatever library wrote the file.
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
"""Age at which the next writer of an output removes what a killed one has left of it."""
MAX_SHOWN = 60
"""Characters of a wrong JSON value that an error shows."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_digests: dict[tuple[str, int, int, int], str] = {}
"""Checksums that this process has computed, by path, inode, size and time of writing."""


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
    """A path as a user gives it: a leading `~` is their home folder."""
    return Path(os.path.expanduser(path))


def check_writable(path: str | Path) -> Path:
    """Return `path` after making sure, before any long work, that a file can be written there.

    Raises:
        ValueError: its folder cannot be created or written to, a file stands where a folder should, or a folder where
            the file should.
    """
    path = as_path(path)
    if path.is_dir():
        raise ValueError(f"output path {path} is a folder: give the name of a file")
    _check_folder(path)
    return path


def check_absent(path: str | Path) -> Path:
    """Return `path` after making sure, before any long work, that a folder can be written there.

    Raises:
        ValueError: as `check_writable`; or `path` exists and is not an empty folder: nothing is ever overwritten.
    """
    path = as_path(path)
    _check_folder(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"output path {path} exists already: choose another, or remove it")
    return path


def check_space(folder: Path, needed: int, what: str, *, name: str = "output folder", hint: str = "") -> None:
    """Make sure, before any long work, that there is room for it.

    Args:
        folder: where; it must exist.
        needed: bytes.
        what: needs them, in the plural.
        name: of the argument that chose the folder.
        hint: another way out.

    Raises:
        ValueError: there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{name} {folder} has {free / 1e9:.2f} GB free, {what} need {needed / 1e9:.2f} GB{hint}")


@contextmanager
def reserved_space(folder: str | Path, num_bytes: int, what: str) -> Iterator[None]:
    """Keep room on the disk of `folder` while the block works, so that its result can be written when it is done.

    The room is held by a file without a name, which goes with the process. Where the system cannot reserve room, it is
    only checked.

    Raises:
        ValueError: there is less.
    """
    check_space(as_path(folder), num_bytes, what)
    with tempfile.TemporaryFile(dir=as_path(folder)) as held:
        allocate(held, num_bytes)
        try:
            yield
        finally:
            held.truncate(0)  # a process forked meanwhile may still hold the file open


def allocate(file: IO[bytes], num_bytes: int) -> None:
    """Reserve the first bytes of an open file on the disk, where the system can."""
    if not num_bytes or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name; what the block writes there becomes `path` if it succeeds, and goes if it does not.

    Raises:
        OSError: there is no room; the message names `path`, and what stood there before stays.
    """
    path = _resolved(check_writable(path))
    with _aside(path.parent, path.name, path) as folder:
        yield folder / path.name
        settle(folder)
        os.replace(folder / path.name, path)
    _sync_folder(path.parent)


@contextmanager
def atomic_files(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; if the block succeeds, its files move to `folder` together, replacing old ones.

    Raises:
        OSError: there is no room; what stood in `folder` before stays.
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
        ValueError: `path` exists and is not an empty folder, before the block or after it: nothing is ever overwritten.
        OSError: there is no room.
    """
    path = _resolved(check_absent(path))
    with _aside(path.parent, path.name, path) as folder:
        yield folder
        settle(folder)
        with contextlib.suppress(OSError):
            path.rmdir()  # an empty folder; Windows renames to no folder that exists
        try:
            os.rename(folder, path)
        except OSError as error:
            if not path.exists():
                raise
            raise ValueError(f"output path {path} was written by another process meanwhile: choose another") from error
    _sync_folder(path.parent)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text in UTF-8, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # of a file's name that is no text
    return as_path(path)


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON, whole or not at all."""
    return write_text(path, json.dumps(content, indent=1))


def read_json(path: str | Path) -> Any:
    """JSON of a file in any Unicode encoding.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON.
    """
    return json.loads(as_path(path).read_bytes())


def sealed(record: dict[str, Any], digest: str = "") -> dict[str, Any]:
    """A record with the checksum of itself and, by their `digest`, of the values that it stands beside."""
    text = digest + json.dumps(record, sort_keys=True)
    return record | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def sha256_of(path: Path) -> str:
    """Checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_once(path: Path, compute: Callable[[], str]) -> str:
    """The checksum of a file that `compute()` gives, once per process and state of the file."""
    status = path.stat()
    state = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
    if state not in _digests:
        _digests[state] = compute()
    return _digests[state]


@contextmanager
def disk_errors(target: Any) -> Iterator[None]:
    """A full disk while `target` is written is one `OSError` that names it, whichever library met it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number not in NO_ROOM:
            raise
        raise OSError(
            f"{target} could not be written ({os.strerror(number)}): free some space, or choose another place; "
            "nothing is left half-written"
        ) from error


def settle(folder: Path) -> None:
    """Give everything in a folder the permissions that the umask gave the folder, and write it through to the disk."""
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
    """Where a link leads: the link itself is never replaced."""
    return Path(os.path.realpath(path))


@contextmanager
def _aside(parent: Path, name: str, target: Path) -> Iterator[Path]:
    """Yield an empty folder in `parent` that nobody else uses; it is removed at the end, whatever happened."""
    prefix = f".{name[:50]}."
    _remove_leftovers(parent, prefix)
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix=prefix, suffix=".partial", ignore_cleanup_errors=True) as outer,
        disk_errors(target),
    ):
        folder = Path(outer) / "content"
        folder.mkdir()  # unlike `outer`, with the permissions of the umask
        yield folder


def _remove_leftovers(parent: Path, prefix: str) -> None:
    for leftover in parent.glob(f"{glob.escape(prefix)}*.partial"):
        with contextlib.suppress(OSError):  # its writer may just remove it
            last_change = max(path.stat().st_mtime for path in [leftover, *leftover.rglob("*")])
            if time.time() - last_change > LEFTOVER_SECONDS:
                shutil.rmtree(leftover)


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder through to the disk, where the system can."""
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
    """Be the only one who renames files into `folder`, where the system locks folders: sets of files never mix."""
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
    """Compare JSON with a type.

    Args:
        content: as `json.loads` returns it.
        kind: a dataclass, a `TypedDict`, or any other type; further fields are allowed.

    Raises:
        ValueError: a field is missing or has another type: which, and what it holds.
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
