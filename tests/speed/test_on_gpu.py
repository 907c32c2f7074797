"""The prepared command for a GPU, tried on the CPU: every stage gives its numbers, and what cannot run says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aselect_hf.selection import RULES
from benchmarks import on_gpu


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *stages: str) -> dict[str, Any]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    on_gpu.main(["--cpu", "--tiny", "--minutes", "20", "--output_dir", str(folder), "--stages", *stages])
    return json.loads((folder / "on-gpu.json").read_text())


@pytest.mark.slow
def test_every_stage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run(tmp_path, monkeypatch, *on_gpu.STAGES)
    assert [*results] == [*on_gpu.STAGES]
    assert not [name for name, record in results.items() if "error" in record]
    assert results["tests"]["exit_code"] == 0
    assert {row["contender"] for row in results["attention"]["rows"]} == {"ours", "ours, fixed timestep"}
    assert {row["batch"] for row in results["batch_size"]["rows"]} == {8, 64, 256}
    assert results["train"]["run"]["steps"] == 4
    curve = results["curve"]
    assert curve["truth"].keys() == curve["fresh_noise_truth"].keys()
    assert {each["method"] for each in curve["picks"]} == {*RULES} - {"fixed"}
    assert all(each["loss_in_points"] >= 0 for each in curve["picks"])
    monkeypatch.setattr(on_gpu, "RESULTS", tmp_path / "kept")
    on_gpu.main(["--report", str(tmp_path / "on-gpu.json")])
    assert len([*(tmp_path / "kept").glob("on-gpu-*.json")]) == 1


def test_a_stage_that_fails_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(stage: Any) -> None:
        stage.note("before", 1)
        raise RuntimeError("no luck")

    monkeypatch.setitem(on_gpu.STAGES, "throughput", (fails, 5))
    results = run(tmp_path, monkeypatch, "throughput", "environment")
    assert results["throughput"]["before"] == 1
    assert "no luck" in results["throughput"]["error"]
    assert results["environment"]["versions"]["torch"]


def test_without_a_gpu_it_says_how_to_try_it(capsys: pytest.CaptureFixture[str]) -> None:
    if on_gpu.torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(SystemExit):
        on_gpu.main(["--stages", "environment"])
    assert "--cpu --tiny" in capsys.readouterr().err
