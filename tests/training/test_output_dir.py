"""An output folder belongs to one run at a time, with room for its end; paths may begin with the home folder."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import stat
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from aselect_hf.files import write_text
from aselect_hf.training.arguments import (
    PretrainingArguments,
    PretrainModelArguments,
    TaskDataArguments,
    TaskModelArguments,
    TrainingArguments,
)
from aselect_hf.training.output_dir import REPORT_BYTES, hold_output_dir
from aselect_hf.training.parsing import LocalPath, parse_arguments

PATHS = {
    "model_name_or_path", "dataset_name", "train_dir", "validation_dir", "cache_dir", "output_dir",
    "resume_from_checkpoint",
}  # fmt: skip
DATACLASSES = (TaskModelArguments, TaskDataArguments, TrainingArguments, PretrainModelArguments, PretrainingArguments)


def _try_to_hold(folder: Path, outcomes) -> None:
    try:
        with hold_output_dir(folder, 0):
            outcomes.put("held")
    except ValueError as error:
        outcomes.put(str(error))


def test_a_second_run_is_refused_while_the_first_works(tmp_path):
    fork, folder = multiprocessing.get_context("fork"), tmp_path / "run"
    outcomes = fork.Queue()
    with hold_output_dir(folder, 0):
        other = fork.Process(target=_try_to_hold, args=(folder, outcomes))
        other.start()
        assert outcomes.get(timeout=60) == (
            f"output_dir {folder} is in use by another run: wait until it ends, or give another folder"
        )
        other.join(60)
    _try_to_hold(folder, outcomes)
    assert outcomes.get(timeout=60) == "held"


def test_the_room_for_the_model_is_there_at_the_end_whoever_fills_the_disk(small_disk):
    folder = small_disk(REPORT_BYTES + 2**20)
    with (
        pytest.raises(ValueError, match=r"output folder .*disk-0 has 0.01 GB free, but 0.01 GB is needed for"),
        hold_output_dir(folder, 2**20 + 1),
    ):
        pass
    with hold_output_dir(folder, 2**19) as give_back_room:
        with (folder / "checkpoint").open("wb") as file, pytest.raises(OSError, match="No space"):
            os.posix_fallocate(file.fileno(), 0, 2**20)
        (folder / "checkpoint").write_bytes(bytes(shutil.disk_usage(folder).free))
        with pytest.raises(OSError, match="could not be written"):
            write_text(folder / "model", "x" * 2**19)
        give_back_room()
        write_text(folder / "model", "x" * 2**19)
    assert shutil.disk_usage(folder).free > 2**20


def test_paths_are_named_so_that_none_is_forgotten():
    names = {each.name for kind in DATACLASSES for each in dataclasses.fields(kind)}
    hints = {name: hint for kind in DATACLASSES for name, hint in get_type_hints(kind, include_extras=True).items()}
    assert {name for name, hint in hints.items() if LocalPath in (hint, *get_args(hint))} == PATHS
    assert {name for name in names if name.endswith(("_dir", "_path", "_file", "_folder"))} <= PATHS


@pytest.mark.parametrize("kind", DATACLASSES)
def test_home_is_expanded_in_every_path(kind, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name in {each.name for each in dataclasses.fields(kind)} & PATHS:
        assert getattr(kind(**{name: "~/x"}), name) == "/home/me/x"
        assert getattr(kind(**{name: "user/name"}), name) == "user/name"


@pytest.mark.parametrize("form", ["flag", "yaml", "json"])
def test_home_is_expanded_wherever_an_argument_comes_from(form, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    content = {"flag": "", "yaml": "output_dir: ~/run\n", "json": '{"output_dir": "~/run"}'}[form]
    (tmp_path / f"args.{form}").write_text(content, encoding="utf-8")
    argv = ["--output_dir=~/run"] if form == "flag" else [f"~/args.{form}"]
    [args] = parse_arguments((TrainingArguments,), None, argv)
    assert args.output_dir == str(tmp_path / "run")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_of_arguments_may_have_any_unicode_encoding(encoding, tmp_path):
    (tmp_path / "args.yaml").write_text("output_dir: Läufe/猫\n", encoding=encoding)
    [args] = parse_arguments((TrainingArguments,), None, [str(tmp_path / "args.yaml")])
    assert args.output_dir == "Läufe/猫"


def test_the_umask_decides_who_may_read_a_checkpoint(make_trainer):
    before = os.umask(0o022)
    try:
        trainer = make_trainer(checkpointing_steps=3, max_train_steps=3)
        trainer.train()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (trainer.output_dir / "checkpoint-3").iterdir()}
    assert modes.pop("model.safetensors") == 0o644
    assert set(modes.values()) <= {0o644, 0o755}


def test_a_checkpoint_that_was_only_moved_out_of_the_way_is_put_back(make_trainer):
    """A run that was killed while it wrote the same step anew."""
    trainer = make_trainer(checkpointing_steps=3, max_train_steps=3)
    trainer.train()
    folder = trainer.output_dir
    (folder / "checkpoint-3").rename(folder / ".checkpoint-3.old.partial")
    resumed = make_trainer(resume_from_checkpoint="latest", max_train_steps=4)
    resumed.train()
    assert len(resumed.objective.seen) == 1
    assert not list(folder.glob(".checkpoint*"))
