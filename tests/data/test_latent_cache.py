"""Latents are the model's own, encoded once by however many processes, and never read from a broken shard."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import signal
import time
from collections import namedtuple
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from torch.utils.data import DataLoader

from aselect_hf import make_image_processor
from aselect_hf.data import latent_cache
from aselect_hf.data.feature_cache import pooled_features
from aselect_hf.data.image_data import ImageData
from aselect_hf.data.latent_cache import LatentCache, cached_latents
from aselect_hf.data.shards import FILE_BYTES

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_IMAGES", 4)


@pytest.fixture
def data(normal) -> ImageData:
    return ImageData(normal(10, 3, 16, 16))


@pytest.fixture
def make_latent_model(make_model):
    """`make_latent_model(vae, seed=0, **overrides)`: a tiny DiT on this VAE's weights."""

    def build(vae, seed=0, **overrides):
        config = dict(vae.config) | {"_class_name": type(vae).__name__}
        model = make_model(seed, num_channels=4, sample_size=8, vae_config=config, **overrides)
        model.vae.load_state_dict(vae.state_dict(), strict=False)
        return model

    return build


@pytest.fixture
def latent_model(make_latent_model, tiny_kl):
    return make_latent_model(tiny_kl)


@pytest.fixture
def pixel_model(make_model):
    return make_model(num_channels=3, sample_size=16)


@pytest.fixture
def encoded():
    """`encoded(model)`: a list that gets the size of every batch the VAE encodes."""

    def watch(model) -> list[int]:
        batches: list[int] = []
        model.vae.encoder.register_forward_hook(lambda module, args, output: batches.append(len(args[0])))
        return batches

    return watch


def cache(model, data, folder, **options) -> LatentCache:
    return cached_latents(model, data, cache_dir=folder, **({"batch_size": 3, "progress": False} | options))


@torch.no_grad()
def direct(model, pixels) -> torch.Tensor:
    return model.prepare_latents(pixels)


@pytest.mark.parametrize("vae", ["tiny_kl", "tiny_taesd"])
def test_values_are_the_models_own(vae, make_latent_model, data, tmp_path, request):
    model = make_latent_model(request.getfixturevalue(vae))
    latents = cache(model, data, tmp_path, flipped=True)
    expected, mirrored = direct(model, data.items), direct(model, data.items.flip(-1))
    assert len(latents) == 10
    assert latents.num_shards == 3
    assert latents.seconds > 0
    assert latents[9].dtype == torch.float32
    torch.testing.assert_close(latents[9], expected[9], atol=1e-5, rtol=0)
    rows = [9, 0, 5, 5, 1]
    torch.testing.assert_close(latents.gather(rows), expected[rows], atol=1e-5, rtol=0)
    flipped = [True, False, True, False, False]
    chosen = torch.where(torch.tensor(flipped)[:, None, None, None], mirrored[rows], expected[rows])
    torch.testing.assert_close(latents.gather(rows, flipped), chosen, atol=1e-5, rtol=0)
    assert (mirrored - expected.flip(-1)).abs().max() > 0.01  # or storing the mirrored images would be pointless


def test_log_variance_is_that_of_the_scaled_latents(latent_model, data, tmp_path):
    latents = cache(latent_model, data, tmp_path, flipped=True, log_variance=True)
    config = latent_model.vae.config
    with torch.no_grad():
        posterior = latent_model.vae.encode(data.items.flip(-1)).latent_dist
    deviation = (latents.log_variance(range(10), [True] * 10) / 2).exp()
    torch.testing.assert_close(deviation, posterior.std * config.scaling_factor)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    sample = posterior.sample(torch.Generator().manual_seed(0))
    ours = latents.gather(range(10), [True] * 10) + deviation * noise
    torch.testing.assert_close(ours, (sample - config.shift_factor) * config.scaling_factor, atol=1e-5, rtol=1e-5)


def test_pixel_space_keeps_pixels_and_mirrors_them_itself(pixel_model, data, tmp_path):
    latents = cache(pixel_model, data, tmp_path, flipped=True)
    assert latents.contents == ("mean",)
    flipped = torch.arange(10) % 2 == 0
    expected = torch.where(flipped[:, None, None, None], data.items.flip(-1), data.items)
    assert torch.equal(latents.gather(range(10), flipped), expected)


@pytest.mark.parametrize("whole_image", [False, True])
def test_images_are_preprocessed_as_the_model_wants_them(latent_model, tmp_path, whole_image):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 32, 3), dtype=np.uint8)) for _ in range(6)]
    processor = make_image_processor(latent_model.config, whole_image)
    expected = direct(latent_model, processor(pictures, return_tensors="pt")["pixel_values"])
    rows = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    for source in (pictures, rows):
        latents = cache(latent_model, ImageData.of(source), tmp_path, whole_image=whole_image)
        torch.testing.assert_close(latents.gather(range(6)), expected, atol=1e-5, rtol=0)


