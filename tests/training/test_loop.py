"""The loop on a toy: averages, exact resume, undisturbed by evaluation, streams, signals, trackers."""

from __future__ import annotations

import random
import signal
from itertools import chain, pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from .toys import StopAt, Toy


def without_time(record):
    return {key: value for key, value in record.items() if key != "seconds"}


class Jittered(list):
    """A data set that draws from every global generator."""

    def __getitem__(self, index):
        return super().__getitem__(index) + torch.rand(()).item() + random.random() + np.random.rand()


class Numbers(IterableDataset):
    """0..count - 1, in a new order each epoch."""

    def __init__(self, count: int = 10) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(np.random.default_rng(self.epoch).permutation(self.count).tolist())


def stream(count: int = 11, shards: int = 2) -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"x": list(range(count))}).to_iterable_dataset(shards).shuffle(3, buffer_size=4)


STREAMS = {"datasets": stream, "torch": Numbers}


def test_loss_falls_and_metrics_are_averaged(make_trainer):
    trainer = make_trainer(logging_steps=5, max_train_steps=40)
    record = trainer.train()
    history = record["history"]
    assert [entry["step"] for entry in history] == list(range(5, 41, 5))
    assert set(history[0]) == {"step", "loss", "mean_value", "learning_rate"}
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["learning_rate"] == pytest.approx(0, abs=1e-9)
    # 5 steps of 4 are a whole epoch of the numbers 0..19
    assert [entry["mean_value"] for entry in history] == pytest.approx([9.5] * 8)
    assert (record["steps"], record["interrupted"]) == (40, False)


