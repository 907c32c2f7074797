"""A comparison and a stream that are killed at any point end in the same numbers when they are run again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from aselect_hf.compare.run import compare_strategies
from aselect_hf.data.feature_stream import write_streamed_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from tests.data.tars import write_tars


@pytest.fixture
def model(make_model):
    return make_model(num_channels=1)


@pytest.fixture(autouse=True)
def _one_thread():
    """As in the processes that are killed: the number of threads changes the last bits of a sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def split(normal, seed: int) -> ImageData:
    labels = np.arange(18) % 3
    return ImageData(
        0.1 * normal(18, 1, 8, 8, seed=seed) + torch.from_numpy(labels / 3).float().view(-1, 1, 1, 1), labels
    )


def compare(model, splits, cache: Path) -> list[tuple]:
    found = compare_strategies(
        model, splits, strategies=["hfr", "grid"], timesteps=[5, 300], num_images=8, num_seeds=1, batch_size=4,
        cache_dir=cache, progress=False,
    )  # fmt: skip
    return [(row.strategy, row.selection.timestep, row.selection.scores, row.test_accuracies) for row in found.rows]


def stream(model, tars: Path, output: Path) -> pd.DataFrame:
    data = load_images(tars, streaming=True)
    write_streamed_features(model, data, output, timesteps=[5], batch_size=2, progress=False)
    return pd.read_parquet(output)


def die_after(calls: int, model, work, *arguments) -> None:
    extract, seen = type(model).extract_features, []

    def count(self, *args, **options):
        seen.append(args)
        if len(seen) > calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return extract(self, *args, **options)

    type(model).extract_features = count
    work(model, *arguments)


@pytest.mark.parametrize("calls", [0, 3, 11])
def test_a_killed_comparison(calls, model, normal, tmp_path, run_together):
    splits = {name: split(normal, seed) for seed, name in enumerate(("train", "validation", "test"))}
    expected = compare(model, splits, tmp_path / "whole")
    assert run_together(die_after, (calls, model, compare, splits, tmp_path / "cache")) == [-signal.SIGKILL]
    for found, whole in zip(compare(model, splits, tmp_path / "cache"), expected, strict=True):
        assert found[:2] == whole[:2]
        np.testing.assert_allclose(found[2], whole[2], atol=1e-6)
        assert found[3] == whole[3]


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_a_killed_stream(calls, model, tmp_path, run_together):
    tars = write_tars(tmp_path / "tars", [3, 4, 2])
    expected = stream(model, tars, tmp_path / "whole")
    assert run_together(die_after, (calls, model, stream, tars, tmp_path / "out")) == [-signal.SIGKILL]
    found = stream(model, tars, tmp_path / "out")
    assert found.drop(columns=found.columns[-1]).equals(expected.drop(columns=found.columns[-1]))
    vectors = [np.stack(frame[found.columns[-1]]) for frame in (found, expected)]
    np.testing.assert_allclose(*vectors, atol=1e-6)
    assert not list((tmp_path / "out").glob(".*partial"))
