"""transformers' pipelines on saved folders, in this process and in one that has never heard of this package."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import pipeline

from aselect_hf import (
    ASelectDiTForImageClassification,
    ASelectDiTForSemanticSegmentation,
    ASelectDiTModel,
    make_image_processor,
)
from aselect_hf.conversion import save_model

NAMES = {0: "ant", 1: "bee", 2: "cat", 3: "dog"}


@pytest.fixture
def build(make_config: Any, randomize: Any) -> Callable[..., Any]:
    return lambda model_class, channels, **config: randomize(
        model_class(make_config(num_channels=channels, id2label=NAMES, num_noise_draws=2, **config))
    )


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Three color images of different sizes."""
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((8, 8), (20, 12), (9, 31))
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_image_classification(build: Any, pictures: list[Image.Image], tmp_path: Path, channels: int) -> None:
    model = build(ASelectDiTForImageClassification, channels)
    save_model(model, tmp_path)
    classify = pipeline("image-classification", model=str(tmp_path), trust_remote_code=False)
    found = classify(pictures, batch_size=2, top_k=4)
    assert classify(pictures, batch_size=2, top_k=4) == found
    pixels = make_image_processor(model.config)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(pixels).logits.softmax(-1)
    for scores, result in zip(expected, found, strict=True):
        assert {entry["label"]: entry["score"] for entry in result} == pytest.approx(
            {NAMES[index]: score.item() for index, score in enumerate(scores)}, abs=1e-5
        )
    single = {entry["label"]: entry["score"] for entry in classify(pictures[1], top_k=4)}
    assert single == pytest.approx({entry["label"]: entry["score"] for entry in found[1]}, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_image_segmentation(build: Any, pictures: list[Image.Image], tmp_path: Path, channels: int, head: str) -> None:
    model = build(ASelectDiTForSemanticSegmentation, channels, segmentation_head=head, segmentation_head_channels=16)
    save_model(model, tmp_path)
    segment = pipeline("image-segmentation", model=str(tmp_path), trust_remote_code=False)
    found = segment(pictures, batch_size=1)
    again = segment(pictures)
    processor = make_image_processor(model.config, whole_image=True)
    for picture, segments, repeated in zip(pictures, found, again, strict=True):
        pixels = processor(picture, return_tensors="pt").pixel_values
        with torch.no_grad():
            logits = F.interpolate(model(pixels).logits, size=picture.size[::-1], mode="bilinear")
        expected = logits.argmax(1)[0].numpy()
        assert [entry["label"] for entry in segments] == [NAMES[index] for index in np.unique(expected)]
        for entry, same in zip(segments, repeated, strict=True):
            assert entry["mask"].size == picture.size
            label = next(index for index, name in NAMES.items() if name == entry["label"])
            assert (np.asarray(entry["mask"]) // 255 == (expected == label)).mean() > 0.99
            assert np.array_equal(entry["mask"], same["mask"])


@pytest.mark.parametrize("model_class", [ASelectDiTModel, ASelectDiTForImageClassification])
def test_image_feature_extraction(build: Any, pictures: list[Image.Image], tmp_path: Path, model_class: type) -> None:
    model = build(model_class, 3)
    save_model(model, tmp_path)
    extract = pipeline("image-feature-extraction", model=str(tmp_path))
    pooled = extract(pictures, batch_size=3, pool=True)
    assert extract(pictures, batch_size=3, pool=True) == pooled
    pixels = make_image_processor(model.config)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = getattr(model, "dit", model)(pixels)
    torch.testing.assert_close(torch.tensor(pooled).squeeze(1), expected.pooler_output, rtol=0, atol=1e-5)
    tokens = torch.cat([torch.tensor(found) for found in extract(pictures)])
    torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "model_class"),
    [
        ("image-classification", ASelectDiTForImageClassification),
        ("image-segmentation", ASelectDiTForSemanticSegmentation),
        ("image-feature-extraction", ASelectDiTModel),
    ],
)
def test_a_fixed_timestep_in_every_pipeline(
    build: Any, pictures: list[Image.Image], tmp_path: Path, task: str, model_class: type
) -> None:
    whole = build(model_class, 3)
    options: Any = {"pool": True} if model_class is ASelectDiTModel else {}
    results = []
    for name, model in (("whole", whole), ("fixed", whole.fix_timestep())):
        save_model(model, tmp_path / name)
        found: Any = pipeline(task, model=str(tmp_path / name), trust_remote_code=False, **options)(pictures)
        results.append([summary(task, result) for result in found])
    for result, expected in zip(*reversed(results), strict=True):
        assert result == pytest.approx(expected, abs=1e-5)


def test_label_maps_follow_their_images(build: Any, pictures: list[Image.Image]) -> None:
    """The segmentation processor resizes image and map alike, labels untouched, and without a crop."""
    processor = make_image_processor(build(ASelectDiTForSemanticSegmentation, 3).config, whole_image=True)
    labels = [np.zeros(picture.size[::-1], dtype=np.uint8) for picture in pictures]
    for label in labels:
        label[:, label.shape[1] // 2 :] = 255
    batch = processor(pictures, segmentation_maps=labels, return_tensors="pt")
    assert batch.pixel_values.shape == (3, 3, 8, 8)
    assert batch.labels.shape == (3, 8, 8)
    assert batch.labels.unique().tolist() == [0, 255]
    assert (batch.labels[0, :, :4] == 0).all()
    assert (batch.labels[0, :, 4:] == 255).all()


def test_all_pipelines_without_the_package(
    build: Any, pictures: list[Image.Image], tmp_path: Path, run_elsewhere: Any
) -> None:
    """In a fresh process, from folder and image files alone: the same numbers as here, twice."""
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    images = [str(tmp_path / f"{index}.png") for index in range(len(pictures))]
    expected = {}
    for channels in (1, 3):
        for task, model_class in (
            ("image-classification", ASelectDiTForImageClassification),
            ("image-segmentation", ASelectDiTForSemanticSegmentation),
            ("image-feature-extraction", ASelectDiTModel),
        ):
            folder = str(tmp_path / f"{task}-{channels}")
            save_model(build(model_class, channels), folder)
            options = {"pool": True} if model_class is ASelectDiTModel else {}
            run = pipeline(task, model=folder, trust_remote_code=False)
            expected[folder] = [summary(task, result) for result in run(images, **options)]
    script = """
        import numpy as np
        from transformers import pipeline

        found = {}
        images = sys.argv[2:5]
        for folder in sys.argv[5:]:
            task = folder.rpartition("/")[2][:-2]
            options = {"pool": True} if task == "image-feature-extraction" else {}
            run = pipeline(task, model=folder, trust_remote_code=True)
            first, second = ([summary(task, result) for result in run(images, **options)] for _ in range(2))
            assert first == second
            found[folder] = first
        report(found)
    """
    script = inspect.getsource(summary).replace("Any", "object") + textwrap.dedent(script)
    found = run_elsewhere(script, *images, *expected)
    assert list(found) == list(expected)
    for folder, results in expected.items():
        for result, other in zip(results, found[folder], strict=True):
            assert other == pytest.approx(result, abs=1e-5)


def summary(task: str, result: Any) -> Any:
    """One result in a comparable form: scores by label, pixels by label, or the pooled feature."""
    if task == "image-segmentation":
        return {entry["label"]: int((np.asarray(entry["mask"]) > 0).sum()) for entry in result}
    if task == "image-classification":
        return {entry["label"]: entry["score"] for entry in result}
    return result[0]
