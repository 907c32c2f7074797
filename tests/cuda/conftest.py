"""Tests of what a GPU may change: they run where there is one, and are skipped elsewhere.

`ASELECT_TEST_DEVICE=cpu` runs them on the CPU, so that the tests themselves do not rot.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks.gpu.speed import tf32

DEVICE = os.environ.get("ASELECT_TEST_DEVICE", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "cuda":
            item.add_marker(pytest.mark.cuda)
            if DEVICE == "cuda" and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """Convolutions in TF32, cuDNN's default, round to three digits; every run starts with a fresh accelerator."""
    with tf32(False):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
