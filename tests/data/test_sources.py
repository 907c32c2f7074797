"""Images from data sets and files: decoders that fail, formats of `datasets`, and files that change on disk."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from PIL import Image, ImageFile

from aselect_hf.data.feature_cache import pooled_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.images import image_pixels, undecoded_stream
from aselect_hf.data.latent_cache import cached_latents
from aselect_hf.data.sources import load_images
from aselect_hf.selection import select_timestep
from aselect_hf.tasks import CLASSIFICATION
from aselect_hf.training.arguments import TaskDataArguments
from aselect_hf.training.task_data import load_task_data

from .pictures import png

GREYS = [np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8) for seed in range(8)]
PICTURES = [Image.fromarray(grey) for grey in GREYS]


@pytest.fixture
def labeled() -> datasets.Dataset:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    return datasets.Dataset.from_dict({"image": PICTURES, "label": [0, 1] * 4}, features=datasets.Features(features))


def forms(labeled: datasets.Dataset) -> dict[str, Any]:
    array_of = datasets.Features({"image": datasets.Array2D((8, 8), "uint8"), "label": datasets.Value("int64")})
    lists = datasets.Features({"image": datasets.List(datasets.List(datasets.Value("uint8")))})
    labels = [0, 1] * 4
    return {
        "arrays": list(GREYS),
        "colored arrays": [np.repeat(grey[..., None], 3, axis=-1) for grey in GREYS],
        "bytes": [png(grey) for grey in GREYS],
        "data set": labeled,
        "bytes column": datasets.Dataset.from_dict({"image": [png(grey) for grey in GREYS], "label": labels}),
        "array column": datasets.Dataset.from_dict({"image": GREYS, "label": labels}, features=array_of),
        "list column": datasets.Dataset.from_dict({"image": [grey.tolist() for grey in GREYS]}, features=lists),
        **{f"with {kind}": labeled.with_format(kind) for kind in ("pandas", "numpy", "torch", "arrow")},
        "one column": labeled.with_format("torch", columns=["label"]),
    }


FORMS = [
    "arrays", "colored arrays", "bytes", "data set", "bytes column", "array column", "list column", "with pandas",
    "with numpy", "with torch", "with arrow", "one column",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pixels(labeled: Any, form: str, make_config: Any) -> None:
    config = make_config(num_channels=1)
    data = ImageData.of(forms(labeled)[form])
    assert torch.equal(torch.cat(list(data.batches(config, 3))), image_pixels(config)(PICTURES))
    if isinstance(data.items, datasets.Dataset) and form != "list column":
        assert data.labels is not None
        assert data.labels.tolist() == [0, 1] * 4
    assert len(data.subset([1, 3]).readable("skip")) == 2


def test_a_transform_is_refused(labeled: datasets.Dataset) -> None:
    with pytest.raises(ValueError, match=r"has a transform .*: pass dataset.with_format\(None\)"):
        ImageData.of(labeled.with_transform(lambda rows: {"pixel_values": rows["image"]}))


@pytest.mark.parametrize("item", [b"x" * 5000, {"bytes": b"x" * 5000, "path": None}, 3, {"bytes": None, "path": None}])
def test_messages_are_short(item: Any) -> None:
    with pytest.raises(ValueError, match="image 0 of images") as caught:
        ImageData([item]).decode(0)
    assert len(str(caught.value)) < 200


ERRORS = [
    struct.error("x"),
    SyntaxError("x"),
    EOFError(),
    Image.DecompressionBombError("bomb"),
    KeyError(3),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_decoder_raises_is_named_and_skipped(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for index in range(3):
        PICTURES[index].save(tmp_path / f"{index}.png")
    bomb = isinstance(error, Image.DecompressionBombError)
    whole: Any = Image.open if bomb else ImageFile.ImageFile.load

    def fail(image: Any, *arguments: Any) -> Any:
        if str(getattr(image, "filename", image)).endswith("1.png"):
            raise error
        return whole(image, *arguments)

    monkeypatch.setattr("PIL.Image.open" if bomb else "PIL.ImageFile.ImageFile.load", fail)
    data = ImageData.of(tmp_path)
    with pytest.raises(ValueError, match=r"1\.png cannot be read as an image"):
        data.decode(1)
    assert len(data.readable("skip")) == 2
    assert "skipped:" in capsys.readouterr().out


def test_a_bomb_is_skipped(tmp_path: Path) -> None:
    for index in range(2):
        PICTURES[index].save(tmp_path / f"{index}.png")
    content = bytearray(png(np.zeros((4, 4), np.uint8)))
    content[16:24] = struct.pack(">II", 50_000, 50_000)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "2.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"2\.png cannot be read as an image .*decompression bomb"):
        ImageData.of(tmp_path).decode(2)
    assert len(ImageData.of(tmp_path).readable("skip")) == 2


def test_later_frames_are_said_to_be_left_out_once(tmp_path: Path, caplog: Any) -> None:
    for name in ("a.gif", "b.tif"):
        first, *others = map(Image.fromarray, GREYS[:3])
        first.save(tmp_path / name, save_all=True, append_images=others)
    data = ImageData.of(tmp_path)
    assert [data.decode(index).size for index in range(2)] == [(8, 8)] * 2
    assert np.array_equal(data.decode(1), GREYS[0])
    assert caplog.text.count("Only the first frame or page") == 1


def write(folder: Path, seed: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    paths = []
    for index in range(6):
        paths.append(str(folder / f"{index}.png"))
        grey = np.random.default_rng([seed, index]).integers(0, 256, (8, 8), dtype=np.uint8)
        Path(paths[-1]).write_bytes(png(grey).ljust(400, b"\0"))  # one size, whatever the pixels
        os.utime(paths[-1], (1, 1))
    return paths


SOURCES: dict[str, Any] = {
    "paths": lambda folder, paths: paths,
    "folder": lambda folder, paths: folder,
    "table": lambda folder, paths: datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image()),
    "strings": lambda folder, paths: datasets.Dataset.from_dict({"image": paths}),
    "large strings": lambda folder, paths: datasets.Dataset.from_dict(
        {"image": paths}, datasets.Features({"image": datasets.Value("large_string")})
    ),
    "sample": lambda folder, paths: ImageData.of(folder).sample(5, 0),
    "rows": lambda folder, paths: [{"path": path, "bytes": None} for path in paths],
    "contents": lambda folder, paths: [{"path": path, "bytes": Path(path).read_bytes()} for path in paths],
}


@pytest.mark.parametrize("source", SOURCES)
def test_replaced_files_are_never_answered_from_a_cache(tmp_path: Path, source: str, make_model: Any) -> None:
    """Of the same size and modification time; the latent cache and the feature cache ask the same fingerprint."""
    model, folder = make_model(num_channels=1), tmp_path / "images"

    def features(seed: int, cache: str) -> tuple[np.ndarray, torch.Tensor]:
        data = ImageData.of(SOURCES[source](folder, write(folder, seed)))
        assert (
            data.fingerprint
            == ImageData.of(SOURCES[source](folder, [str(p) for p in sorted(folder.iterdir())])).fingerprint
        )
        with torch.no_grad():
            options = {"cache_dir": tmp_path / cache, "progress": False}
            pooled = pooled_features(model, data, [0], "blocks.1.hidden", **options)
            latents = cached_latents(model, data, **options).gather(range(len(data)))
        return np.array(pooled.values[0]), latents

    features(1, "cache")
    for found, expected in zip(features(2, "cache"), features(2, "other"), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_saved_table_of_paths_follows_its_files(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"image": write(tmp_path / "images", 1)})
    table.save_to_disk(str(tmp_path / "saved"))
    first = ImageData.of(tmp_path / "saved").fingerprint
    assert ImageData.of(tmp_path / "saved").fingerprint == first
    write(tmp_path / "images", 2)
    assert ImageData.of(tmp_path / "saved").fingerprint != first


def test_batches_can_be_made_by_any_kind_of_worker(make_config: Any) -> None:
    pixels = pickle.loads(pickle.dumps(image_pixels(make_config(num_channels=1))))
    assert torch.equal(pixels.of_pairs([(picture, None) for picture in PICTURES]), pixels(PICTURES))


@pytest.mark.parametrize("method", ["hfr", "consensus", "lidar", "retrieval"])
def test_every_rule_refuses_broken_pixels(make_model: Any, normal: Any, method: str) -> None:
    images = normal(12, 2, 8, 8)
    images[7, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or infinite pixels"):
        select_timestep(make_model(), images, method=method, timesteps=[0, 500], progress=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_training_names_or_skips_what_cannot_be_read(tmp_path: Path, streaming: bool) -> None:
    for index, picture in enumerate(PICTURES):
        path = tmp_path / ("train", "val")[index % 2] / "ab"[index // 2 % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"x")
    options: dict[str, Any] = {"train_dir": str(tmp_path), "validation_split": "val", "streaming": streaming}
    data = load_task_data(TaskDataArguments(**options, on_error="skip"), CLASSIFICATION, 0)
    assert len(data.train) == 4
    assert len(data.validation) == 4
    if streaming:
        assert len(list(data.stream)) == 4
    kept = load_task_data(TaskDataArguments(**options), CLASSIFICATION, 0).train
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        list(map(kept.decode, range(len(kept))))


def test_a_stream_leaves_its_images_undecoded(tmp_path: Path) -> None:
    PICTURES[0].save(tmp_path / "0.png")
    row = next(iter(undecoded_stream(load_images(tmp_path, streaming=True), "stop")))
    assert np.array_equal(ImageData([row["image"]]).decode(0), GREYS[0])


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_data_set_says_where_to_accept(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """As `datasets` raises it, from the answer of the Hub's client."""

    def gated(*_: Any, **__: Any) -> None:
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        refusal = GatedRepoError("Cannot access gated repo", response=response)  # type: ignore[arg-type]
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'ada/cells' is a gated dataset on the Hub."
        ) from refusal

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(ValueError) as raised:
        load_images("ada/cells")
    assert str(raised.value) == (
        "data set 'ada/cells' is gated: accept its terms at https://huggingface.co/datasets/ada/cells, "
        "then run `hf auth login`"
    )
