"""Check that a run has as many processes as were requested.

A run with fewer processes stops at once instead of training with a smaller batch. accelerate 1.15 gives no warning:
`accelerate launch --cpu --num_processes 2` starts one process, as do a config file of two CPU processes and a single
visible GPU. On a machine without a GPU, `torchrun` starts processes that do not know of each other unless
`ACCELERATE_USE_CPU=true` is set.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from accelerate import Accelerator, PartialState
from accelerate.commands.config import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

LAUNCHERS = (("accelerate", "launch"), ("accelerate-launch",), ("accelerate.commands.launch",))


def this_process() -> PartialState:
    """The state of this process, before there is an accelerator.

    Only the first process on each machine shows this package's warnings, which are the same on all of them.
    """
    state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
    if not state.is_local_main_process:
        logging.getLogger("aselect_hf").setLevel(logging.ERROR)
    return state


def check_num_processes(accelerator: Accelerator | PartialState, expected: int | None = None) -> None:
    """Check that at least the requested number of processes work together.

    Args:
        accelerator: of the running script, or its state.
        expected: processes over all machines (default: as requested from the launcher). A launcher such as torchrun
            sets `WORLD_SIZE`; for `accelerate launch`, `--num_processes` or the config file is read from the command
            line of the parent process. If there is none of these, nothing is checked.

    Raises:
        ValueError: there are fewer processes (the message has the command that starts all), or `expected` is below 1.
    """
    if expected is not None:
        if isinstance(expected, bool) or not isinstance(expected, int) or expected < 1:
            raise ValueError(f"expected must be a number of processes of at least 1, got {expected!r}")
        promised, source = expected, "num_processes"
    else:
        promised, source = _promised()
    if accelerator.num_processes >= promised:
        return
    on_cpu = accelerator.device.type == "cpu"
    program = sys.orig_argv[2:] if sys.orig_argv[1:2] == ["-u"] else sys.orig_argv[1:]  # torchrun adds the -u
    command = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(promised), *program]
    raise ValueError(
        f"{source} requested {promised} processes, but this run has {accelerator.num_processes} on "
        f"{accelerator.device.type}; start it{'' if on_cpu else f' with {promised} GPUs'} as: "
        f"{'ACCELERATE_USE_CPU=true ' * on_cpu}{shlex.join(command)}"
    )


def _promised() -> tuple[int, str]:
    """The requested number of processes (0 if unknown) and the source of the request."""
    if {"LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():  # a cluster may set WORLD_SIZE alone, to its number of nodes
        return int(os.environ["WORLD_SIZE"]), "the launcher"
    for process in psutil.Process().parents():
        try:
            arguments, folder = _launch_arguments(process.cmdline()), process.cwd()
        except psutil.Error:  # another user's process, or one that has just ended
            continue
        if arguments is not None:
            return _asked_of_accelerate(arguments, folder), "accelerate launch"
    return 0, ""


def _launch_arguments(command: Sequence[str]) -> list[str] | None:
    """What follows `accelerate launch` on a command line; None for any other program."""
    names = [Path(word).name for word in command]
    for launcher in LAUNCHERS:
        for start in range(len(names)):
            if tuple(names[start : start + len(launcher)]) == launcher:
                return list(command[start + len(launcher) :])
    return None


def _asked_of_accelerate(arguments: list[str], folder: str) -> int:
    """`--num_processes`, or else that of the config file, which accelerate reads relative to `folder`."""
    args, _ = launch_command_parser().parse_known_args(arguments)
    if args.num_processes is not None:
        return args.num_processes
    if args.config_file is None and (args.cpu or not Path(default_config_file).is_file()):
        return 0
    return load_config_from_file(str(Path(folder, args.config_file or default_config_file))).num_processes
