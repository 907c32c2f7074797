"""The benchmark of training runs from end to end on tiny networks."""

from __future__ import annotations

import json

import pytest

from benchmarks.training import main


def test_tiny_benchmark_measures_every_arm(tmp_path, capsys):
    main(["--tiny", "--output", str(tmp_path / "training.json")])
    found = json.loads((tmp_path / "training.json").read_text())
    assert found.pop("protocol")["tiny"]
    assert {part: len(arms) for part, arms in found.items()} == {
        "loop": 3,
        "latents": 2,
        "tasks, frozen": 3,
        "tasks, whole": 3,
    }
    for arms in found.values():
        assert all(arm["images_per_cpu_second"]["median"] > 0 for arm in arms.values())
        assert next(iter(arms.values()))["speed_over_first"]["median"] == 1
    assert "| loop | bare loop |" in capsys.readouterr().out


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m benchmarks.training --parts loop" in capsys.readouterr().out
