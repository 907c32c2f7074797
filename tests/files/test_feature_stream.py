"""Features of streams: the rows of the same images read at once, one shard a tar, resumed, shared and bounded."""

from __future__ import annotations

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from aselect_hf.data import feature_stream
from aselect_hf.data.feature_set import Part, write_feature_set
from aselect_hf.data.feature_stream import write_streamed_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.sources import load_images
from tests.data.tars import write_tars


@pytest.fixture
def model(make_model):
    return make_model(num_channels=1)


def write(model, folder, output, **options):
    stream = load_images(folder, streaming=True)
    return write_streamed_features(model, stream, output, timesteps=[5], batch_size=3, progress=False, **options)


def test_tars_give_the_rows_of_the_same_images_read_at_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_stream, "CHUNK_IMAGES", 4)
    folder = write_tars(tmp_path / "tars", [5, 3, 2])
    found = write(model, folder, tmp_path / "streamed")
    assert (found.num_shards, found.num_images) == (3, 10)
    data = ImageData.of(load_images(folder))
    write_feature_set(model, data, tmp_path / "whole", timesteps=[5], batch_size=3, progress=False)
    streamed, whole = pd.read_parquet(tmp_path / "streamed"), pd.read_parquet(tmp_path / "whole")
    assert streamed["row"].tolist() == [*range(5), *range(3), *range(2)]
    assert streamed["id"].tolist() == [f"{number:04d}" for number in range(10)]
    assert streamed["label"].tolist() == whole["label"].tolist() == [0, 1] * 5
    column = next(name for name in streamed if name.endswith("_t5"))
    for vector, expected in zip(streamed[column], whole[column], strict=True):
        assert vector == pytest.approx(expected, abs=1e-5)


def test_finished_shards_stay_and_jobs_divide_the_tars(model, tmp_path):
    folder = write_tars(tmp_path / "tars", [3, 3, 3])
    output = tmp_path / "out"
    write(model, folder, output, part=Part(1, 2))
    shards = sorted(path.name for path in output.glob("*.parquet"))
    assert shards == ["features-00001-of-00003.parquet"]
    finished = (output / shards[0]).stat()
    write(model, folder, output)
    assert (output / shards[0]).stat().st_mtime_ns == finished.st_mtime_ns
    assert len(list(output.glob("*.parquet"))) == 3


def test_another_stream_or_labels_without_numbers_are_refused(model, tmp_path):
    write(model, write_tars(tmp_path / "tars", [3]), tmp_path / "out")
    with pytest.raises(ValueError, match="holds features of another request"):
        write(model, write_tars(tmp_path / "others", [3, 2]), tmp_path / "out")
    with pytest.raises(ValueError, match="label_column '__key__' of a stream must hold integers or named classes"):
        write(model, tmp_path / "tars", tmp_path / "new", label_column="__key__")
    with pytest.raises(ValueError, match="the stream has no column 'picture'"):
        write(model, tmp_path / "tars", tmp_path / "new", image_column="picture")
    assert not (tmp_path / "new").exists()


def test_text_labels_are_left_out_and_said_so(model, tmp_path, caplog):
    """They can be numbered only when all of them are known."""
    picture = Image.fromarray(np.zeros((8, 8), np.uint8))
    rows = datasets.Dataset.from_dict({"image": [picture] * 2, "label": ["cat", "dog"]})
    (tmp_path / "data").mkdir()
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "data" / "train.parquet")
    with caplog.at_level("WARNING", logger="aselect_hf"):
        write(model, tmp_path / "data", tmp_path / "out")
    assert pd.read_parquet(tmp_path / "out")["label"].isna().all()
    assert "no labels are read: label of the stream holds" in caplog.text
