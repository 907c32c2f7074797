"""Notice a stop signal (SIGTERM, or Slurm's SIGUSR1) without ending in the middle of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = ("SIGTERM", "SIGUSR1")


class StopSignals:
    """Context manager in which a stop signal only sets `received` to its name."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only the main thread can set handlers, and Windows has no SIGUSR1.
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
            self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