def test_progress_is_told_before_every_forward_pass(make_trainer):
    trainer = make_trainer(max_train_steps=4, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.objective.progress == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


@pytest.mark.parametrize("count", [3, 8, 16, 23, 24])
def test_accumulation_equals_the_doubled_batch(make_trainer, weights_of, count):
    """Also where the data set is no multiple of the batch, or smaller than it."""
    options = {"dataset": range(count), "max_train_steps": 7}
    doubled = make_trainer(per_device_train_batch_size=8, **options)
    doubled_record = doubled.train()
    halves = make_trainer("halves", per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    halves_record = halves.train()
    assert doubled.steps_per_epoch == halves.steps_per_epoch == max(1, count // 8)
    pairs = zip(halves.objective.seen[::2], halves.objective.seen[1::2], strict=True)
    assert doubled.objective.seen == [first + second for first, second in pairs]
    torch.testing.assert_close(weights_of(doubled)[:-1], weights_of(halves)[:-1], rtol=1e-5, atol=1e-6)
    for one, two in zip(doubled_record["history"], halves_record["history"], strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-9)


def test_every_image_is_seen_and_order_changes(make_trainer):
    trainer = make_trainer(max_train_steps=None, num_train_epochs=3)
    trainer.train()
    epochs = [list(chain(*trainer.objective.seen[start : start + 5])) for start in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["map", "datasets", "torch"])
def test_resume_is_bit_equal(make_trainer, weights_of, kind, accumulation):
    """Weights, buffer, average and history; log lines and passes do not end where checkpoints are written."""
    make = STREAMS.get(kind, lambda: range(20))
    options = {"ema_decay": 0.9, "dropout": 0.5, "gradient_accumulation_steps": accumulation, "logging_steps": 3}
    whole = make_trainer("whole", make(), **options, checkpointing_steps=1, checkpoints_total_limit=100)
    record = whole.train()
    for stopped_at in (1, 5, 6, 11):
        path = whole.output_dir / f"checkpoint-{stopped_at}"
        resumed = make_trainer(f"resumed-{stopped_at}", make(), **options, resume_from_checkpoint=str(path))
        resumed_record = resumed.train()
        assert resumed.objective.seen == whole.objective.seen[stopped_at * accumulation :]
        assert torch.equal(weights_of(resumed), weights_of(whole))
        assert without_time(resumed_record) == without_time(record)


def test_evaluation_disturbs_nothing(make_trainer, weights_of):
    """Not even one that draws, leaves its own data loader half read, and sees the objective in another mode."""
    options = {"ema_decay": 0.9, "dropout": 0.5, "gradient_accumulation_steps": 2, "eval_steps": 1}
    options["dataset"] = Jittered(range(20))
    plain = make_trainer(**options)
    plain.train()
    seen, left_open = [], []

    def evaluate(step):
        trainer = evaluated
        assert not torch.is_grad_enabled()
        assert not trainer.objective.dropout.training
        seen.append(trainer.objective.layer.weight.detach().clone())
        torch.rand(3), random.random(), np.random.rand()
        left_open.append(iter(trainer.accelerator.prepare(DataLoader(range(8), batch_size=8))))
        next(left_open[-1])
        return {"error": torch.tensor(float(step))}

    evaluated = make_trainer("evaluated", **options, evaluate=evaluate)
    record = evaluated.train()
    assert evaluated.objective.dropout.training
    assert torch.equal(weights_of(evaluated), weights_of(plain))
    assert torch.equal(seen[-1], evaluated.objective.layer.weight), (
        "the last evaluation sees the final, averaged weights"
    )
    entries = [entry for entry in record["history"] if "error" in entry]
    assert entries == [{"step": s, "epoch": pytest.approx(s / 2), "error": float(s)} for s in range(1, 13)]


def test_evaluation_comes_at_the_end_of_epochs_and_of_training(make_trainer):
    steps = []
    make_trainer(evaluate=lambda step: steps.append(step) or {}).train()
    assert steps == [5, 10, 12]


def test_parameter_groups_have_their_own_rate(make_trainer):
    objective = Toy()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    groups = [{"params": [objective.layer.weight], "lr": 0.0}, {"params": [objective.layer.bias], "lr": 0.1}]
    make_trainer(objective=objective, parameter_groups=groups).train()
    assert torch.equal(objective.layer.weight, before["layer.weight"])
    assert not torch.equal(objective.layer.bias, before["layer.bias"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_resume_ends_in_the_same_weights(make_trainer, weights_of, capsys, name):
    before = signal.getsignal(getattr(signal, name))
    whole = make_trainer("whole", dropout=0.5)
    whole.train()
    stopped = make_trainer("stopped", objective=StopAt(4, getattr(signal, name)))
    record = stopped.train()
    assert (record["steps"], record["interrupted"]) == (4, True)
    assert "--resume_from_checkpoint latest" in capsys.readouterr().out
    assert signal.getsignal(getattr(signal, name)) is before
    resumed = make_trainer("stopped", dropout=0.5, resume_from_checkpoint="latest")
    assert resumed.train()["interrupted"] is False
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_a_signal_in_the_last_step_changes_nothing(make_trainer):
    trainer = make_trainer(objective=StopAt(12, signal.SIGTERM))
    assert trainer.train()["interrupted"] is False
    assert not list(trainer.output_dir.glob("checkpoint-*"))


def test_checkpoints_at_the_end_of_epochs(make_trainer):
    trainer = make_trainer(checkpointing_steps="epoch")
    trainer.train()
    assert sorted(path.name for path in trainer.output_dir.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-5"]


def test_resume_of_another_run_is_refused(make_trainer):
    make_trainer(checkpointing_steps=6).train()
    options = {"resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="belongs to another run: effective batch was 4, is 5"):
        make_trainer(per_device_train_batch_size=5, **options).train()
    with pytest.raises(ValueError, match="does not fit this model"):
        make_trainer(ema_decay=0.5, **options).train()
    other = Toy()
    other.layer = torch.nn.Linear(4, 4, bias=False)
    with pytest.raises(ValueError, match="does not fit this model"):
        make_trainer(objective=other, **options).train()


def test_an_infinite_loss_ends_training_and_is_never_saved(make_trainer):
    trainer = make_trainer(dataset=[1.0] * 19 + [float("nan")], checkpointing_steps=1, logging_steps=100)
    with pytest.raises(ValueError, match=r"the loss is nan at step \d: lower learning_rate"):
        trainer.train()
    saved = trainer.checkpoints.find("latest")
    assert saved is None or torch.load(saved / "optimizer.bin")["state"][0]["exp_avg"].isfinite().all()


def test_refusals(make_trainer):
    with pytest.raises(ValueError, match=r"num_processes requested 2 processes, but this run has 1.*accelerate launch"):
        make_trainer(num_processes=2)
    with pytest.raises(ValueError, match="nothing to train"):
        make_trainer(objective=Toy().requires_grad_(False))
    with pytest.raises(ValueError, match="the training set is empty"):
        make_trainer(dataset=[])


def test_description_says_what_will_run(make_trainer, capsys):
    make_trainer(gradient_accumulation_steps=2, max_train_steps=1).train()
    assert capsys.readouterr().out.splitlines()[:4] == [
        "20 training images, 20 trainable parameters",
        "1 process(es) on cpu, mixed precision no",
        "effective batch 8 = 4 images x 1 process(es) x 2 accumulation step(s)",
        "1 steps, 2 per epoch",
    ]


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_run_again_in_a_new_order(make_trainer, kind):
    trainer = make_trainer(dataset=STREAMS[kind](), per_device_train_batch_size=5, max_train_steps=6)
    trainer.train()
    passes = [tuple(chain(*trainer.objective.seen[start : start + 2])) for start in (0, 2, 4)]
    assert all(len(set(one)) == 10 for one in passes)
    assert len(set(passes)) == 3
    assert trainer.steps_per_epoch == trainer.max_steps == 6


def test_stream_errors(make_trainer):
    with pytest.raises(ValueError, match="give max_train_steps"):
        make_trainer(dataset=stream(), max_train_steps=None)
    with pytest.raises(ValueError, match="less than one batch of 4 images per pass"):
        make_trainer(dataset=Numbers(3)).train()
    make_trainer("stream", dataset=Numbers(), checkpointing_steps=6).train()
    with pytest.raises(ValueError, match="number of workers was 0, is 1"):
        make_trainer("stream", dataset=Numbers(), num_workers=1, resume_from_checkpoint="latest").train()


def test_worker_processes_see_the_same_batches(make_trainer):
    helped = make_trainer("helped", max_train_steps=7, num_workers=1)
    helped.train()
    alone = make_trainer("alone", max_train_steps=7)
    alone.train()
    assert helped.objective.seen == alone.objective.seen


def test_tensorboard_gets_losses_and_evaluations(make_trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"report_to": "tensorboard", "hub_token": "hf_secret", "max_train_steps": 5}
    trainer = make_trainer(evaluate=lambda step: {"accuracy": step / 10}, **options)
    record = trainer.train()
    trainer.finish()
    files = [path for path in Path(trainer.output_dir).rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in path.read_bytes() for path in files)
    events = EventAccumulator(str(trainer.output_dir / "aselect")).Reload()
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert [event.value for event in events.Scalars("accuracy")] == [0.5]


def test_trackers_are_checked_first(make_trainer):
    with pytest.raises(ValueError, match="report_to='swanlab': the package swanlab is not installed"):
        make_trainer(report_to="tensorboard,swanlab")
    with pytest.raises(ValueError, match=r"report_to must be all, or names among .*tensorboard.*; got 'tensorbord'"):
        make_trainer(report_to="tensorbord")
    assert "tensorboard" in [str(name) for name in make_trainer(with_tracking=True).accelerator.log_with]


def test_history_steps_never_go_back(make_trainer):
    make_trainer(checkpointing_steps=5, evaluate=lambda step: {}).train()
    path = make_trainer("other").output_dir.parent / "run" / "checkpoint-5"
    history = make_trainer("other", evaluate=lambda step: {}, resume_from_checkpoint=str(path)).train()["history"]
    assert all(one["step"] <= two["step"] for one, two in pairwise(history))
    assert [entry["step"] for entry in history if "epoch" in entry] == [5, 10, 12]


def test_a_precision_that_the_processor_emulates_is_said(make_trainer, capsys, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("model name\t: Some CPU\nflags\t\t: avx2\n", encoding="utf-8")
    monkeypatch.setattr("aselect_hf.versions.CPU_INFO", tmp_path / "cpuinfo")
    make_trainer(mixed_precision="bf16", max_train_steps=1).train()
    message = "warning: bf16 on this processor (Some CPU) is several times slower than float32"
    assert capsys.readouterr().out.count(message) == 1
    make_trainer("plain", mixed_precision="no", max_train_steps=1).train()
    assert "slower" not in capsys.readouterr().out


def test_the_average_is_that_of_its_formula(make_trainer):
    """To the last digits only: `foreach` multiplies and adds in one rounding where a loop over tensors takes two."""
    seen = []
    objective = Toy()
    objective.register_forward_pre_hook(lambda module, _: seen.append(module.layer.weight.detach().clone()))
    trainer = make_trainer(objective=objective, ema_decay=0.9, max_train_steps=6)
    last = []
    trainer.ema.copy_to = lambda parameters, copy=trainer.ema.copy_to: (
        last.append(objective.layer.weight.detach().clone()) or copy(parameters)
    )
    trainer.train()
    average = seen[0].double()
    for step, weight in enumerate([*seen[1:], last[0]], start=1):
        decay = min(0.9, step / (9 + step)) if step > 1 else 0.0
        average -= (1 - decay) * (average - weight.double())
    torch.testing.assert_close(objective.layer.weight.double(), average, rtol=1e-5, atol=1e-6)
