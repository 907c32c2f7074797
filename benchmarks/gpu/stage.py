"""What every stage is given: the device, the clock, and a record that is saved whenever it grows."""

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
        device: where everything runs.
        tiny: small networks and few images, to try the whole path in seconds.
        data: folder of parquet files with the splits `train` and `validation`.
        output_dir: for what is kept; the results go to `on-gpu.json` there.
        scratch: for checkpoints and caches.
    """

    device: torch.device
    tiny: bool
    data: Path
    output_dir: Path
    scratch: Path
    results: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write what there is so far."""
        write_json(self.output_dir / RESULTS_FILE, self.results)


@dataclass
class Stage:
    """One stage while it runs; what it notes is on disk at once.

    Args:
        record: what the results hold under the stage's name.
        ends: when its time is up, on `time.perf_counter`.
    """

    setting: Setting
    record: dict[str, Any]
    ends: float

    @property
    def device(self) -> torch.device:
        return self.setting.device

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.perf_counter()

    def note(self, name: str, value: Any) -> None:
        self.record[name] = value
        self.setting.save()

    def add(self, name: str, value: Any) -> None:
        """Append to a list."""
        self.note(name, [*self.record.get(name, []), value])

    def skip(self, what: str, reason: Any) -> None:
        self.add("skipped", {"what": what, "reason": " ".join(str(reason).split())[:300]})

    def has_time_for(self, what: str, seconds: float) -> bool:
        """Whether so much is left; what is skipped for want of time is noted."""
        if self.left >= seconds:
            return True
        self.skip(what, f"{self.left:.0f} s are left")
        return False

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails inside is noted, with its error, and the stage goes on."""
        try:
            yield
        except Exception as error:
            self.skip(what, f"{type(error).__name__}: {error}")
            print(f"skipped {what}: {type(error).__name__}: {str(error)[:300]}", flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What `run` gives, and its wall-clock seconds."""
    synchronize(device)
    started = time.perf_counter()
    found = run()
    synchronize(device)
    return found, time.perf_counter() - started
