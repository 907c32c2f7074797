"""Two real processes over gloo: the numbers and files of one, and a clear end if one is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aselect_hf.data import feature_cache

from .two_processes import REQUESTS, work

ROOT = Path(__file__).parents[2]


def test_two_processes_end_in_the_numbers_and_files_of_one(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    (tmp_path / "two").mkdir()
    done = subprocess.run(
        [*command, "-m", "tests.processes.two_processes", str(tmp_path / "two")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / "two" / f"{index}.json").read_text()) for index in (0, 1))

    monkeypatch.setattr(feature_cache, "PART_IMAGES", 8)
    threads = torch.get_num_threads()
    one = json.loads(json.dumps(work(tmp_path / "one")))
    torch.set_num_threads(threads)
    for name in REQUESTS:
        for selection in (first["selections"][name], second["selections"][name]):
            _compare(selection, one[name], exact=not name.startswith("hfr"))
            assert selection["cost"]["processes"] == (1 if "standardized" in name else 2)
    assert abs(first["runs"] - second["runs"]) < 0.3 * first["runs"]

    features = {name: sorted((tmp_path / name / "features").glob("*.parquet")) for name in ("one", "two")}
    assert [path.read_bytes() for path in features["one"]] == [path.read_bytes() for path in features["two"]]

    # A process that works for longer than the limit is waited for; one that has ended is named.
    assert first["slow"] == second["slow"] == [0, 1]
    message, seconds = first["lost"]
    assert message.startswith("process 1 of 2 (from 0) ended or gave no sign of life for 2 s")
    assert seconds < 10


def _compare(found: dict, expected: dict, exact: bool) -> None:
    for name in expected:
        if name in ("scores", "standard_errors", "raw_scores", "per_image_scores") and not exact:
            values = [np.array(each[name], dtype=float) for each in (found, expected)]
            np.testing.assert_allclose(*values, atol=1e-6)
        elif name == "cost":
            assert found[name]["forward_passes"] == expected[name]["forward_passes"]
            assert found[name]["flops"] == pytest.approx(expected[name]["flops"])
        elif name != "control_scores" or exact:
            assert found[name] == expected[name], name
