"""The one training loop: accelerate, weight averaging, evaluation, whole checkpoints, exact resume, orderly stop.

All randomness of a step comes from the seed and the step: the order of the data, the `SampleDraws` of the objective,
and torch's own generator (dropout), which is seeded anew before each forward pass. So a run that was killed and
resumed, or evaluated more or less often, ends in the very same weights.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, LoggerType, send_to_device, set_seed
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm
from transformers import get_scheduler

from aselect_hf.files import read_json, write_json
from aselect_hf.training.arguments import PretrainingArguments, TrainingArguments
from aselect_hf.training.batches import Batch, Collate, effective_batch, make_batches
from aselect_hf.training.checkpoints import Checkpoints
from aselect_hf.training.draws import SampleDraws, mix_seed, positions_of
from aselect_hf.training.processes import check_num_processes
from aselect_hf.training.signals import StopSignals
from aselect_hf.versions import slow_precision

PROGRESS_FILE = "progress.json"


class Trainer:
    """Trains an objective: a module that maps a batch and its `SampleDraws` to scalars.

    Args:
        objective: `objective(batch, draws) -> {"loss": ..., ...}`. `"loss"` is backpropagated; all are averaged over
            processes and steps, logged and recorded under their names. Three methods are called where it has them:
            `set_progress(share)` before every forward pass, with the share of training done, 0 to 1; `end_step()` after
            every optimizer step; and `count_items(batch) -> (k,)` on all batches of an optimizer step before the first
            of its forward passes, which then get the average as `objective(batch, draws, counts)`.
        dataset: the training set: random access, or a stream (`datasets.IterableDataset` or torch's), see `batches`.
        collate: turns a list of its items into a batch, a dict of tensors. It should draw nothing at random.
        args: see `PretrainingArguments`.
        num_workers: processes that load data.
        parameter_groups: groups for AdamW; default one of all parameters with `requires_grad`.
        evaluate: `evaluate(step) -> {name: number}`, called on all processes every `args.eval_steps` steps, by default
            at the end of every epoch, and at the end of training: without gradients, with the averaged weights in place
            and the objective in evaluation mode.

    Raises:
        ValueError: a tracker is not installed, the number of processes is not `args.num_processes`, a stream has no
            `max_train_steps`, or nothing is to be trained.

    Attributes:
        accelerator: of the run.
        objective: the prepared module.
        max_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of an epoch; of a stream, `max_steps`.
        output_dir: folder of the checkpoints.
        parameters: what is optimized, clipped and averaged.
        ema: the weight average, or None.
    """

    def __init__(
        self,
        objective: nn.Module,
        dataset: Any,
        collate: Collate,
        args: PretrainingArguments,
        *,
        num_workers: int = 0,
        parameter_groups: list[dict[str, Any]] | None = None,
        evaluate: Callable[[int], dict[str, float]] | None = None,
    ) -> None:
        self.args, self.evaluate = args, evaluate
        self.output_dir = Path(args.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            # Epochs are whole numbers of steps: no short step at their end, and none from an evaluation's loader.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=check_trackers(args.report_to),
            project_dir=args.output_dir,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        )
        check_num_processes(self.accelerator, args.num_processes)
        groups = parameter_groups or [{"params": [p for p in objective.parameters() if p.requires_grad]}]
        groups = [group | {"params": list(group["params"])} for group in groups]
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        if not self.parameters:
            raise ValueError("nothing to train: no parameter has requires_grad")
        optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay)
        self.batches = make_batches(dataset, collate, args, self.accelerator, num_workers)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.max_steps = args.max_train_steps or self.steps_per_epoch * args.num_train_epochs
        # Stepped by hand, once an optimizer step: accelerate's would count processes, and tie a checkpoint to them.
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.num_warmup_steps,
            num_training_steps=self.max_steps,
        )
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.ema = EMAModel(self.parameters, decay=args.ema_decay) if args.ema_decay else None
        self.accelerator.register_for_checkpointing(*filter(None, (self.scheduler, self.ema)))
        self.accelerator.register_save_state_pre_hook(_save_unwrapped)
        self.accelerator.register_load_state_pre_hook(_load_unwrapped)
        self.checkpoints = Checkpoints(self.output_dir, args.checkpoints_total_limit, self.accelerator)
        self.checkpoint_every = self._steps(args.checkpointing_steps)
        self.evaluate_every = self.steps_per_epoch
        if isinstance(args, TrainingArguments) and args.eval_steps:
            self.evaluate_every = args.eval_steps
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    def describe(self) -> str:
        """What will run, for the first lines of the log."""
        args, accelerator = self.args, self.accelerator
        trainable = sum(parameter.numel() for parameter in self.parameters)
        return (
            f"{self.batches.description}, {trainable:,} trainable parameters\n"
            f"{accelerator.num_processes} process(es) on {accelerator.device.type}, "
            f"mixed precision {accelerator.mixed_precision}\n"
            f"effective batch {effective_batch(args, accelerator)} = {args.per_device_train_batch_size} images x "
            f"{accelerator.num_processes} process(es) x {args.gradient_accumulation_steps} accumulation step(s)\n"
            f"{self.max_steps} steps of {self.steps_per_epoch} an epoch"
        )

    def train(self) -> dict[str, Any]:
        """Run to `max_steps` and leave the averaged weights in the objective.

        On SIGTERM or SIGUSR1 the run saves a checkpoint after its current step, says how to go on, and returns early.

        Returns:
            `steps`, `seconds` (those before a resume included), `history` (a dict per log line and evaluation, each
            with its `step`), `interrupted`.

        Raises:
            ValueError: the checkpoint to resume from is damaged or of another run; the loss is not finite.
            OSError: a checkpoint could not be saved.
        """
        accelerator = self.accelerator
        accelerator.print(self.describe())
        if warning := slow_precision(accelerator.device, accelerator.mixed_precision, "--mixed_precision no"):
            accelerator.print(f"warning: {warning}")
        set_seed(self.args.seed, device_specific=True)
        self._resume()
        if accelerator.log_with:
            scalars = (bool, int, float, str)
            config = {k: v if isinstance(v, scalars) else str(v) for k, v in self.args.public().items()}
            accelerator.init_trackers("aselect", config=config)
        started = time.perf_counter() - self.seconds
        interrupted = False
        self.objective.train()
        bar = tqdm(total=self.max_steps, initial=self.step, desc="train", disable=not accelerator.is_local_main_process)
        with StopSignals() as signals, bar:
            batches = self.batches.from_step(self.step)
            while self.step < self.max_steps and not interrupted:
                self._optimizer_step(list(islice(batches, self.args.gradient_accumulation_steps)))
                self.step += 1
                self.seconds = time.perf_counter() - started
                bar.update()
                if self.step % self.args.logging_steps == 0 or self.step == self.max_steps:
                    bar.set_postfix(loss=f"{self._log()['loss']:.4f}")
                if self.evaluate and (self.step % self.evaluate_every == 0 or self.step == self.max_steps):
                    self._evaluate()
                interrupted = self._asked_to_stop(signals) and self.step < self.max_steps
                if interrupted or (self.checkpoint_every and self.step % self.checkpoint_every == 0):
                    self._save_checkpoint()
        if interrupted:
            accelerator.print(
                f"stopped by a signal after step {self.step} of {self.max_steps}, checkpoint saved: run the same "
                "command with --resume_from_checkpoint latest to go on"
            )
        elif self.ema is not None:
            self.ema.copy_to(self.parameters)
        accelerator.wait_for_everyone()
        record: dict[str, Any] = {"steps": self.step, "seconds": round(self.seconds, 1), "history": self.history}
        return record | {"interrupted": interrupted}

    def finish(self) -> None:
        """Finish the trackers and leave the process group: the last thing that a script does.

        The distributed wrapper of the objective goes first. Where it outlives its group, its end waits for gloo's
        threads with the interpreter locked, while one of them may be waiting for that lock (torch 2.13): a run of
        several processes then hangs when all is done.
        """
        self.objective = self.accelerator.unwrap_model(self.objective)
        self.accelerator.end_training()

    def _optimizer_step(self, window: list[tuple[int, int, Batch]]) -> None:
        """All forward passes of one step, whose losses are means over everything that the step counts."""
        objective: Any = self.accelerator.unwrap_model(self.objective)
        counts = []
        if hasattr(objective, "count_items"):
            total = sum(objective.count_items(batch).to(self.accelerator.device) for _, _, batch in window)
            passes = len(window) * self.accelerator.num_processes
            counts = [self.accelerator.reduce(total, reduction="sum") / passes]
        for epoch, micro_step, batch in window:
            self._micro_step(epoch, micro_step, batch, *counts)
        if hasattr(objective, "end_step"):
            objective.end_step()

    def _micro_step(self, epoch: int, micro_step: int, batch: Batch, *counts: torch.Tensor) -> None:
        accelerator, args = self.accelerator, self.args
        process = accelerator.process_index
        positions = positions_of(micro_step, process, accelerator.num_processes, args.per_device_train_batch_size)
        draws = SampleDraws(args.seed, epoch, positions)
        unwrapped = accelerator.unwrap_model(self.objective)
        if hasattr(unwrapped, "set_progress"):
            unwrapped.set_progress(self.step / self.max_steps)
        set_seed(mix_seed(args.seed, epoch, micro_step, process))
        with accelerator.accumulate(self.objective):
            metrics = self.objective(send_to_device(batch, accelerator.device), draws, *counts)
            accelerator.backward(metrics["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.parameters, args.max_grad_norm)
            self.optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients and self.ema is not None:
            self.ema.step(self.parameters)
        self._count += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def _log(self) -> dict[str, float]:
        """Averages since the last call, over steps and processes, into history and trackers."""
        means = {name: value / self._count for name, value in self._reduced_sums().items()}
        self._sums, self._count = {}, 0
        self._record(means | {"learning_rate": self.scheduler.get_last_lr()[0]})
        return means

    def _reduced_sums(self) -> dict[str, float]:
        if not self._sums:
            return {}
        values = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="mean").tolist()
        sums = dict(zip(self._sums, values, strict=True))
        if not math.isfinite(sums["loss"]):
            raise ValueError(f"the loss is {sums['loss']} at step {self.step}: lower learning_rate")
        return sums

    def _record(self, metrics: dict[str, float]) -> None:
        self.history.append({"step": self.step} | metrics)
        self.accelerator.log(metrics, step=self.step)

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        modes = [(module, module.training) for module in self.objective.modules()]
        self.objective.eval()
        with _kept_random_state(), self._averaged_weights(), torch.no_grad():
            metrics = {name: float(value) for name, value in self.evaluate(self.step).items()}
        for module, mode in modes:
            module.training = mode
        self._record({"epoch": self.step / self.steps_per_epoch} | metrics)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        yield
        self.ema.restore(self.parameters)

    def _asked_to_stop(self, signals: StopSignals) -> bool:
        """Whether any process got a signal: all of them learn of it in the same step."""
        if self.accelerator.num_processes == 1:
            return signals.received is not None
        if signals.received:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _save_checkpoint(self) -> None:
        sums = self._reduced_sums()
        progress = {"step": self.step, "seconds": self.seconds, "history": self.history, "setup": self.batches.setup}
        progress |= {"sums": sums, "count": self._count}

        def fill(folder: Path) -> None:
            self.accelerator.save_state(str(folder))
            if self.batches.state is not None:
                write_json(folder / self._stream_file, self.batches.state)
            if self.accelerator.is_main_process:
                write_json(folder / PROGRESS_FILE, progress)

        self.checkpoints.save(self.step, fill)

    def _resume(self) -> None:
        """Take over the state of the checkpoint asked for, if any."""
        self.checkpoints.remove_leftovers()
        path = self.checkpoints.find(self.args.resume_from_checkpoint)
        if path is not None:
            progress = read_json(path / PROGRESS_FILE)
            changed = [
                f"{name} was {progress['setup'].get(name)}, is {value}"
                for name, value in self.batches.setup.items()
                if progress["setup"].get(name) != value
            ]
            if changed:
                raise ValueError(f"{path} is of another run: {', '.join(changed)}")
            try:
                self.accelerator.load_state(str(path))
            except (RuntimeError, KeyError, ValueError) as error:
                raise ValueError(f"{path} does not fit this model: {str(error).strip().splitlines()[0]}") from error
            self.step, self.seconds, self.history = progress["step"], progress["seconds"], progress["history"]
            device = self.accelerator.device
            self._sums = {name: torch.tensor(value, device=device) for name, value in progress["sums"].items()}
            self._count = progress["count"]
            if self.batches.state is not None:
                self.batches.state = read_json(path / self._stream_file)
            self.accelerator.print(f"going on from {path}, step {self.step} of {self.max_steps}")
        if self.ema is not None:
            self.ema.to(self.accelerator.device)

    @property
    def _stream_file(self) -> str:
        return f"stream_{self.accelerator.process_index}.json"

    def _steps(self, every: str | None) -> int | None:
        return self.steps_per_epoch if every == "epoch" else int(every) if every else None


def check_trackers(report_to: str | None) -> list[LoggerType] | None:
    """The trackers named in `report_to`, by comma; `"all"` for those installed.

    Raises:
        ValueError: one is unknown or its package is not installed.
    """
    if not report_to:
        return None
    installed = get_available_trackers()
    if report_to == "all":
        if not installed:
            raise ValueError("report_to=all, but no tracker is installed: for example pip install tensorboard")
        return installed
    known = [name for name in LoggerType.list() if name != "all"]
    names = [name.strip() for name in report_to.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"report_to must be all, or of {', '.join(known)}; got {name!r}")
        if LoggerType(name) not in installed:
            raise ValueError(f"report_to={name!r}: the package {name} is not installed")
    return [LoggerType(name) for name in names]


def _save_unwrapped(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], _: str) -> None:
    """Save under the objective's own names, so that any number of processes can resume."""
    for index, state in enumerate(weights):
        if isinstance(models[index], DistributedDataParallel):
            weights[index] = type(state)((name.removeprefix("module."), value) for name, value in state.items())


def _load_unwrapped(models: list[nn.Module], _: str) -> None:
    models[:] = [model.module if isinstance(model, DistributedDataParallel) else model for model in models]


@contextmanager
def _kept_random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
