"""Endless training batches, in main memory, whose order depends only on the seed and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from aselect_hf.training.arguments import PretrainingArguments

Collate = Callable[[list[Any]], dict[str, torch.Tensor]]
Batch = dict[str, torch.Tensor]


class EpochBatches:
    """Batches of a data set with random access, in a new order every epoch.

    An epoch is a whole number of optimizer steps: the remainder of the permutation is dropped, and a data set smaller
    than one effective batch is repeated. One process with batch 2b, two processes with b, and two accumulation steps of
    b therefore see the same images in the same steps.

    Attributes:
        steps_per_epoch: optimizer steps.
        setup: values that must be unchanged when a checkpoint is resumed.
        state: position of this process beyond the step; always `None` here.
    """

    state: dict[str, int] | None = None

    def __init__(
        self, dataset: Any, collate: Collate, args: PretrainingArguments, accelerator: Accelerator, num_workers: int
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("the training set is empty")
        effective = effective_batch(args, accelerator)
        self.steps_per_epoch = max(1, len(dataset) // effective)
        self.accumulation = args.gradient_accumulation_steps
        loader = DataLoader(
            dataset,
            batch_size=args.per_device_train_batch_size,
            sampler=RandomSampler(dataset, num_samples=self.steps_per_epoch * effective),
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )
        self.accelerator, self.loader = accelerator, accelerator.prepare(loader)
        self.loader.device = None  # batches wait in main memory, so accumulation needs no device memory
        self.description = f"{len(dataset)} training images"
        self.setup = {"seed": args.seed, "effective batch": effective, "training images": len(dataset)}

    def from_step(self, step: int) -> Iterator[tuple[int, int, Batch]]:
        """Yield `(epoch, micro step of the epoch, batch)` from an optimizer step on."""
        while True:
            epoch, done = divmod(step, self.steps_per_epoch)
            first = done * self.accumulation
            self.loader.set_epoch(epoch)
            loader = self.accelerator.skip_first_batches(self.loader, first) if done else self.loader
            for micro_step, batch in enumerate(loader, start=first):
                yield epoch, micro_step, batch
            step += self.steps_per_epoch - done


class StreamBatches:
    """Batches of a stream that every process repeats endlessly, so uneven shards never wait for each other.

    A `datasets.IterableDataset` is split by process. Of any other stream, each process keeps every n-th batch.
    `set_epoch` is called before each pass, which gives a shuffle buffer a new order. A resumed run reads the current
    pass again up to its position, so it gets identical batches.
    """

    description = "a stream of training images"

    def __init__(
        self, dataset: Any, collate: Collate, args: PretrainingArguments, accelerator: Accelerator, num_workers: int
    ) -> None:
        if not args.max_train_steps:
            raise ValueError("a streamed data set has no length: give max_train_steps")
        process, processes = accelerator.process_index, accelerator.num_processes
        batch_size = args.per_device_train_batch_size
        if isinstance(dataset, datasets.IterableDataset):
            self.dataset: Any = split_dataset_by_node(dataset, rank=process, world_size=processes)
        else:
            self.dataset = IterableDatasetShard(dataset, batch_size, True, processes, process)
        self.loader: DataLoader = DataLoader(
            self.dataset, batch_size=batch_size, drop_last=True, collate_fn=collate, num_workers=num_workers
        )
        self.steps_per_epoch = args.max_train_steps
        self.accumulation = args.gradient_accumulation_steps
        self.state: dict[str, int] = {"passes": 0, "batches": 0}
        self.setup = {"seed": args.seed, "effective batch": effective_batch(args, accelerator)}
        self.setup |= {"number of processes": processes, "number of workers": num_workers}

    def from_step(self, step: int) -> Iterator[tuple[int, int, Batch]]:
        """Yield `(0, micro step of the run, batch)` from an optimizer step on, and update `state`."""
        micro_step, seen = step * self.accumulation, self.state["batches"]
        for passes in count(self.state["passes"]):
            self.dataset.set_epoch(passes)
            for batch in islice(self.loader, seen, None):
                seen += 1
                self.state = {"passes": passes, "batches": seen}
                yield 0, micro_step, batch
                micro_step += 1
            if not seen:
                raise ValueError(
                    f"the stream gives a process less than one batch of {self.loader.batch_size} images per pass: "
                    "lower per_device_train_batch_size, or the number of processes or workers"
                )
            seen = 0


def effective_batch(args: PretrainingArguments, accelerator: Accelerator) -> int:
    return args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps


def make_batches(
    dataset: Any, collate: Collate, args: PretrainingArguments, accelerator: Accelerator, num_workers: int
) -> EpochBatches | StreamBatches:
    """Batches of a data set or, for an iterable one, of a stream."""
    streamed = isinstance(dataset, datasets.IterableDataset | IterableDataset)
    kind = StreamBatches if streamed else EpochBatches
    return kind(dataset, collate, args, accelerator, num_workers)
