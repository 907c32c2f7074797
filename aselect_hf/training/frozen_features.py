"""Features of a frozen backbone at one timestep: computed once per image, stored in a file, read in every epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from aselect_hf.files import allocate, check_space, disk_errors
from aselect_hf.training.objective import TaskObjective
from aselect_hf.training.task_dataset import TaskDataset

BYTES = 4


@torch.no_grad()
def keep_features(
    objective: TaskObjective, dataset: TaskDataset, path: Path, accelerator: Accelerator, batch_size: int, flipped: bool
) -> np.memmap:
    """Features of all images, memory-mapped: `(1 + flipped, images, tokens, features, width)` float32.

    If the head averages tokens, the file stores the average, and `tokens` is 1. With `flipped`, features of mirrored
    images are stored too. Every process computes its share.

    Raises:
        ValueError: the disk has no room.
    """
    config = objective.dit.config
    tokens = 1 if objective.pools else config.num_patches
    shape = (1 + flipped, len(dataset), tokens, len(objective.features), config.feature_width(*objective.features))
    needed = BYTES * int(np.prod(shape))
    check_space(path.parent, needed, "the features", hint=": use --cache_features False")
    accelerator.wait_for_everyone()  # every process checks the space before one takes it
    if accelerator.is_main_process:
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        with disk_errors(path), path.open("rb+") as file:
            allocate(file, path.stat().st_size)  # a full disk under a memory map kills the process
    accelerator.wait_for_everyone()
    store = np.load(path, mmap_mode="r+")
    rows = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    loader = DataLoader(torch.utils.data.Subset(dataset, rows), batch_size=batch_size, collate_fn=dataset.collate)
    starts = range(0, len(rows), batch_size)
    bar = tqdm(loader, desc=f"features of {dataset.data.name}", disable=not accelerator.is_local_main_process)
    for start, batch in zip(starts, bar, strict=True):
        part = rows[start : start + batch_size]
        inputs = {name: value.to(accelerator.device) for name, value in batch.items() if torch.is_tensor(value)}
        for mirror in range(1 + flipped):
            with accelerator.autocast():
                found = objective.read_features(inputs, bool(mirror))
            store[mirror, part] = (found.mean(dim=1, keepdim=True) if objective.pools else found).cpu().numpy()
    store.flush()
    accelerator.wait_for_everyone()
    return np.load(path, mmap_mode="r")