def test_float16_is_half_the_size_and_nearly_the_same(latent_model, data, tmp_path):
    latents = cache(latent_model, data, tmp_path, dtype="float16")
    expected = direct(latent_model, data.items)
    torch.testing.assert_close(latents.gather(range(10)), expected.half().float(), atol=1e-3, rtol=1e-3)
    shard = latents.shard_file("mean", 0)
    assert shard.stat().st_size < 0.6 * cache(latent_model, data, tmp_path).shard_file("mean", 0).stat().st_size


@given(rows=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=20), shard_images=st.integers(1, 11))
def test_any_order_of_any_shards(rows, shard_images, tmp_path_factory, make_model):
    images = torch.arange(10 * 2 * 8 * 8).reshape(10, 2, 8, 8).float()
    folder = tmp_path_factory.getbasetemp() / "any_order"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_cache, "SHARD_IMAGES", shard_images)
        latents = cache(make_model(), ImageData(images), folder)
    picked = latents.gather([row for row, _ in rows], [mirrored for _, mirrored in rows])
    assert picked.shape == (len(rows), 2, 8, 8)
    for values, (row, mirrored) in zip(picked, rows, strict=True):
        assert torch.equal(values, images[row].flip(-1) if mirrored else images[row])


def test_shards_are_bounded_in_bytes(pixel_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_BYTES", 3 * 3 * 16 * 16 * 4)
    assert cache(pixel_model, data, tmp_path).shard_size == 3


def test_asking_for_more_computes_only_what_is_missing(latent_model, data, tmp_path, encoded):
    batches = encoded(latent_model)
    first = cache(latent_model, data, tmp_path)
    assert sum(batches) == 10
    written = {file: file.stat().st_mtime_ns for file in first.folder.glob("*.safetensors")}
    again = cache(latent_model, data, tmp_path)
    assert (sum(batches), again.seconds) == (10, first.seconds)
    more = cache(latent_model, data, tmp_path, flipped=True)
    assert sum(batches) == 20  # the mirrored images
    assert more.seconds > first.seconds
    most = cache(latent_model, data, tmp_path, flipped=True, log_variance=True)
    assert sum(batches) == 40
    assert most.folder == first.folder
    assert all(file.stat().st_mtime_ns == moment for file, moment in written.items())
    with pytest.raises(ValueError, match="mean_flipped is not stored: call cached_latents with flipped"):
        first.gather([0], [True])
    with pytest.raises(ValueError, match="log_variance is not stored: call cached_latents with log_variance"):
        more.log_variance([0])


def test_key_follows_encoder_data_and_preprocessing_but_not_the_dit(make_latent_model, tiny_kl, tmp_path, normal):
    pictures = [Image.fromarray(np.full((20, 32, 3), shade, dtype=np.uint8)) for shade in (0, 99)]

    def folder(model, data, **options):
        return cache(model, ImageData.of(data), tmp_path, **options).folder

    same = {folder(make_latent_model(tiny_kl, seed, vae_decoder=seed == 1), pictures) for seed in (0, 1)}
    assert len(same) == 1
    model = make_latent_model(tiny_kl)
    keys = same | {folder(model, pictures, whole_image=True), folder(model, pictures, dtype="float16")}
    keys |= {folder(model, pictures[::-1]), folder(model, normal(2, 3, 16, 16)), folder(model, normal(2, 3, 32, 32))}
    keys.add(folder(model.to(torch.bfloat16), pictures))
    with torch.no_grad():
        tiny_kl.encoder.conv_in.bias.add_(1)
    keys.add(folder(make_latent_model(tiny_kl), pictures))
    tiny_kl.register_to_config(scaling_factor=0.3)
    keys.add(folder(make_latent_model(tiny_kl), pictures))
    assert len(keys) == 9


@pytest.mark.parametrize("vae", ["tiny_kl", "tiny_taesd"])
def test_a_vae_of_lower_precision_has_a_folder_of_its_own(vae, make_latent_model, data, tmp_path, request):
    model = make_latent_model(request.getfixturevalue(vae))
    precise = cache(model, data, tmp_path)
    model.vae.to(torch.bfloat16, memory_format=torch.channels_last)
    fast = cache(model, data, tmp_path)
    assert fast.folder != precise.folder
    assert fast[0].dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(fast.gather(range(len(data))), model.encode(data.items), rtol=0.02, atol=0.02)
    assert not torch.equal(fast[0], precise[0])


def test_columns_of_one_data_set_are_told_apart(pixel_model, tmp_path):
    columns = {name: [Image.new("RGB", (16, 16), name)] for name in ("red", "blue")}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({name: datasets.Image() for name in columns}))
    red, blue = (cache(pixel_model, ImageData.of(rows, image_column=name), tmp_path)[0] for name in columns)
    assert not torch.equal(red, blue)


