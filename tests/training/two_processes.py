"""What `test_two_processes` launches under torchrun: each scenario trains, each process writes what it saw.

torchrun --nproc_per_node 2 -m tests.training.two_processes FOLDER <flags of the pretraining script>

Processes that wait for each other longer than `PATIENCE` seconds say where, and end.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aselect_hf.training.arguments import DataArguments, PretrainingArguments, PretrainModelArguments
from aselect_hf.training.loop import Trainer
from aselect_hf.training.parsing import parse_arguments
from aselect_hf.training.pretrain import pretrain

from .toys import FullDiskAt, MaskedPictures, StopAt, Toy, collate, segmenter

PATIENCE = 150
MASKED: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_train_steps": 6, "learning_rate": 1e-3}
"""A segmenter's training on `MaskedPictures`: every step is all of them, of which a forward pass has two."""


def train(folder: Path, objective: nn.Module | None = None, dataset=range(23), **options) -> Trainer:
    AcceleratorState._reset_state()
    defaults = {"per_device_train_batch_size": 2, "max_train_steps": 12, "learning_rate": 0.05, "logging_steps": 1}
    args = PretrainingArguments(output_dir=str(folder), **defaults | options)
    trainer = Trainer(objective or Toy(dropout=0.5), dataset, getattr(dataset, "collate", collate), args)
    trainer.record = trainer.train()
    trainer.toy = trainer.accelerator.unwrap_model(trainer.objective)
    return trainer


def stream() -> datasets.IterableDataset:
    """Nine numbers: the even ones for the first process, the odd ones for the second."""
    return datasets.Dataset.from_dict({"x": list(range(9))}).to_iterable_dataset()


def main(folder: Path, flags: list[str]) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    found = scenarios(folder)
    AcceleratorState._reset_state()
    gc.collect()
    end_training = Accelerator.end_training

    def note_wrappers(accelerator: Accelerator) -> None:
        found["wrappers at the end"] = sum(isinstance(each, DistributedDataParallel) for each in gc.get_objects())
        end_training(accelerator)

    Accelerator.end_training = note_wrappers
    pretrain(*parse_arguments((PretrainModelArguments, DataArguments, PretrainingArguments), None, flags))
    (folder / f"{found['process']}.json").write_text(json.dumps(found))


def scenarios(folder: Path) -> dict[str, object]:
    whole = train(folder / "whole")
    process = whole.accelerator.process_index
    found: dict[str, object] = {"process": process, "whole": whole.toy.layer.weight.tolist()}

    stopped = train(folder / "stopped", StopAt(4, signal.SIGTERM) if process == 1 else None)
    found["interrupted"] = [stopped.record["steps"], stopped.record["interrupted"]]
    resumed = train(folder / "stopped", resume_from_checkpoint="latest")
    found["resumed"] = resumed.toy.layer.weight.tolist()

    streamed = train(folder / "stream", dataset=stream(), checkpointing_steps=5)
    found["stream"] = streamed.toy.seen
    path = str(folder / "stream" / "checkpoint-5")
    found["stream_resumed"] = train(folder / "again", dataset=stream(), resume_from_checkpoint=path).toy.seen

    masked = train(folder / "masked", segmenter(gate=True), MaskedPictures(), **MASKED)
    found["masked"] = [values.flatten().tolist() for values in masked.toy.state_dict().values()]
    found["masked_history"] = masked.record["history"]

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        train(folder / "full", FullDiskAt(4, 1000) if process == 1 else None, checkpointing_steps=2)
    except OSError as error:
        found["full_disk"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
