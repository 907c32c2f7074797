"""The accelerator of a run: gradient accumulation, trackers, and checkpoints for any number of processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, LoggerType
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aselect_hf.training.arguments import PretrainingArguments
from aselect_hf.training.processes import check_num_processes
from aselect_hf.training.sharding import check_sharding


def make_accelerator(args: PretrainingArguments) -> Accelerator:
    """Make the accelerator that `args` describe.

    Raises:
        ValueError: a tracker is unknown or not installed, or the number of processes is not `args.num_processes`.
    """
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # An epoch is a whole number of steps, so the end of a data loader must not trigger an optimizer step.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=check_trackers(args.report_to),
        project_dir=args.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    check_num_processes(accelerator, args.num_processes)
    check_sharding(accelerator)
    accelerator.register_save_state_pre_hook(_save_unwrapped)
    accelerator.register_load_state_pre_hook(_load_unwrapped)
    return accelerator


def start_trackers(accelerator: Accelerator, args: PretrainingArguments) -> None:
    """Start the trackers, if any, with the arguments of the run."""
    if accelerator.log_with:
        scalars = (bool, int, float, str)
        config = {name: value if isinstance(value, scalars) else str(value) for name, value in args.public().items()}
        accelerator.init_trackers("aselect", config=config)


def check_trackers(report_to: str | None) -> list[LoggerType] | None:
    """Parse `report_to`: names of trackers, separated by commas, or `"all"` for every installed one.

    Raises:
        ValueError: a tracker is unknown, or its package is not installed.
    """
    if not report_to:
        return None
    installed = get_available_trackers()
    if report_to == "all":
        if not installed:
            raise ValueError("report_to=all, but no tracker is installed: try pip install tensorboard")
        return installed
    known = [name for name in LoggerType.list() if name != "all"]
    names = [name.strip() for name in report_to.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"report_to must be all, or names among {', '.join(known)}; got {name!r}")
        if LoggerType(name) not in installed:
            raise ValueError(f"report_to={name!r}: the package {name} is not installed")
    return [LoggerType(name) for name in names]


def _save_unwrapped(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], _: str) -> None:
    """Save weights without the `module.` prefix of DDP, so that any number of processes can resume."""
    for index, state in enumerate(weights):
        if isinstance(models[index], DistributedDataParallel):
            weights[index] = type(state)((name.removeprefix("module."), value) for name, value in state.items())


def _load_unwrapped(models: list[nn.Module], _: str) -> None:
    models[:] = [model.module if isinstance(model, DistributedDataParallel) else model for model in models]
