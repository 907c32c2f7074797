"""Everything that goes to the workers of a loader can be pickled, so that spawn and forkserver work as fork does."""

from __future__ import annotations

import multiprocessing
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import cached_latents
from aselect_hf.tasks import CLASSIFICATION, SEGMENTATION
from aselect_hf.training.arguments import TaskDataArguments
from aselect_hf.training.pretrain import make_collate
from aselect_hf.training.task_data import TaskData
from aselect_hf.training.task_dataset import TaskDataset, stream_collate

COUNT = 6


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (10, 8), dtype=np.uint8)) for _ in range(COUNT)]


@pytest.fixture
def data(pictures) -> ImageData:
    masks = [np.asarray(picture) % 3 for picture in pictures]
    return ImageData(pictures, np.arange(COUNT) % 3, masks=masks, mask_names=["a", "b", "c"])


@pytest.fixture
def make_loader(make_model, data, tmp_path):
    """`make_loader(kind, **options)`: one of the package's loaders with workers, by name."""
    model = make_model(num_channels=1)

    def build(kind: str, **options) -> DataLoader:
        task = SEGMENTATION if "masks" in kind else CLASSIFICATION
        dataset = TaskDataset(data, model.config, task, random_flip=True, whole_masks=task.dense)
        if "latents" in kind:
            dataset.latents = cached_latents(model, data, cache_dir=tmp_path, progress=False)
        if "features" in kind:
            np.save(tmp_path / "features.npy", np.random.default_rng(0).normal(size=(2, COUNT, 1, 1, 24)))
            dataset.tokens = np.load(tmp_path / "features.npy", mmap_mode="r")
        if kind == "pretraining":
            return DataLoader(data, collate_fn=make_collate(model.config), batch_size=2, **options)  # type: ignore[arg-type]
        if kind == "stream":
            rows = {"image": data.items, "label": data.labels.tolist()}
            features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
            stream = datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset()
            train = ImageData(data.items, data.labels, ["a", "b", "c"])
            splits = TaskData(train, train, None, stream, ["a", "b", "c"])
            collate = stream_collate(model.config, TaskDataArguments(), CLASSIFICATION, splits)
            return DataLoader(stream, collate_fn=collate, batch_size=2, **options)
        return DataLoader(dataset, collate_fn=dataset.collate, batch_size=2, **options)

    return build


LOADERS = [
    "classes",
    "masks",
    "classes from latents",
    "masks from latents",
    "classes from features",
    "pretraining",
    "stream",
]


def _assert_equal(ours, theirs) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            for a, b in zip(one[name], other[name], strict=True):
                assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", LOADERS)
def test_datasets_and_collates_can_be_pickled(kind, make_loader):
    loader = make_loader(kind)
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    _assert_equal(DataLoader(dataset, collate_fn=collate, batch_size=2), loader)


def test_pickling_carries_no_features(make_loader):
    plain, kept = (pickle.dumps(make_loader(kind).dataset) for kind in ("classes", "classes from features"))
    assert len(kept) < len(plain) + 300


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_of_any_start_give_the_same_batches(method, make_loader):
    for kind in ("masks from latents", "classes from features", "pretraining", "stream"):
        _assert_equal(make_loader(kind, num_workers=1, multiprocessing_context=method), make_loader(kind))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_latents_are_encoded_with_workers_of_any_start(method, make_model, data, tmp_path):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        model = make_model(num_channels=1)
        ours = cached_latents(model, data, num_workers=1, cache_dir=tmp_path / method, progress=False)
    finally:
        multiprocessing.set_start_method(before, force=True)
    theirs = cached_latents(model, data, cache_dir=tmp_path / "here", progress=False)
    assert torch.equal(ours.gather(range(COUNT)), theirs.gather(range(COUNT)))
