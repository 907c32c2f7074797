"""Grid search with a probe per token: it learns, its tokens are the right ones, its figures are exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from aselect_hf import TimestepSelection, select_timestep
from aselect_hf.conversion import load_model
from aselect_hf.data.image_data import ImageData
from aselect_hf.modeling.image_processing_aselect_dit import IGNORED
from aselect_hf.selection.uncertainty import iou_counts, iou_error, iou_influence, mean_iou

TIMESTEPS = [0, 500, 999]


@pytest.fixture
def blocks(normal) -> ImageData:
    """4 x 4 patches of 2 x 2 pixels, each bright, dark or neither, and a mask that says which."""
    classes = np.random.default_rng(0).integers(0, 3, (60, 4, 4)).repeat(2, axis=1).repeat(2, axis=2)
    pixels = 0.1 * normal(60, 2, 8, 8) + torch.from_numpy(classes - 1.0)[:, None].float()
    return ImageData(pixels, np.arange(60) % 2, masks=classes)


@pytest.fixture
def run(model, blocks, tmp_path):
    def run(**options) -> TimestepSelection:
        options = {"timesteps": TIMESTEPS, "cache_dir": tmp_path, "progress": False} | options
        return select_timestep(model, options.pop("images", blocks), method="grid", feature="blocks.0.query", **options)

    return run


def test_the_clean_timestep_is_found(run, blocks):
    selection = run()
    assert selection.timestep == 0
    assert selection.scores[0] > 0.95
    assert selection.scores[2] < 0.6
    assert selection.score_name == "validation mean IoU (tokens)"
    assert selection.options["task"] == "segmentation"
    assert selection.options["validation_tokens"] == 12 * 16
    assert selection.cost.forward_passes == 60 * len(TIMESTEPS)
    assert all(0 < error < 0.1 for error in selection.standard_errors[1:])
    turned = ImageData(blocks.items, masks=blocks.masks.swapaxes(1, 2))
    assert run(images=turned).scores[0] < 0.6


def test_a_repeated_run_is_equal_and_a_cached_one_runs_nothing(run, model):
    first = run()
    model.layers[0].register_forward_hook(lambda module, args, output: pytest.fail("ran") if len(args[0]) > 1 else None)
    again = run()
    assert (again.scores, again.standard_errors) == (first.scores, first.standard_errors)


def test_labels_decide_where_the_task_says_so(run, blocks):
    assert run(task="classification").score_name == "validation accuracy"
    assert run(images=ImageData(blocks.items, blocks.labels)).options["task"] == "classification"
    with pytest.raises(ValueError, match="task must be one of classification, segmentation; got 'depth'"):
        run(task="depth")
    with pytest.raises(ValueError, match="needs masks"):
        run(images=ImageData(blocks.items, blocks.labels), task="segmentation")
    with pytest.raises(ValueError, match="needs masks"):
        run(validation=ImageData(blocks.items, blocks.labels))


def test_only_the_images_of_sampled_tokens_are_run(run):
    selection = run(max_tokens=20)
    assert selection.options["train_tokens"] == selection.options["validation_tokens"] == 20
    assert selection.cost.forward_passes < 40 * len(TIMESTEPS)
    assert selection.num_images == 48
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        run(max_tokens=0)


def test_ignored_tokens_are_left_out(run, blocks):
    masks = blocks.masks.copy()
    masks[:, :4] = IGNORED
    masks[:, 4:, 0] = IGNORED  # half of the patches of the first column, whose other pixels still count
    selection = run(images=ImageData(blocks.items, masks=masks))
    assert selection.options["validation_tokens"] == 12 * 8
    assert selection.scores[0] > 0.9
    with pytest.raises(ValueError, match="all pixels of images are ignored"):
        run(images=ImageData(blocks.items, masks=np.full_like(masks, IGNORED)))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=40))
def test_mean_iou_is_scikit_learns(samples):
    truth, predicted, images = np.array(samples).T
    score = mean_iou(iou_counts(truth, predicted, images).sum(axis=0))
    assert score == pytest.approx(jaccard_score(truth, predicted, average="macro"))


def test_standard_error_is_about_the_spread_over_other_images(run, blocks):
    """Against scores on many other draws of the same number of images."""
    rng = np.random.default_rng(1)
    spread, errors = [], []
    for _ in range(20):
        rows = rng.permutation(60)
        selection = run(images=blocks.subset(rows[:30]), validation=blocks.subset(rows[30:42]), timesteps=[999])
        spread.append(selection.scores[0])
        errors.append(selection.standard_errors[0])
    assert 0.4 < np.mean(errors) / np.std(spread) < 2.5


def test_sample_ranks_clean_above_noise(tmp_path):
    data = ImageData.of("sample", masks=True).sample(120, 0)
    selection = select_timestep(
        load_model("sample").eval(), data, method="grid", timesteps=[0, 949], max_tokens=2000, cache_dir=tmp_path,
        progress=False,
    )  # fmt: skip
    assert selection.timestep == 0
    assert selection.scores[0] > selection.scores[1] + 0.05


def test_parts_of_images_are_resampled_like_the_mean_iou():
    generator = np.random.default_rng(0)
    images = np.repeat(np.arange(80), 50)
    truth = generator.integers(0, 3, len(images))
    skill = generator.uniform(0.5, 1, 80)[images]
    predicted = np.where(generator.uniform(size=len(images)) < skill, truth, generator.integers(0, 3, len(images)))
    counts = iou_counts(truth, predicted, images)
    parts = iou_influence(counts)
    assert parts.mean() == pytest.approx(mean_iou(counts.sum(axis=0)))
    assert parts.std(ddof=1) / 80**0.5 == pytest.approx(iou_error(counts, 0), rel=0.05)
    assert np.corrcoef(parts, generator.permutation(parts))[0, 1] < 0.5 < np.corrcoef(parts, skill[::50])[0, 1]
