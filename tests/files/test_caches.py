"""A damaged, incomplete or interrupted cache gives the same numbers as an empty one, and a full disk one line."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aselect_hf import files
from aselect_hf.data import feature_cache
from aselect_hf.data.feature_cache import pooled_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import cached_latents

FEATURE, TIMESTEPS, COUNT = "blocks.1.query", [0, 300], 10


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(COUNT, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def features(model, images: torch.Tensor, folder: Path, batch_size: int = 3) -> np.ndarray:
    found = pooled_features(
        model, ImageData(images, fingerprint="images"), TIMESTEPS, FEATURE,
        batch_size=batch_size, cache_dir=folder, progress=False,
    )  # fmt: skip
    assert found.seconds > 0
    return np.stack(found.values)


def latents(model, images: torch.Tensor, folder: Path, batch_size: int = 3) -> np.ndarray:
    data = ImageData(images, fingerprint="images")
    found = cached_latents(model, data, batch_size=batch_size, cache_dir=folder, progress=False)
    assert found.seconds > 0
    return found.gather(range(COUNT)).numpy()


CACHES = [features, latents]


@pytest.fixture
def runs(model, monkeypatch) -> list[tuple[int, int]]:
    """Timestep and number of images of every batch that the model runs."""
    found: list[tuple[int, int]] = []
    extract = type(model).extract_features

    def note(self, *args, **options):
        found.append((options["timesteps"][0], len(options["latents"])))
        return extract(self, *args, **options)

    monkeypatch.setattr(type(model), "extract_features", note)
    return found


@pytest.fixture
def small_shards(monkeypatch) -> None:
    monkeypatch.setattr(feature_cache, "SHARD_IMAGES", 3)


def interrupted(model, images: torch.Tensor, folder: Path) -> None:
    """Features whose computation ends at the third shard."""
    pixels = images.clone()
    pixels[7] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        features(model, pixels, folder)


def stored(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


@given(data=st.data())
@settings(max_examples=15)
@pytest.mark.parametrize(("cache", "half_done"), [(features, False), (features, True), (latents, False)])
@pytest.mark.usefixtures("small_shards")
def test_any_damage_gives_the_same_numbers(cache, half_done, make_model, images, tmp_path_factory, data):
    model, base = make_model(), tmp_path_factory.getbasetemp() / f"damage-{cache.__name__}-{half_done}"
    if not base.exists():
        (interrupted if half_done else cache)(model, images, base / "whole")
        cache(model, images, base / "truth")
    folder = base / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base / "whole", folder)
    for _ in range(data.draw(st.integers(1, 3), label="files damaged")):
        path = data.draw(st.sampled_from(stored(folder)), label="file")
        content = bytearray(path.read_bytes())
        kind = data.draw(st.sampled_from(["flip", "zero", "cut", "grow", "remove"]), label="damage")
        at = data.draw(st.integers(0, max(0, len(content) - 1)), label="place")
        if kind == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
        elif kind == "zero":
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        elif kind == "cut":
            del content[at:]
        elif kind == "grow":
            content += b"0"
        if kind == "remove":
            path.unlink()
            if not stored(folder):
                break
        else:
            path.write_bytes(content)
    np.testing.assert_allclose(cache(model, images, folder, 4), cache(model, images, base / "truth"), atol=1e-6)
    assert not list(folder.rglob("*partial*"))


@pytest.mark.parametrize("damage", ["values", "values zeroed", "seconds", "header", "no values"])
def test_a_damaged_feature_file_is_named_and_computed_again(damage, model, images, tmp_path, caplog, runs):
    expected = features(model, images, tmp_path)
    [values] = tmp_path.rglob("t00300-00000.safetensors")
    content = bytearray(values.read_bytes())
    if damage == "values":
        content[-1] ^= 1
    elif damage == "values zeroed":
        content[-64:] = bytes(64)
    elif damage == "seconds":
        at = content.index(b'"seconds":"') + len(b'"seconds":"')
        content[at] = ord("9")
    elif damage == "header":
        content[8:10] = b"xx"
    values.write_bytes(content)
    if damage == "no values":
        values.unlink()
    runs.clear()
    np.testing.assert_allclose(features(model, images, tmp_path), expected, atol=1e-6)
    assert [timestep for timestep, _ in runs] == [300] * 4  # batches
    if damage == "no values":
        assert caplog.text == ""
    else:
        assert f"{values} is damaged" in caplog.text
        assert len(caplog.records) == 1


@pytest.mark.usefixtures("small_shards")
def test_an_error_keeps_what_was_finished(model, images, tmp_path, runs):
    expected = features(model, images, tmp_path / "truth")
    interrupted(model, images, tmp_path)
    runs.clear()
    np.testing.assert_allclose(features(model, images, tmp_path), expected, atol=1e-6)
    assert sum(count for _, count in runs) == 2 * (COUNT - 6)


def _die_after(model, images: torch.Tensor, folder: Path, calls: int) -> None:
    torch.set_num_threads(1)
    feature_cache.SHARD_IMAGES = 3
    extract = type(model).extract_features
    seen = []

    def count(self, *args, **options):
        seen.append(options)
        if len(seen) > calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return extract(self, *args, **options)

    type(model).extract_features = count
    features(model, images, folder)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("calls", [0, 1, 4, 5, 7])
def test_a_killed_run_gives_the_same_numbers_when_it_goes_on(calls, model, images, tmp_path, run_together, runs):
    expected = features(model, images, tmp_path / "truth")
    assert run_together(_die_after, (model, images, tmp_path, calls)) == [-signal.SIGKILL]
    runs.clear()
    np.testing.assert_allclose(features(model, images, tmp_path), expected, atol=1e-6)
    assert sum(count for _, count in runs) == max(2 * COUNT - 3 * calls, 1)  # each call makes a file
    assert not list(tmp_path.rglob("*partial*"))


@pytest.mark.parametrize("cache", CACHES)
def test_too_little_room_is_said_before_any_work(cache, model, images, small_disk, monkeypatch):
    folder = small_disk(4096 * 3)
    (folder / "filler").write_bytes(bytes(4096 * 2))
    monkeypatch.setattr(type(model), "prepare_latents", lambda *args, **options: pytest.fail("work was done"))
    monkeypatch.setattr(type(model), "encode_posterior", lambda *args, **options: pytest.fail("work was done"))
    with pytest.raises((ValueError, OSError), match=rf"{folder}.*( is needed for these |could not be written)"):
        cache(model, images.repeat(30, 1, 1, 1)[: COUNT * 30], folder)


@pytest.mark.parametrize("reserving", [True, False])
def test_a_disk_that_fills_up_while_features_are_computed(reserving, model, small_disk, fill, monkeypatch, tmp_path):
    """Where room can be reserved nothing happens; elsewhere it is one line, and the finished images are kept."""
    monkeypatch.setattr(feature_cache, "SHARD_IMAGES", 100)
    if not reserving:
        monkeypatch.delattr(files.os, "posix_fallocate")
    images = torch.randn(600, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = features(model, images, tmp_path, 100)
    folder = small_disk(2**19)
    batches = []
    extract = type(model).extract_features

    def fill_then_extract(self, *args, **options):
        batches.append(len(options["latents"]))
        if len(batches) == 5:
            fill(folder)
        return extract(self, *args, **options)

    monkeypatch.setattr(type(model), "extract_features", fill_then_extract)
    if not reserving:
        with pytest.raises(OSError, match=r"could not be written \(No space left on device\)"):
            features(model, images, folder, 100)
        batches.clear()
        batches += [0] * 5
    (folder / "filler").unlink(missing_ok=True)
    np.testing.assert_allclose(features(model, images, folder, 100), expected, atol=1e-6)
    assert sum(batches) <= 2 * 600 - (0 if reserving else 2 * 100)