Broken = namedtuple("Broken", "reason change")


def _flip_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "broken",
    [
        Broken("checksum", _flip_last_byte),
        Broken("file not fully covered", lambda content: content[:-7]),
        Broken("header", lambda content: b""),
        Broken("not torch.float32", lambda content: content.replace(b'"F32"', b'"I32"')),
    ],
    ids=lambda broken: broken.reason,
)
def test_corrupt_shard_is_encoded_again_with_one_warning(broken, latent_model, data, tmp_path, encoded, caplog):
    batches = encoded(latent_model)
    first = cache(latent_model, data, tmp_path, batch_size=64)
    shard = first.shard_file("mean", 1)
    whole = shard.read_bytes()
    shard.write_bytes(broken.change(whole))
    second = cache(latent_model, data, tmp_path, batch_size=64)
    assert batches == [4, 4, 2, 4]
    assert len(caplog.records) == 1
    assert broken.reason in caplog.text
    assert str(shard) in caplog.text
    torch.testing.assert_close(second.gather(range(10)), direct(latent_model, data.items), atol=1e-5, rtol=0)


def test_shard_that_goes_while_in_use_is_an_error(latent_model, data, tmp_path):
    latents = cache(latent_model, data, tmp_path)
    latents.shard_file("mean", 1).unlink()
    assert latents[0].shape == (4, 8, 8)
    with pytest.raises(OSError, match=r"mean-00001.safetensors is missing or damaged .*: call cached_latents again"):
        latents.gather([0, 4])


def _join(processes, seconds: float = 60) -> None:
    for process in processes:
        process.join(seconds)
    assert not any(process.is_alive() for process in processes)


def _encode_in_another_process(model, data, folder, log: Path, start, die_after: int | None) -> None:
    torch.set_num_threads(1)
    count = 0

    def note(module, args, output):
        nonlocal count
        count += len(args[0])
        if die_after is not None and count > die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        log.write_text(str(count))
        time.sleep(0.02)

    model.vae.encoder.register_forward_hook(note)
    start.wait()
    latents = cache(model, data, folder)
    log.with_suffix(".pt").write_bytes(pickle.dumps(latents.gather(range(len(data)))))


def test_two_processes_share_the_work(latent_model, normal, tmp_path):
    data = ImageData(normal(40, 3, 16, 16))
    start, logs = FORK.Barrier(2), [tmp_path / "first", tmp_path / "second"]
    arguments = [(latent_model, data, tmp_path / "cache", log, start, None) for log in logs]
    processes = [FORK.Process(target=_encode_in_another_process, args=each) for each in arguments]
    for process in processes:
        process.start()
    _join(processes)
    assert [process.exitcode for process in processes] == [0, 0]
    counts = [int(log.read_text()) for log in logs]
    assert sum(counts) == 40  # every shard once
    assert min(counts) > 0
    first, second = (pickle.loads(log.with_suffix(".pt").read_bytes()) for log in logs)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, direct(latent_model, data.items), atol=1e-5, rtol=0)


def test_a_killed_process_leaves_whole_shards_and_others_take_over(latent_model, data, tmp_path, encoded):
    start = FORK.Barrier(1)
    arguments = (latent_model, data, tmp_path / "cache", tmp_path / "log", start, 7)  # in the middle of the second
    process = FORK.Process(target=_encode_in_another_process, args=arguments)
    process.start()
    _join([process])
    assert process.exitcode == -signal.SIGKILL
    assert [file.name for file in (tmp_path / "cache").rglob("*.safetensors")] == ["mean-00000.safetensors"]
    batches = encoded(latent_model)
    latents = cache(latent_model, data, tmp_path / "cache")
    assert sum(batches) == 6
    torch.testing.assert_close(latents.gather(range(10)), direct(latent_model, data.items), atol=1e-5, rtol=0)


def test_a_failing_image_leaves_what_was_encoded(latent_model, data, tmp_path, encoded):
    broken = data.items.clone()
    broken[5, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="image 5 of images holds NaN"):
        cache(latent_model, ImageData(broken, fingerprint="same"), tmp_path)
    batches = encoded(latent_model)
    latents = cache(latent_model, ImageData(data.items, fingerprint="same"), tmp_path)
    assert sum(batches) == 6
    assert sorted(file.name for file in latents.folder.iterdir() if file.is_file()) == [
        f"mean-{shard:05d}.safetensors" for shard in range(3)
    ]


