"""Timesteps that are chosen together complement each other, and travel with the model as what its heads read."""

from __future__ import annotations

import numpy as np
import pytest

from aselect_hf import ASelectDiTForImageClassification, TimestepSelection, select_timestep
from aselect_hf.hub.card_sections import selection_facts
from aselect_hf.selection import RULES, criteria
from aselect_hf.selection.fusing import fuse
from tests.selection.conftest import TIMESTEPS

LABELS = np.arange(200) % 4
FUSING = ("ridge", "knn", "logme")


def score(candidates: list[np.ndarray]) -> list[float]:
    return [criteria.logme(each[:, 0], LABELS) for each in candidates]


def no_parts(candidate: np.ndarray) -> None:
    """LogME is no mean over images."""


def right(candidate: np.ndarray) -> np.ndarray:
    return (criteria.ridge_predictions(candidate[:, 0], LABELS).classes == LABELS).astype(float)


def accuracies(candidates: list[np.ndarray]) -> list[float]:
    return [float(right(each).mean()) for each in candidates]


@pytest.fixture
def cells() -> np.ndarray:
    """Features `(timesteps, rows, 1, width)`: the first tells one bit of the class, the last the other."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((4, 200, 1, 6))
    found[0, :, 0, 0] = 3 * (LABELS % 2) + 0.2 * rng.standard_normal(200)
    found[1] = found[0] + 0.05 * rng.standard_normal(found[0].shape)
    found[3, :, 0, 0] = 3 * (LABELS // 2) + 0.3 * rng.standard_normal(200)
    return found


def test_what_complements_is_added_and_a_copy_is_not(cells):
    chosen, scores = fuse(score, no_parts, cells, 0, 2)
    assert chosen == [0, 3]
    assert scores[1] > scores[0] + 0.1
    assert scores[0] == pytest.approx(*score([cells[0]]))
    chosen, scores = fuse(score, no_parts, cells, 0, 4)
    assert chosen == [0, 3]
    assert len(scores) == 3
    assert scores[2] <= scores[1]


def test_an_accuracy_must_rise_by_more_than_chance(cells):
    chosen, scores = fuse(accuracies, right, cells, 0, 4)
    assert chosen == [0, 3]
    assert scores[1] > scores[0] + 0.2
    added = []
    for seed in range(10):
        noise = np.random.default_rng(seed).standard_normal((8, 200, 1, 6))
        noise[0, :, 0, :4] += 1.2 * np.eye(4)[LABELS]
        added.append(len(fuse(accuracies, right, noise, 0, 3)[0]) - 1)
    assert sum(added) <= 2


def test_one_timestep_is_the_ordinary_selection(cells):
    assert fuse(score, no_parts, cells, 2, 1) == ([2], score([cells[2]]))


@pytest.mark.parametrize("method", FUSING)
def test_the_choice_becomes_what_heads_read(run, method, model, tmp_path):
    plain = run(method, feature="blocks.1.hidden")
    assert (plain.fused_timesteps, plain.fused_scores, plain.fusion) == (None, None, "")
    fused = run(method, feature="blocks.1.hidden", num_timesteps_to_fuse=3)
    assert (fused.timestep, fused.scores) == (plain.timestep, plain.scores)
    assert fused.fused_timesteps[0] == fused.timestep
    assert fused.fused_scores[0] == pytest.approx(max(fused.scores))
    assert len(set(fused.fused_timesteps)) == len(fused.fused_timesteps) <= 3
    assert TimestepSelection.load(fused.save(tmp_path / "selection.json")) == fused
    assert "adds nothing significant" in fused.fusion or len(fused.fused_timesteps) == 3
    fused.fused_timesteps, fused.fused_scores = [fused.timestep, TIMESTEPS[-1]], [0.5, 0.7]
    fused.apply(model)
    head = ASelectDiTForImageClassification(model.config)
    assert head.config.head_timesteps == fused.fused_timesteps
    assert TimestepSelection.from_config(head.config).fusion == fused.fusion
    assert ("several timesteps", fused.fusion) in selection_facts(fused)
    assert "several timesteps" not in dict(selection_facts(plain))
    config = plain.apply(model).config
    assert "fused_timesteps" not in config.selection
    assert config.head_timesteps is None
    config.head_timesteps = [5, 7]
    assert plain.apply(model).config.head_timesteps == [5, 7]
    fused.apply(model)
    assert "a head that reads them runs the network 2 times" in fused.fusion
    fused.fused_timesteps = [fused.timestep]
    assert fused.apply(model).config.head_timesteps is None


@pytest.mark.parametrize("method", [name for name in RULES if name not in FUSING])
def test_other_rules_refuse(run, method):
    with pytest.raises(ValueError, match=f"needs a rule that scores .*, ridge or knn or logme; got '{method}'"):
        run(method, num_timesteps_to_fuse=2)


def test_less_than_one_is_refused(model, labeled):
    with pytest.raises(ValueError, match="num_timesteps_to_fuse must be at least 1, got 0"):
        select_timestep(model, labeled, method="ridge", num_timesteps_to_fuse=0)


def test_more_than_the_candidates_are_refused(model, labeled):
    """Otherwise a second timestep would be called worthless that does not exist."""
    with pytest.raises(ValueError, match="num_timesteps_to_fuse=2 is more than the 1 candidate timesteps"):
        select_timestep(model, labeled, method="ridge", timesteps=[50], num_timesteps_to_fuse=2)
