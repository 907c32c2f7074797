"""Lock an output folder for one run, and reserve room for its final model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from aselect_hf.files import check_writable, reserved_space
from aselect_hf.training.checkpoints import check_resume

REPORT_BYTES = 2**22
"""Room for the files beside the weights: code, records, pictures."""


@contextmanager
def hold_output_dir(output_dir: Path, weight_bytes: int, resume: str | None = None) -> Iterator[Callable[[], None]]:
    """Lock `output_dir` for all processes of this run, and reserve room in it for the final model.

    Args:
        resume: the checkpoint that the run is to resume from, see `check_resume`.

    Yields:
        A function that frees the room, to be called right before the final model is written.

    Raises:
        ValueError, on every process: another run uses the folder, there is no room, or `resume` does not fit.
    """
    with ExitStack() as stack:
        room = stack.enter_context(ExitStack())
        failure: list[str | None] = [None]
        if PartialState().is_main_process:
            try:
                stack.enter_context(FileLock(check_writable(output_dir / ".lock"), timeout=0))
                check_resume(output_dir, resume)
                room.enter_context(reserved_space(output_dir, weight_bytes + REPORT_BYTES, "the final model"))
            except Timeout:
                failure = [
                    f"output_dir {output_dir} is in use by another run: wait until it ends, or give another folder"
                ]
            except (ValueError, OSError) as error:
                failure = [str(error)]
        [message] = broadcast_object_list(failure)
        if message is not None:
            raise ValueError(message)
        yield room.close
