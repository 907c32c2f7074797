"""Outputs are whole or absent, whoever writes them at the same time, and readable by whom the umask lets."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from aselect_hf import files
from aselect_hf.errors import one_line_errors
from aselect_hf.files import (
    atomic_directory,
    atomic_file,
    atomic_files,
    check_absent,
    check_writable,
    disk_errors,
    read_json,
    reserved_space,
    write_json,
    write_text,
)

PARTS = ("a.txt", "b.txt", "c.txt")
SOURCES = [
    path for folder in ("aselect_hf", "benchmarks") for path in (Path(__file__).parents[2] / folder).rglob("*.py")
]


def _in_file(path: Path):
    return atomic_file(path / "output")


def _in_files(path: Path):
    path.mkdir(exist_ok=True)
    return atomic_files(path)


def _in_directory(path: Path):
    return atomic_directory(path)


def _write(kind, path: Path, text: str) -> None:
    """The same text in all parts."""
    with kind(path) as temporary:
        for part in [temporary] if kind is _in_file else [temporary / name for name in PARTS]:
            part.write_text(text, encoding="utf-8")


def _texts(path: Path) -> set[str]:
    return {file.read_text(encoding="utf-8") for file in path.rglob("*") if file.is_file()}


KINDS = [_in_file, _in_files, _in_directory]


def _write_slowly(kind, path: Path, text: str, outcomes: Path) -> None:
    replace = os.replace

    def slowly(source, target) -> None:
        time.sleep(0.05)
        replace(source, target)

    os.replace = slowly
    try:
        with kind(path) as temporary:
            for part in [temporary] if kind is _in_file else [temporary / name for name in PARTS]:
                part.write_text(text, encoding="utf-8")
                time.sleep(0.05)
    except ValueError as error:
        (outcomes / text).write_text(str(error), encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_writers_one_output_is_whole_and_the_loser_knows(kind, tmp_path, run_together):
    path, outcomes = tmp_path / "out", tmp_path / "outcomes"
    outcomes.mkdir()
    names = ("first", "second")
    assert run_together(_write_slowly, *((kind, path, name, outcomes) for name in names)) == [0, 0]
    [winner] = _texts(path)
    assert winner in names
    assert len(list(path.rglob("*"))) == (1 if kind is _in_file else len(PARTS))
    losers = {file.name: file.read_text(encoding="utf-8") for file in outcomes.iterdir()}
    if kind is _in_directory:
        message = f"another process has written output path {path}: choose another"
        assert losers == {next(name for name in names if name != winner): message}
    else:
        assert losers == {}
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "outcomes"}


def _die_writing(kind, path: Path) -> None:
    with kind(path) as temporary:
        (temporary if kind is _in_file else temporary / "a.txt").write_text("half", encoding="utf-8")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_writer_leaves_the_old_output_and_its_rest_goes_after_a_day(kind, tmp_path, run_together):
    path = tmp_path / "out"
    if kind is not _in_directory:
        _write(kind, path, "old")
    assert run_together(_die_writing, (kind, path)) == [-signal.SIGKILL]
    [leftover] = tmp_path.rglob(".*.partial")
    visible = {file.read_text(encoding="utf-8") for file in path.glob("*.txt")} | _texts(path / "output")
    assert visible <= {"old"}
    _write(kind, path, "new")
    assert leftover.exists()  # as if somebody else still wrote it
    yesterday = time.time() - files.LEFTOVER_SECONDS - 1
    for entry in [*leftover.rglob("*"), leftover]:
        os.utime(entry, (yesterday, yesterday))
    if kind is _in_directory:
        shutil.rmtree(path)
    _write(kind, path, "newest")
    assert not leftover.exists()
    assert _texts(path) == {"newest"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_leaves_the_old_output_and_nothing_else(kind, tmp_path):
    path = tmp_path / "out"
    if kind is not _in_directory:
        _write(kind, path, "old")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match="in the middle"), kind(path) as temporary:  # noqa: PT012
        (temporary if kind is _in_file else temporary / "a.txt").write_text("half", encoding="utf-8")
        raise RuntimeError("in the middle")
    assert sorted(tmp_path.rglob("*")) == before
    assert _texts(path) <= {"old"}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
@pytest.mark.parametrize("kind", KINDS)
def test_the_umask_decides_who_may_read(kind, umask, tmp_path):
    """Even of a library that hides what it writes, as safetensors does."""
    before = os.umask(umask)
    try:
        with kind(tmp_path / "out") as temporary:
            if kind is not _in_file:
                (temporary / "inner").mkdir(mode=0o700)
            save_file({"x": torch.zeros(2)}, temporary if kind is _in_file else temporary / "model.safetensors")
    finally:
        os.umask(before)
    for entry in [*(tmp_path / "out").rglob("*")]:
        expected = (0o777 if entry.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(entry.stat().st_mode) == expected, entry


@pytest.mark.parametrize("kind", KINDS)
def test_content_is_on_the_disk_before_it_gets_its_name(kind, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    events: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def note(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append("folder" if os.path.isdir(path) else "content")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("name"), replace(*names)))
    monkeypatch.setattr(os, "rename", lambda *names: (events.append("name"), rename(*names)))
    _write(kind, tmp_path / "out", "text")
    parts = 1 if kind is _in_file else len(PARTS)
    assert events.count("content") == parts
    assert "content" not in events[events.index("name") :]
    assert events[-1] == "folder"


def test_a_link_is_followed_and_not_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _write(_in_directory, tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert _texts(tmp_path / "real") == {"text"}
    (tmp_path / "latest.json").symlink_to(tmp_path / "first.json")
    write_json(tmp_path / "latest.json", [1])
    assert read_json(tmp_path / "first.json") == [1]


def test_long_names_are_written(tmp_path):
    path = tmp_path / ("ä" * 120 + ".json")
    assert read_json(write_json(path, [1])) == [1]


def test_a_folder_where_a_file_should_be_is_said_first(tmp_path):
    with pytest.raises(ValueError, match=f"output path {tmp_path} is a folder: give the path of a file"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    for check in (check_writable, check_absent):
        with pytest.raises(ValueError, match="is not writable"):
            check(tmp_path / "file" / "x")
    with pytest.raises(ValueError, match="already exists: choose another, or remove it"):
        check_absent(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_in_any_unicode_encoding(encoding, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"name": "Grüße 猫"}, ensure_ascii=False), encoding=encoding)
    assert read_json(tmp_path / "x.json") == {"name": "Grüße 猫"}


def test_text_is_written_in_utf_8_even_of_names_that_are_none(tmp_path):
    assert write_text(tmp_path / "x.md", "± 猫").read_bytes() == "± 猫".encode()
    assert write_text(tmp_path / "x.md", os.fsdecode(b"\xff.png")).read_bytes() == rb"\udcff.png"


def _is_text_without_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in whatever encoding the machine has."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""
    if {keyword.arg for keyword in call.keywords} & {"encoding", None}:
        return False
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute)
    if name not in ("open", "fdopen", "NamedTemporaryFile") or owner in ("Image", "os", "gzip", "tarfile", "zipfile"):
        return False
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    modes += [keyword.value.value for keyword in call.keywords if keyword.arg == "mode"]  # type: ignore[attr-defined]
    return not any("b" in mode for mode in modes)


@pytest.mark.parametrize("text", ["p.read_text()", "p.write_text(x)", "open(p)", "p.open('w')", "(a / b).open()"])
def test_text_without_encoding_is_found(text):
    assert _is_text_without_encoding(ast.parse(text, mode="eval").body)  # type: ignore[arg-type]


def test_every_text_names_its_encoding():
    found = [
        f"{path.name}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _is_text_without_encoding(node)
    ]
    assert len(SOURCES) > 100
    assert found == []


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_terminal_ends_a_program_by_what_it_cannot_show(encoding, monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit), one_line_errors("program"):  # noqa: PT012
        print("98.00 ± 0.10 % 猫", os.fsdecode(b"\xff.png"))
        raise ValueError("猫 is no image")
    for stream in streams.values():
        stream.flush()
    shown = streams["stdout"].buffer.getvalue().decode(encoding)
    assert shown.startswith("98.00")
    assert shown.rstrip().endswith(r"\udcff.png")
    assert b"is no image" in streams["stderr"].buffer.getvalue()


def test_home_is_where_a_tilde_leads(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_json("~/x.json", [1])
    assert read_json("~/x.json") == json.loads((tmp_path / "x.json").read_bytes()) == [1]
    _write(_in_directory, Path("~/folder"), "text")
    assert check_writable("~/y.json") == tmp_path / "y.json"
    with pytest.raises(ValueError, match="already exists"):
        check_absent("~/folder")
    assert not Path("~").exists()


def test_a_full_disk_names_the_output_and_leaves_the_old_one(small_disk):
    disk = small_disk(2**20)
    tensors = {"x": torch.zeros(2**19)}  # 2 MiB
    write_text(disk / "old.txt", "old")
    for kind in KINDS:
        with (
            pytest.raises(OSError, match=rf"^{disk}.* could not be written \(No space left on device\)"),
            kind(disk / "out") as temporary,
        ):
            save_file(tensors, temporary if kind is _in_file else temporary / "model.safetensors")
    with pytest.raises(OSError, match="could not be written"), atomic_file(disk / "old.txt") as temporary:
        temporary.write_bytes(bytes(2**21))
    assert (disk / "old.txt").read_text(encoding="utf-8") == "old"
    assert [path for path in disk.rglob("*") if path.is_file()] == [disk / "old.txt"]


def test_other_errors_are_not_taken_for_a_full_disk():
    with pytest.raises(FileNotFoundError), disk_errors("x"):
        os.stat("/nowhere/at/all")


def test_reserved_room_is_there_when_the_work_is_done(small_disk, fill, run_together):
    disk = small_disk(2**20)
    with reserved_space(disk, 2**19, "the results"):
        run_together(fill, (disk,))
        assert shutil.disk_usage(disk).free < 4096
    write_text(disk / "results", "x" * 2**18)
    (disk / "filler").unlink()
    with (
        pytest.raises(ValueError, match=r"has 0.00 GB free, but 1.00 GB is needed for the results"),
        reserved_space(disk, 10**9, "the results"),
    ):
        pass
