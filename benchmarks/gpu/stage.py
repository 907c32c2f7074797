"""Parts that every stage receives: the device, the clock, and a record that is saved at every change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aselect_hf.files import write_json

RESULTS_FILE = "on-gpu.json"


@dataclass
class Setting:
    """One run on one device.

    Args:
        device: device of all stages.
        tiny: use small networks and few images, to try everything in seconds.
        data: folder of parquet files with the splits `train` and `validation`.
        output_dir: folder for the results, `on-gpu.json`.
        scratch: folder for checkpoints and caches.
    """

    device: torch.device
    tiny: bool
    data: Path
    output_dir: Path
    scratch: Path
    results: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write the results so far."""
        write_json(self.output_dir / RESULTS_FILE, self.results)


@dataclass
class Stage:
    """A running stage; its notes are written to disk at once.

    Args:
        record: results of the stage.
        ends: end of its time, on the clock of `time.perf_counter`.
    """

    setting: Setting
    record: dict[str, Any]
    ends: float

    @property
    def device(self) -> torch.device:
        return self.setting.device

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.ends - time.perf_counter()

    def note(self, name: str, value: Any) -> None:
        self.record[name] = value
        self.setting.save()

    def add(self, name: str, value: Any) -> None:
        """Append a value to a list in the record."""
        self.note(name, [*self.record.get(name, []), value])

    def skip(self, what: str, reason: Any) -> None:
        self.add("skipped", {"what": what, "reason": " ".join(str(reason).split())[:300]})

    def has_time_for(self, what: str, seconds: float) -> bool:
        """Whether `seconds` are left; if not, note that `what` is skipped."""
        if self.left >= seconds:
            return True
        self.skip(what, f"{self.left:.0f} s are left")
        return False

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note an error in the block as skipped, and let the stage continue."""
        try:
            yield
        except Exception as error:
            self.skip(what, f"{type(error).__name__}: {error}")
            print(f"skipped {what}: {type(error).__name__}: {str(error)[:300]}", flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of `run`, and its wall-clock seconds."""
    synchronize(device)
    started = time.perf_counter()
    found = run()
    synchronize(device)
    return found, time.perf_counter() - started