def _with_little_room(model, data, folder: Path, errors) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        cache(model, data, folder)
    except OSError as error:
        errors.put(str(error))


def test_nothing_half_written_is_left_when_writing_fails(latent_model, data, tmp_path):
    errors = FORK.Queue()
    process = FORK.Process(target=_with_little_room, args=(latent_model, data, tmp_path, errors))
    process.start()
    assert "File too large" in errors.get(timeout=60)
    _join([process])
    assert [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


def test_too_little_space_is_said_before_any_encoding(latent_model, data, tmp_path, monkeypatch, encoded):
    batches = encoded(latent_model)
    usage = namedtuple("usage", "free")
    needed = 10 * 4 * 8 * 8 * 4 + 3 * FILE_BYTES
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(needed - 1))
    with pytest.raises(ValueError, match=r"cache_dir .* has 0.00 GB free, but 0.00 GB is needed for these latents"):
        cache(latent_model, data, tmp_path)
    assert batches == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(needed))
    cache(latent_model, data, tmp_path)


def test_unwritable_folder_is_said_before_any_encoding(latent_model, data, tmp_path, encoded):
    batches = encoded(latent_model)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not writable"):
        cache(latent_model, data, tmp_path / "file")
    assert batches == []


def test_bad_input_is_one_clear_error(latent_model, pixel_model, make_latent_model, tiny_taesd, data, normal, tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of float32, float16; got 'int8'"):
        cache(latent_model, data, tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        cache(latent_model, data, tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="log_variance needs a model with an AutoencoderKL, but this one has no VAE"):
        cache(pixel_model, data, tmp_path, log_variance=True)
    with pytest.raises(ValueError, match="this one has an AutoencoderTiny"):
        cache(make_latent_model(tiny_taesd), data, tmp_path, log_variance=True)
    with pytest.raises(ValueError, match=r"as large as the first: \(3, 8, 8\) is not \(3, 16, 16\)"):
        cache(pixel_model, ImageData([*data.items[:3], *normal(2, 3, 8, 8)]), tmp_path)
    with pytest.raises(ValueError, match="dtype 'float16' cannot hold latents as large as"):
        cache(pixel_model, ImageData(data.items * 1e6), tmp_path, dtype="float16")
    with torch.no_grad():
        latent_model.vae.encoder.conv_in.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"NaN or infinite latents in torch.float32"):
        cache(latent_model, data, tmp_path)


@pytest.mark.parametrize("rows", [[-1], [0, 10]])
def test_indices_must_be_there(pixel_model, data, tmp_path, rows):
    latents = cache(pixel_model, data, tmp_path)
    with pytest.raises(IndexError, match=r"indices must be in 0\.\.9"):
        latents.gather(rows)
    with pytest.raises(ValueError, match="one value per index, got 1 for 2 indices"):
        latents.gather([0, 1], [True])


def test_works_in_data_loader_workers(latent_model, data, tmp_path):
    latents = cache(latent_model, data, tmp_path)
    expected = latents.gather(range(10))
    assert len(pickle.dumps(latents)) < 2000  # no values
    loader = DataLoader(latents, batch_size=5, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), expected)
    assert torch.equal(torch.stack(list(pickle.loads(pickle.dumps(latents)))), expected)


def test_changing_what_was_read_changes_nothing_stored(pixel_model, data, tmp_path):
    latents = cache(pixel_model, data, tmp_path)
    latents[0].zero_()
    latents.gather([0, 1]).zero_()
    assert torch.equal(latents[0], data.items[0])
    with safe_open(latents.shard_file("mean", 0), framework="pt") as file:
        assert torch.equal(file.get_tensor("values"), data.items[:4])


def test_pooled_features_encode_once_for_all_features_and_dits(make_latent_model, tiny_kl, data, tmp_path, encoded):
    options = {"cache_dir": tmp_path, "batch_size": 4, "progress": False}
    for seed in (0, 1):
        model = make_latent_model(tiny_kl, seed)
        latents = direct(model, data.items)
        batches = encoded(model)
        for feature in ("blocks.1.query", "blocks.2.hidden"):
            pooled = pooled_features(model, data, [0, 300], feature, **options)
            direct_features = model.extract_features(
                latents=latents, features=[feature], timesteps=[0, 300], output_format="pooled"
            )[feature]
            values = torch.from_numpy(np.stack(pooled.values, axis=1))
            torch.testing.assert_close(values, direct_features, atol=1e-5, rtol=1e-5)
            assert pooled.seconds > cached_latents(model, data, cache_dir=tmp_path / "latents").seconds
        assert sum(batches) == (10 if seed == 0 else 0) + 2  # one image for each count of the FLOPs
