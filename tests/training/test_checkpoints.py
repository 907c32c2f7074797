"""Checkpoints: whole or absent, found by what they hold, and a full disk ends in one clear error."""

from __future__ import annotations

import json
import re
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch

from aselect_hf.training.checkpoints import problem_of

from .toys import FullDiskAt


def truncate(path):
    file = path / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:100])


def flip_a_bit(path):
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE = {
    r"optimizer.bin has 100 of \d+ bytes": truncate,
    "model.safetensors has changed since it was written": flip_a_bit,
    "progress.json is missing": lambda path: (path / "progress.json").unlink(),
    "manifest.json is missing": lambda path: (path / "manifest.json").unlink(),
    "manifest.json is unreadable": lambda path: (path / "manifest.json").write_text("{"),
}


@pytest.fixture
def saved(make_trainer):
    """An output folder with checkpoint-6 and checkpoint-9."""
    trainer = make_trainer(checkpointing_steps=3, max_train_steps=9, lr_scheduler_type="constant")
    trainer.train()
    assert names(trainer) == ["checkpoint-6", "checkpoint-9"]
    return trainer.output_dir


def names(trainer):
    return sorted(path.name for path in trainer.output_dir.iterdir() if "checkpoint" in path.name)


@pytest.mark.parametrize("problem", DAMAGE)
def test_latest_passes_over_a_damaged_one(saved, make_trainer, weights_of, capsys, problem):
    DAMAGE[problem](saved / "checkpoint-9")
    whole = make_trainer("whole", lr_scheduler_type="constant")
    whole.train()
    capsys.readouterr()
    resumed = make_trainer(resume_from_checkpoint="latest", lr_scheduler_type="constant")
    resumed.train()
    warnings = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(warnings) == 1
    assert re.search(rf"checkpoint-9 is damaged \({problem}\): resuming from checkpoint-6", warnings[0])
    assert len(resumed.objective.seen) == 6
    assert torch.equal(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_one_asked_for_is_refused(saved, make_trainer, problem):
    DAMAGE[problem](saved / "checkpoint-9")
    path = str(saved / "checkpoint-9")
    with pytest.raises(
        ValueError, match=rf"is not a complete checkpoint \({problem}\); the newest complete .*checkpoint-6$"
    ):
        make_trainer(resume_from_checkpoint=path).train()


def test_an_absent_one_is_refused(saved, make_trainer):
    with pytest.raises(ValueError, match=r"\(no such folder\); the newest complete checkpoint is .*checkpoint-9"):
        make_trainer(resume_from_checkpoint=str(saved / "checkpoint-7")).train()
    with pytest.raises(ValueError, match=r"output_dir holds no complete checkpoint"):
        make_trainer("empty", resume_from_checkpoint=str(saved / "checkpoint-7")).train()


def test_nothing_whole_starts_from_the_beginning(saved, make_trainer, capsys):
    for path in saved.glob("checkpoint-*"):
        truncate(path)
    trainer = make_trainer(resume_from_checkpoint="latest")
    trainer.train()
    assert len(trainer.objective.seen) == 12
    assert "checkpoint-6 is damaged" in capsys.readouterr().out
    make_trainer("new", resume_from_checkpoint="latest").train()
    assert "no checkpoint in" in capsys.readouterr().out


def test_a_new_run_does_not_bury_an_old_one(saved, make_trainer):
    with pytest.raises(
        ValueError,
        match="output_dir holds checkpoint-9 of an earlier run: resume it with --resume_from_checkpoint latest",
    ):
        make_trainer().train()


def test_leftovers_of_killed_runs_are_removed(saved, make_trainer):
    shutil.copytree(saved / "checkpoint-9", saved / ".checkpoint-12.partial")
    trainer = make_trainer(resume_from_checkpoint="latest")
    trainer.train()
    assert names(trainer) == ["checkpoint-6", "checkpoint-9"]


def test_a_run_that_went_back_keeps_and_finds_its_own(saved, make_trainer):
    """What it writes is newer than checkpoint-9, whatever the number."""
    path = str(saved / "checkpoint-6")
    make_trainer(
        resume_from_checkpoint=path, max_train_steps=8, checkpointing_steps=4, checkpoints_total_limit=1
    ).train()
    trainer = make_trainer(resume_from_checkpoint="latest")
    assert names(trainer) == ["checkpoint-8"]
    trainer.train()
    assert len(trainer.objective.seen) == 4


def test_a_checkpoint_is_written_anew(saved, make_trainer):
    before = json.loads((saved / "checkpoint-9" / "manifest.json").read_text())["saved_at"]
    trainer = make_trainer(resume_from_checkpoint=str(saved / "checkpoint-6"), checkpointing_steps=9)
    trainer.train()
    assert json.loads((saved / "checkpoint-9" / "manifest.json").read_text())["saved_at"] > before
    assert names(trainer) == ["checkpoint-6", "checkpoint-9"]


@contextmanager
def room_again():
    """Take the limit away before pytest itself writes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("capsys")  # the progress bar writes to memory
@pytest.mark.parametrize("limit", [0, 100, 600, 2000, 5000], ids="{} bytes".format)
def test_a_full_disk_leaves_the_last_good_checkpoint(make_trainer, limit):
    """The limits stop the weights, the optimizer, the random state, ...: each library has its own exception."""
    trainer = make_trainer(objective=FullDiskAt(7, limit), checkpointing_steps=5, max_train_steps=20)
    with (
        room_again(),
        pytest.raises(OSError, match=r"^checkpoint-10 could not be saved \(.+\), training ends; .*run/checkpoint-5$"),
    ):
        trainer.train()
    assert names(trainer) == ["checkpoint-5"]
    assert problem_of(trainer.output_dir / "checkpoint-5") is None


@pytest.mark.usefixtures("capsys")  # the progress bar writes to memory
def test_a_disk_that_was_full_from_the_start(make_trainer):
    trainer = make_trainer(objective=FullDiskAt(1, 100), checkpointing_steps=5)
    with room_again(), pytest.raises(OSError, match=r"checkpoint-5 could not be saved .* there is no earlier one"):
        trainer.train()
    assert names(trainer) == []


def test_a_folder_that_cannot_be_written_ends_the_same_way(saved, make_trainer):
    trainer = make_trainer(resume_from_checkpoint="latest", checkpointing_steps=12)
    forward = trainer.objective.forward

    def obstruct(batch, draws):
        (saved / ".checkpoint-12.partial").touch()  # a file where the folder should be
        return forward(batch, draws)

    trainer.objective.forward = obstruct
    with pytest.raises(OSError, match=r"checkpoint-12 could not be saved \(.*File exists.*run/checkpoint-9$"):
        trainer.train()
