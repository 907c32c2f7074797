"""Checkpoints that are complete or absent: saved atomically, and verified against a manifest before use."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from aselect_hf.files import as_path, read_json, settle, sha256_of, write_json

MANIFEST_FILE = "manifest.json"
MOVED = ".old.partial"

# On a full disk the system raises OSError, torch.save RuntimeError, and safetensors SafetensorError.
_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class Checkpoints:
    """The last `total_limit` folders `checkpoint-<step>` of an output folder. Call its methods on all processes."""

    def __init__(self, folder: Path, total_limit: int, accelerator: Accelerator) -> None:
        self.folder, self.total_limit, self.accelerator = folder, total_limit, accelerator

    def save(self, step: int, fill: Callable[[Path], None]) -> None:
        """Let every process `fill` a temporary folder, then rename it to `checkpoint-<step>`.

        Raises:
            OSError: the disk is full, or the folder cannot be written. The partial checkpoint is removed.
        """
        target, temporary = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.partial"
        main = self.accelerator.is_main_process

        def start() -> None:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        def finish() -> None:
            if main:
                _write_manifest(temporary)
                settle(temporary)
                _replace_folder(temporary, target)
                for old in by_age(self.folder)[: -self.total_limit]:
                    shutil.rmtree(old)

        for action in (start, lambda: fill(temporary), finish):
            self._together(action, target.name, temporary)

    def find(self, wanted: str | None) -> Path | None:
        """The checkpoint to resume from; `None` to start from the beginning.

        Args:
            wanted: a checkpoint's folder; `"latest"` for the newest complete one, if any; or `None`.

        Raises:
            ValueError: `wanted` is damaged or absent, or it is `None` although there are checkpoints of an earlier run.
        """
        found: list[Path | str | None] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = self._find(wanted)
            except ValueError as error:
                found[1] = str(error)
        path, message = broadcast_object_list(found)
        if message is not None:
            raise ValueError(message)
        return path

    def remove_leftovers(self) -> None:
        """Delete unfinished checkpoints of killed runs, and restore those that were being replaced."""
        if self.accelerator.is_main_process:
            for moved in self.folder.glob(f".checkpoint-*{MOVED}"):
                target = self.folder / moved.name[1:].removesuffix(MOVED)
                if not target.exists():
                    os.replace(moved, target)
            for leftover in self.folder.glob(".checkpoint-*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _find(self, wanted: str | None) -> Path | None:
        if wanted == "latest":
            return newest_whole(self.folder, warn=True)
        check_resume(self.folder, wanted)
        return None if wanted is None else as_path(wanted)

    def _together(self, action: Callable[[], None], name: str, temporary: Path) -> None:
        """Run an action on every process. If it fails on one, fail on all, so that none waits for the others."""
        failure = None
        try:
            action()
        except _WRITE_ERRORS as error:
            failure = error
            self.accelerator.set_trigger()
        if not self.accelerator.check_trigger():
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = str(failure).strip().splitlines()[0] if failure else "another process failed"
        whole = newest_whole(self.folder)
        good = f"the last good one is {whole}" if whole else "there is no earlier one"
        raise OSError(f"{name} could not be saved ({reason}), training ends; {good}") from failure


def check_resume(folder: Path, wanted: str | None) -> None:
    """Check what a run that is to resume from `wanted` would find, see `Checkpoints.find`.

    Raises:
        ValueError: `wanted` is damaged or absent, or it is `None` although there are checkpoints of an earlier run.
    """
    if wanted == "latest":
        return
    if wanted is None:
        if existing := by_age(folder):
            raise ValueError(
                f"output_dir holds {existing[-1].name} of an earlier run: resume it with --resume_from_checkpoint "
                "latest, or give another output_dir"
            )
        return
    if problem := problem_of(as_path(wanted)):
        whole = newest_whole(folder)
        instead = f"the newest complete checkpoint is {whole}" if whole else "output_dir holds no complete checkpoint"
        raise ValueError(f"resume_from_checkpoint={wanted!r} is not a complete checkpoint ({problem}); {instead}")


def newest_whole(folder: Path, warn: bool = False) -> Path | None:
    """The newest complete checkpoint; with `warn`, a line says what was passed over."""
    problems, whole = [], None
    for path in reversed(by_age(folder)):
        problem = problem_of(path)
        if problem is None:
            whole = path
            break
        problems.append(f"{path.name} is damaged ({problem})")
    if warn and (problems or whole is None):
        chosen = f"resuming from {whole.name}" if whole else "starting from the beginning"
        print(f"warning: {'; '.join(problems) or f'no checkpoint in {folder}'}: {chosen}")
    return whole


def by_age(folder: Path) -> list[Path]:
    """Checkpoints by time of writing, newest last (a resumed run may write a smaller step later)."""
    found = (path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal())
    return sorted(found, key=_age)


def problem_of(path: Path) -> str | None:
    """The first difference between a checkpoint and its manifest, or `None` if it is complete."""
    if not path.is_dir():
        return "no such folder"
    try:
        files = read_json(path / MANIFEST_FILE)["files"]
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST_FILE} is unreadable"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size} of {expected['size']} bytes"
        if sha256_of(file) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _write_manifest(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths
    }
    write_json(folder / MANIFEST_FILE, {"saved_at": time.time(), "files": files})


def _replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`. An existing target is moved away first: no single call replaces a folder."""
    if target.exists():
        old = target.with_name(f".{target.name}{MOVED}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(source, target)
        shutil.rmtree(old)
    else:
        os.replace(source, target)


def _age(path: Path) -> tuple[float, str]:
    """Time of writing, from the manifest or else from the folder."""
    try:
        return float(read_json(path / MANIFEST_FILE)["saved_at"]), path.name
    except (OSError, ValueError, KeyError, TypeError):
        return path.stat().st_mtime, path.name
