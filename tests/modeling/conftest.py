"""A process in which this package cannot be imported (what a user of a saved folder has), and double precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PRELUDE = """
import importlib.abc, json, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not there")

BLOCKED = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Block())
import torch
torch.set_num_threads(1)
torch.set_grad_enabled(False)

def report(value):
    print("REPORT" + json.dumps(value))
"""


@pytest.fixture
def run_elsewhere(tmp_path: Path) -> Callable[..., Any]:
    """`run_elsewhere(script, *arguments, blocked=("aselect_hf",))`: run in a fresh process, far from the checkout.

    The script reads its arguments (anything JSON can hold) as `sys.argv[2:]` and hands one value back with
    `report(...)`. Packages in `blocked` cannot be imported. Code loaded with `trust_remote_code` is cached for this
    test only.
    """

    def run(script: str, *arguments: str, blocked: tuple[str, ...] = ("aselect_hf",)) -> Any:
        home = tmp_path / "elsewhere"
        home.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1"}
        if "aselect_hf" not in blocked:
            environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        isolated = ["-P"] if "aselect_hf" not in blocked else ["-I"]
        done = subprocess.run(
            [sys.executable, *isolated, "-c", PRELUDE + textwrap.dedent(script), json.dumps(blocked), *arguments],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.rpartition("REPORT")[2])

    return run


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps that are in single precision everywhere, such as those of diffusers' RMSNorm, keep double precision."""
    convert = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        single = tensor.dtype == torch.float64 and args[:1] == (torch.float32,)
        return tensor if single else convert(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
