"""The training loop: accelerate, weight averaging, evaluation, checkpoints, exact resume, orderly stop.

All randomness of a step comes from the seed and the step: the order of the data, the `SampleDraws` of the objective,
and torch's generator (dropout), which is seeded again before each forward pass. A run that was killed and resumed, or
evaluated more often, therefore ends with identical weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device, set_seed
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from aselect_hf.files import read_json, write_json
from aselect_hf.training.accelerator import make_accelerator, start_trackers
from aselect_hf.training.arguments import PretrainingArguments, TrainingArguments
from aselect_hf.training.batches import Batch, Collate, effective_batch, make_batches
from aselect_hf.training.checkpoints import Checkpoints
from aselect_hf.training.draws import SampleDraws, kept_random_state, mix_seed, positions_of, seed_generators
from aselect_hf.training.sharding import ShardedEMA, is_sharded, prepare_sharding, reshard
from aselect_hf.training.signals import StopSignals
from aselect_hf.training.training_log import TrainingLog
from aselect_hf.versions import slow_precision

PROGRESS_FILE = "progress.json"


class Trainer:
    """Trains an objective: a module that maps a batch and its `SampleDraws` to scalars.

    Args:
        objective: `objective(batch, draws) -> {"loss": ..., ...}`. `"loss"` is backpropagated; all values are averaged
            over processes and steps, and logged under their names. It may have three methods: `set_progress(share)`,
            called before every forward pass with the share of training done, 0 to 1; `end_step()`, called after every
            optimizer step; and `count_items(batch) -> (k,)`, called on all batches of an optimizer step before its
            first forward pass. The average over its passes is then given to `objective(batch, draws, counts)`.
        dataset: the training set, with random access or as a stream (`datasets.IterableDataset` or torch's).
        collate: turns a list of items into a batch, a dict of tensors. It should draw no random numbers.
        parameter_groups: groups for AdamW (default: one of all parameters with `requires_grad`).
        evaluate: `evaluate(step) -> {name: number}`, called on all processes every `evaluate_every` steps and at the
            end of training. It runs without gradients, in evaluation mode and with the averaged weights.
        evaluate_every: steps between evaluations (default: `args.eval_steps`, or an epoch).

    Raises:
        ValueError: a tracker is not installed, there are fewer processes than `args.num_processes`, a stream has no
            `max_train_steps`, or no parameter can be trained.

    Attributes:
        objective: the prepared module.
        unwrapped: the same module without a distributed wrapper.
        max_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of an epoch; for a stream, `max_steps`.
        parameters: what is optimized, clipped and averaged.
        ema: the weight average, or `None`.
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
        evaluate_every: int | None = None,
    ) -> None:
        self.args, self.evaluate = args, evaluate
        self.output_dir = Path(args.output_dir)
        self.accelerator = make_accelerator(args)
        groups = parameter_groups or [{"params": [p for p in objective.parameters() if p.requires_grad]}]
        groups = [group | {"params": list(group["params"])} for group in groups]
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        if not self.parameters:
            raise ValueError("nothing to train: no parameter has requires_grad")
        optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay)
        self.batches = make_batches(dataset, collate, args, self.accelerator, num_workers)
        self.steps_per_epoch = self.batches.steps_per_epoch
        self.max_steps = args.max_train_steps or self.steps_per_epoch * args.num_train_epochs
        # Not prepared by accelerate, whose scheduler steps once per process and ties a checkpoint to their number.
        self.scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.num_warmup_steps,
            num_training_steps=self.max_steps,
        )
        sharded = is_sharded(self.accelerator)
        if sharded:
            prepare_sharding(self.accelerator, objective)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        average = partial(ShardedEMA if sharded else EMAModel, foreach=not sharded)
        self.ema = average(self.parameters, decay=args.ema_decay) if args.ema_decay else None
        self.unwrapped: Any = self.accelerator.unwrap_model(self.objective)
        self.accelerator.register_for_checkpointing(*filter(None, (self.scheduler, self.ema)))
        self.checkpoints = Checkpoints(self.output_dir, args.checkpoints_total_limit, self.accelerator)
        self.checkpoint_every = self._steps(args.checkpointing_steps)
        own = args.eval_steps if isinstance(args, TrainingArguments) else None
        self.evaluate_every = evaluate_every or own or self.steps_per_epoch
        self.step, self.seconds = 0, 0.0
        self.log = TrainingLog(self.accelerator)

    def describe(self) -> str:
        """Describe the run for the first lines of the log."""
        args, accelerator = self.args, self.accelerator
        trainable = sum(parameter.numel() for parameter in self.parameters)
        return (
            f"{self.batches.description}, {trainable:,} trainable parameters\n"
            f"{accelerator.num_processes} process(es) on {accelerator.device.type}, "
            f"mixed precision {accelerator.mixed_precision}{', sharded weights' * is_sharded(accelerator)}\n"
            f"effective batch {effective_batch(args, accelerator)} = {args.per_device_train_batch_size} images x "
            f"{accelerator.num_processes} process(es) x {args.gradient_accumulation_steps} accumulation step(s)\n"
            f"{self.max_steps} steps, {self.steps_per_epoch} per epoch"
        )

    def train(self) -> dict[str, Any]:
        """Run to `max_steps` and leave the averaged weights in the objective.

        On SIGTERM or SIGUSR1 the run saves a checkpoint after its current step, prints how to resume, and returns.

        Returns:
            `steps`, `seconds` (including those before a resume), `history` (a dict per log line and evaluation, each
            with its `step`), `interrupted`.

        Raises:
            ValueError: the checkpoint to resume from is damaged or belongs to another run, or the loss is not finite.
            OSError: a checkpoint could not be saved.
        """
        accelerator = self.accelerator
        accelerator.print(self.describe())
        if warning := slow_precision(accelerator.device, accelerator.mixed_precision, "--mixed_precision no"):
            accelerator.print(f"warning: {warning}")
        set_seed(self.args.seed, device_specific=True)
        self._resume()
        start_trackers(accelerator, self.args)
        self.objective.train()
        interrupted = self._run_steps()
        if interrupted:
            accelerator.print(
                f"stopped by a signal after step {self.step} of {self.max_steps}, checkpoint saved; to resume, run the "
                "same command with --resume_from_checkpoint latest"
            )
        elif self.ema is not None:
            self.ema.copy_to(self.parameters)
        accelerator.wait_for_everyone()
        return {
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "history": self.log.history,
            "interrupted": interrupted,
        }

    def finish(self) -> None:
        """Finish the trackers and leave the process group. A script calls this last.

        The distributed wrapper of the objective is dropped first. If it outlived the group, its destructor would wait
        for gloo's threads while it holds the interpreter lock that one of them may need, and hang (torch 2.13).
        """
        self.objective = self.unwrapped
        self.accelerator.end_training()

    def _run_steps(self) -> bool:
        """Train up to `max_steps`, log, evaluate and save; return whether a signal stopped the run earlier."""
        started, interrupted = time.perf_counter() - self.seconds, False
        quiet = not self.accelerator.is_local_main_process
        with (
            StopSignals() as signals,
            tqdm(total=self.max_steps, initial=self.step, desc="train", disable=quiet) as bar,
        ):
            batches = self.batches.from_step(self.step)
            while self.step < self.max_steps and not interrupted:
                self._optimizer_step(list(islice(batches, self.args.gradient_accumulation_steps)))
                self.step += 1
                self.seconds = time.perf_counter() - started
                bar.update()
                if self._is_due(self.args.logging_steps):
                    means = self.log.log(self.step, self.scheduler.get_last_lr()[0])
                    bar.set_postfix(loss=f"{means['loss']:.4f}")
                if self.evaluate and self._is_due(self.evaluate_every):
                    self._evaluate()
                interrupted = self._asked_to_stop(signals) and self.step < self.max_steps
                if interrupted or (self.checkpoint_every and self.step % self.checkpoint_every == 0):
                    self._save_checkpoint()
        return interrupted

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.max_steps

    def _optimizer_step(self, window: list[tuple[int, int, Batch]]) -> None:
        """Run all forward passes of one step. Their losses are means over all items of the step."""
        objective, counts = self.unwrapped, []
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
        if hasattr(self.unwrapped, "set_progress"):
            self.unwrapped.set_progress(self.step / self.max_steps)
        seed_generators(mix_seed(args.seed, epoch, micro_step, process), accelerator.device)
        with accelerator.accumulate(self.objective):
            metrics = self.objective(send_to_device(batch, accelerator.device), draws, *counts)
            accelerator.backward(metrics["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self._in_order(), args.max_grad_norm)
            self.optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                self.scheduler.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients and self.ema is not None:
            self.ema.step(self.parameters)
        self.log.add(metrics)

    def _in_order(self) -> list[nn.Parameter]:
        """What is optimized, in the order in which accelerate compares it with the sharded parameters of a model."""
        if not is_sharded(self.accelerator):
            return self.parameters
        optimized = set(map(id, self.parameters))
        return [parameter for parameter in self.objective.parameters() if id(parameter) in optimized]

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        modes = [(module, module.training) for module in self.objective.modules()]
        self.objective.eval()
        with kept_random_state(), self._averaged_weights(), torch.no_grad():
            metrics = {name: float(value) for name, value in self.evaluate(self.step).items()}
            reshard(self.objective)
        for module, mode in modes:
            module.training = mode
        self.log.record(self.step, {"epoch": self.step / self.steps_per_epoch} | metrics)

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
        """Whether any process got a signal. All processes learn of it in the same step."""
        if self.accelerator.num_processes == 1:
            return signals.received is not None
        if signals.received:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _save_checkpoint(self) -> None:
        progress = {"step": self.step, "seconds": self.seconds, "setup": self.batches.setup}
        progress |= self.log.state(self.step)

        def fill(folder: Path) -> None:
            self.accelerator.save_state(str(folder))
            if self.batches.state is not None:
                write_json(folder / self._stream_file, self.batches.state)
            if self.accelerator.is_main_process:
                write_json(folder / PROGRESS_FILE, progress)

        self.checkpoints.save(self.step, fill)

    def _resume(self) -> None:
        self.checkpoints.remove_leftovers()
        path = self.checkpoints.find(self.args.resume_from_checkpoint)
        if path is not None:
            self._load_checkpoint(path)
            self.accelerator.print(f"resuming from {path}, step {self.step} of {self.max_steps}")
        if self.ema is not None:
            self.ema.to(self.accelerator.device)

    def _load_checkpoint(self, path: Path) -> None:
        progress = read_json(path / PROGRESS_FILE)
        changed = [
            f"{name} was {progress['setup'].get(name)}, is {value}"
            for name, value in self.batches.setup.items()
            if progress["setup"].get(name) != value
        ]
        if changed:
            raise ValueError(f"{path} belongs to another run: {', '.join(changed)}")
        try:
            self.accelerator.load_state(str(path))
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} does not fit this model: {str(error).strip().splitlines()[0]}") from error
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.log.load_state(progress)
        if self.batches.state is not None:
            self.batches.state = read_json(path / self._stream_file)

    @property
    def _stream_file(self) -> str:
        return f"stream_{self.accelerator.process_index}.json"

    def _steps(self, every: str | None) -> int | None:
        return self.steps_per_epoch if every == "epoch" else int(every) if every else None
