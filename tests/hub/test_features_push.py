"""A feature set goes to the Hub in one commit, and `datasets` reads it from there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .conftest import ClientProcess
from .server import HubServer


def write(folder: Path, num_shards: int) -> None:
    import torch

    from aselect_hf.conversion import load_model
    from aselect_hf.data.feature_set import write_feature_set
    from aselect_hf.data.image_data import ImageData

    images = torch.rand(6, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    data = ImageData(images, labels=[0, 1] * 3, label_names=["cat", "dog"], name="pets")
    write_feature_set(load_model("sample"), data, folder, split="test", num_shards=num_shards, progress=False)


def push(folder: Path, repo_id: str) -> str:
    from aselect_hf.hub.features import push_features

    return push_features(folder, repo_id)


def read(repo_id: str) -> tuple[list[str], list[int], list[str]]:
    import datasets

    found = datasets.load_dataset(repo_id, split="test")
    return found["id"], found["label"], found.features["label"].names


def test_pushed_and_read_again(hub: HubServer, client: ClientProcess, tmp_path):
    client.run(write, tmp_path / "two", 2)
    url = client.run(push, tmp_path / "two", "features")
    names = [f"features-0000{shard}-of-00002.parquet" for shard in (0, 1)]
    assert sorted(hub.files("ada/features")) == [".gitattributes", "README.md", "_features.json", *names]
    assert "ada/features" in url
    assert b"split: test" in hub.files("ada/features")["README.md"]
    assert client.run(read, "ada/features") == (list("012345"), [0, 1] * 3, ["cat", "dog"])
    client.run(write, tmp_path / "three", 3)
    client.run(push, tmp_path / "three", "ada/features")
    assert len([name for name in hub.files("ada/features") if name.endswith(".parquet")]) == 3


def test_an_incomplete_set_is_not_pushed(client: ClientProcess, tmp_path):
    client.run(write, tmp_path / "two", 2)
    (tmp_path / "two" / "features-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="has 1 of 2 shards: run the same command again"):
        client.run(push, tmp_path / "two", "ada/incomplete")
    shutil.rmtree(tmp_path / "two")
    with pytest.raises(ValueError, match="holds no feature set"):
        client.run(push, tmp_path / "two", "ada/incomplete")
