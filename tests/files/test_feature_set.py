"""Features as a data set: rows that can be matched to images, whole shards, any number of jobs, one request."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from aselect_hf.data import feature_set
from aselect_hf.data.feature_set import Part, default_num_shards, write_feature_set
from aselect_hf.data.image_data import ImageData, load_images

FEATURES, TIMESTEPS = ["blocks.0.hidden", "blocks.1.query"], [5, 300]


@pytest.fixture
def pictures(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for index in range(10):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (8, 8), np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def model(make_model):
    return make_model(num_channels=1)


def write(model, data, folder, **options):
    shared = {"features": FEATURES, "timesteps": TIMESTEPS, "num_shards": 3, "batch_size": 3, "progress": False}
    return write_feature_set(model, data, folder, **shared | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*") if path.name != feature_set.RECORD}


def test_rows_name_their_images_and_other_tools_read_them(model, pictures, tmp_path):
    data = ImageData.of(load_images(pictures), name="pictures").sample(7, 0)
    found = write(model, data, tmp_path / "out")
    names = [f"features-{shard:05d}-of-00003.parquet" for shard in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["_features.json", *names]
    frame = pd.read_parquet(tmp_path / "out")
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["label"].names == ["a", "b"]
    assert loaded["id"] == frame["id"].tolist()
    for index, row in frame.iterrows():
        assert row["label_name"] == row["id"].split("/")[0] == loaded.features["label"].int2str(loaded[index]["label"])
        pixels = torch.from_numpy(np.asarray(Image.open(pictures / row["id"]))).float()[None, None] / 127.5 - 1
        expected = model.extract_features(pixels, features=FEATURES, timesteps=TIMESTEPS, output_format="pooled")
        for name, values in expected.items():
            number = name.replace(".", "_")
            for column, timestep in enumerate(TIMESTEPS):
                vector = row[f"{number}_t{timestep}"]
                assert vector.dtype == np.float32
                np.testing.assert_allclose(vector, values[0, column], atol=1e-5)
    assert sorted(frame["row"]) == sorted(data.rows)
    record = json.loads((tmp_path / "out" / "_features.json").read_text())
    column = record["columns"]["blocks_1_query_t300"]
    assert (column["feature"], column["timestep"], column["shape"]) == ("blocks.1.query", 300, [24])
    assert column["sigma"] == pytest.approx(model.noise_schedule.sigma(300))
    assert {"model", "revision", "prompt", "dtype", "preprocessing", "versions"} <= record.keys()
    assert found.num_images == 7


@pytest.mark.parametrize(("output_format", "shape"), [("tokens", (16, 24)), ("map", (24, 4, 4))])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tokens_and_maps_in_either_precision(model, normal, tmp_path, output_format, shape, dtype):
    pixels = normal(4, 1, 8, 8).clamp(-1, 1)
    data = ImageData(pixels, labels=[0, 1, -1, 1])
    write(model, data, tmp_path / "out", output_format=output_format, dtype=dtype, num_shards=1)
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["id"] == ["0", "1", "2", "3"]
    assert loaded["label"] == [0, 1, None, 1]
    expected = model.extract_features(pixels, features=FEATURES, timesteps=TIMESTEPS, output_format=output_format)
    values = np.array(loaded["blocks_1_query_t5"])
    assert values.shape == (4, *shape)
    tolerance = 1e-6 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(values, expected["blocks.1.query"][:, 0], atol=tolerance, rtol=tolerance)


def test_finished_shards_are_never_done_again(model, normal, tmp_path, monkeypatch, caplog):
    data = ImageData(normal(9, 1, 8, 8).clamp(-1, 1))
    write(model, data, tmp_path / "out")
    expected = contents(tmp_path / "out")
    damaged = tmp_path / "out" / "features-00001-of-00003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    batches, extract = [], type(model).extract_features

    def note(self, pixels, **options):
        batches.append(len(pixels))
        return extract(self, pixels, **options)

    monkeypatch.setattr(type(model), "extract_features", note)
    write(model, data, tmp_path / "out")
    assert batches == [3]
    assert f"{damaged} is damaged" in caplog.text
    assert contents(tmp_path / "out") == expected
    write(model, data, tmp_path / "out", num_shards=None)
    assert batches == [3]


def test_jobs_of_an_array_divide_the_shards(model, normal, tmp_path):
    data = ImageData(normal(9, 1, 8, 8).clamp(-1, 1))
    write(model, data, tmp_path / "whole")
    for index in (1, 0):
        write(model, data, tmp_path / "out", part=Part(index, 2))
        assert len(list((tmp_path / "out").glob("*.parquet"))) == [3, 1][index]
    write(model, data, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("text", ["2/2", "1", "a/2", "-1/2", "1/0"])
def test_a_part_that_does_not_exist_is_refused(text):
    with pytest.raises(ValueError, match=r"shard must be i/n with i in 0..n-1, .* got"):
        Part.parse(text)


def _die_at(model, data, folder: Path, batch: int) -> None:
    torch.set_num_threads(1)
    extract, seen = type(model).extract_features, []

    def count(self, *args, **options):
        seen.append(args)
        if len(seen) > batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return extract(self, *args, **options)

    type(model).extract_features = count
    write(model, data, folder, batch_size=2)


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_a_killed_run_ends_in_the_same_files(model, normal, tmp_path, run_together, batch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = ImageData(normal(9, 1, 8, 8).clamp(-1, 1))
    write(model, data, tmp_path / "whole", batch_size=2)
    assert run_together(_die_at, (model, data, tmp_path / "out", batch)) == [-signal.SIGKILL]
    write(model, data, tmp_path / "out", batch_size=2)
    torch.set_num_threads(threads)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*partial"))


def test_two_jobs_on_one_folder_share_the_work(model, normal, tmp_path, run_together):
    data = ImageData(normal(30, 1, 8, 8).clamp(-1, 1))
    both = (model, data, tmp_path / "out")
    assert run_together(_write_alone, both, both) == [0, 0]
    _write_alone(model, data, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    runs = [int(path.read_text()) for path in tmp_path.glob("runs-*")]
    assert sum(runs) == 2 * 30  # no image twice


def _write_alone(model, data, folder: Path) -> None:
    torch.set_num_threads(1)
    extract, images = type(model).extract_features, []

    def count(self, pixels, **options):
        images.append(len(pixels))
        return extract(self, pixels, **options)

    type(model).extract_features = count
    try:
        write(model, data, folder, num_shards=10)
    finally:
        type(model).extract_features = extract
    (folder.parent / f"runs-{os.getpid()}-{folder.name}").write_text(str(sum(images)))


def test_another_request_in_the_same_folder_is_refused(model, normal, tmp_path):
    data = ImageData(normal(4, 1, 8, 8).clamp(-1, 1))
    write(model, data, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds features of another request \(columns: .*choose another folder"):
        write(model, data, tmp_path / "out", timesteps=[5])
    with pytest.raises(ValueError, match="holds features of another request"):
        write(model, ImageData(data.items + 0.01), tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds other files \(letter.txt\)"):
        write(model, data, tmp_path / "other")


def test_float16_that_overflows_is_refused_and_leaves_no_shard(model, normal, tmp_path):
    with torch.no_grad():
        model.patch_embedding.weight.mul_(1e6)
    with pytest.raises(ValueError, match="float16 cannot hold blocks_"):
        write(model, ImageData(normal(4, 1, 8, 8).clamp(-1, 1)), tmp_path / "out", dtype="float16")
    assert not list((tmp_path / "out").glob("features-*"))


def test_a_full_disk_is_one_error_and_finished_shards_stay(model, normal, small_disk, fill, monkeypatch):
    folder, batches, extract = small_disk(2**19), [], type(model).extract_features
    data = ImageData(normal(9, 1, 8, 8).clamp(-1, 1))

    def fill_then_extract(self, *args, **options):
        batches.append(1)
        if len(batches) == 2:
            fill(folder)
        return extract(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "extract_features", fill_then_extract)
        with pytest.raises((OSError, ValueError), match=r"could not be written|is needed"):
            write(model, data, folder / "out")
    finished = {path.name for path in (folder / "out").glob("features-*.parquet")}
    assert finished == {"features-00000-of-00003.parquet"}
    (folder / "filler").unlink()
    write(model, data, folder / "out")
    assert len(list((folder / "out").glob("features-*.parquet"))) == 3


def test_the_number_of_shards_depends_on_the_size_alone():
    assert [default_num_shards(count, 4 * 1152) for count in (1, 256, 257, 10**6, 10**9)] == [1, 1, 2, 128, 8584]
