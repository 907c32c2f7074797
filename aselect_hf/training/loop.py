"""The one training loop: accelerate, weight averaging, atomic checkpoints, exact resume, progress."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from aselect_hf.training.arguments import TrainingArguments

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"


class Trainer:
    """Trains an objective: a module whose forward maps a batch and a generator to a loss.

    The generator is seeded by (seed, step, process), so every random draw of a step is the same after a resume.

    Args:
        objective: the module to train; its parameters with `requires_grad` are optimized.
        dataset: the training set; `collate` turns a list of its items into a batch (a dict of tensors).
        args: see `TrainingArguments`.
    """

    def __init__(
        self,
        objective: nn.Module,
        dataset: Any,
        collate: Callable[[list[Any]], dict[str, torch.Tensor]],
        args: TrainingArguments,
        num_workers: int = 0,
    ) -> None:
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=args.report_to,
            project_dir=args.output_dir,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        )
        set_seed(args.seed)
        loader = DataLoader(
            dataset,
            batch_size=args.per_device_train_batch_size,
            shuffle=True,
            drop_last=len(dataset) >= args.per_device_train_batch_size * self.accelerator.num_processes,
            collate_fn=collate,
            num_workers=num_workers,
        )
        parameters = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
        self.objective, self.optimizer, self.loader = self.accelerator.prepare(objective, optimizer, loader)
        self.steps_per_epoch = math.ceil(len(self.loader) / args.gradient_accumulation_steps)
        self.max_steps = args.max_train_steps or self.steps_per_epoch * args.num_train_epochs
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=args.num_warmup_steps * self.accelerator.num_processes,
            num_training_steps=self.max_steps * self.accelerator.num_processes,
        )
        self.scheduler = self.accelerator.prepare(scheduler)
        self.ema = EMAModel(parameters, decay=args.ema_decay) if args.ema_decay else None
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)
        self.parameters = parameters
        self.num_samples = len(dataset)

    def describe(self) -> str:
        """What will run, for the first lines of the log."""
        trainable = sum(p.numel() for p in self.parameters)
        batch = (
            self.args.per_device_train_batch_size
            * self.accelerator.num_processes
            * self.args.gradient_accumulation_steps
        )
        return (
            f"{self.num_samples} training images, {trainable:,} trainable parameters\n"
            f"{self.accelerator.num_processes} process(es) on {self.accelerator.device}, "
            f"mixed precision {self.accelerator.mixed_precision}\n"
            f"effective batch {batch}, {self.max_steps} steps of {self.steps_per_epoch} an epoch"
        )

    def train(self) -> dict[str, Any]:
        """Run to `max_steps` and leave the averaged weights in the objective. Returns the training record."""
        accelerator, args = self.accelerator, self.args
        accelerator.print(self.describe())
        if args.report_to:
            accelerator.init_trackers("aselect", config=vars(args))
        step, seconds, history = self._resume()
        started, losses = time.perf_counter() - seconds, []
        bar = tqdm(total=self.max_steps, initial=step, desc="train", disable=not accelerator.is_local_main_process)
        self.objective.train()
        while step < self.max_steps:
            epoch, done = divmod(step, self.steps_per_epoch)
            self.loader.set_epoch(epoch)
            batches = accelerator.skip_first_batches(self.loader, done * args.gradient_accumulation_steps)
            for index, batch in enumerate(batches, start=done * args.gradient_accumulation_steps):
                with accelerator.accumulate(self.objective):
                    loss = self.objective(batch, self._generator(epoch, index))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.parameters, args.max_grad_norm)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                losses.append(loss.detach())
                if not accelerator.sync_gradients:
                    continue
                step += 1
                bar.update()
                if self.ema is not None:
                    self.ema.step(self.parameters)
                if step % args.logging_steps == 0 or step == self.max_steps:
                    mean_loss = accelerator.gather(torch.stack(losses)).mean().item()
                    losses.clear()
                    if not math.isfinite(mean_loss):
                        raise RuntimeError(f"the loss is {mean_loss} at step {step}: lower learning_rate")
                    history.append({"step": step, "loss": mean_loss, "learning_rate": self.scheduler.get_last_lr()[0]})
                    accelerator.log(history[-1], step=step)
                    bar.set_postfix(loss=f"{mean_loss:.4f}")
                if args.checkpointing_steps and step % args.checkpointing_steps == 0:
                    self._save_checkpoint(step, time.perf_counter() - started, history)
                if step >= self.max_steps:
                    break
        bar.close()
        accelerator.wait_for_everyone()
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        accelerator.end_training()
        return {"steps": step, "seconds": round(time.perf_counter() - started, 1), "history": history}

    def _generator(self, epoch: int, index: int) -> torch.Generator:
        key = (self.args.seed, epoch, index, self.accelerator.process_index)
        seed = 0
        for part in key:
            seed = (seed * 1_000_003 + part) % 2**63
        return torch.Generator().manual_seed(seed)

    def _save_checkpoint(self, step: int, seconds: float, history: list[dict[str, float]]) -> None:
        """Write `checkpoint-<step>` under a temporary name, rename it, then drop the oldest."""
        target = self.output_dir / f"checkpoint-{step}"
        temporary = self.output_dir / f".checkpoint-{step}.partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        if self.accelerator.is_main_process:
            record = {"step": step, "seconds": seconds, "history": history}
            (temporary / PROGRESS_FILE).write_text(json.dumps(record))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            for old in self._checkpoints()[: -self.args.checkpoints_total_limit]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _checkpoints(self) -> list[Path]:
        found = self.output_dir.glob("checkpoint-*")
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def _resume(self) -> tuple[int, float, list[dict[str, float]]]:
        """Steps done, seconds spent and the log so far."""
        wanted = self.args.resume_from_checkpoint
        if not wanted:
            return 0, 0.0, []
        if wanted == "latest":
            checkpoints = self._checkpoints()
            if not checkpoints:
                logger.warning("no checkpoint in %s: starting from the beginning", self.output_dir)
                return 0, 0.0, []
            path = checkpoints[-1]
        else:
            path = Path(wanted)
        if not (path / PROGRESS_FILE).is_file():
            raise ValueError(
                f"resume_from_checkpoint={wanted!r} is not a checkpoint: {path / PROGRESS_FILE} is missing"
            )
        self.accelerator.load_state(str(path))
        record = json.loads((path / PROGRESS_FILE).read_text())
        return record["step"], record["seconds"], record["history"]
