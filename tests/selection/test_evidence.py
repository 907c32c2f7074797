"""The benchmark of rules: it judges the rules that the package ships, and its figures are what their names say."""

import numpy as np
import pytest

from aselect_hf.data.classes import stratified_sample
from aselect_hf.selection import RULES, select_timestep
from aselect_hf.selection.samples import LEAST_PER_CLASS
from aselect_hf.tasks import CLASSIFICATION, SEGMENTATION
from benchmarks.selection import report, sources
from benchmarks.selection.measure import Measurement
from benchmarks.selection.pairs import PAIRS
from benchmarks.selection.rules import COMBINED, MEASURED, UNCORRECTED, combine
from benchmarks.selection.sources import Sources

STEPS = [0, 150, 900]


FEATURE = "blocks.4.mlp"
IMAGES = 60


@pytest.fixture(scope="module")
def small():
    yield from few_images(CLASSIFICATION)


@pytest.fixture(scope="module")
def masked():
    yield from few_images(SEGMENTATION)


def few_images(task):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VIEWED": IMAGES, "RATIOED": IMAGES}.items():
            patch.setattr(sources, name, value)
        patch.setattr(sources, "KINDS", ("mlp",))
        patch.setattr(sources, "default_timesteps", lambda schedule: STEPS)
        yield Sources("sample", "sample", task, num_train=IMAGES, num_validation=IMAGES)


def scores_of(found, name):
    """As the benchmark computes them, of all images."""
    rule = MEASURED[name]
    values = found.seen_by(rule)[FEATURE]
    if rule.criterion.together:
        return rule.criterion.score([*values])
    truth = found.truth(found.train) if rule.labels != "none" else ()
    return [rule.criterion.score(each, *truth) for each in values]


def test_every_rule_of_the_package_is_measured():
    measured = MEASURED | COMBINED
    assert {*measured} - {UNCORRECTED} == {*RULES} - {"fixed", "gate", "grid"}
    assert all(measured[name] is RULES[name] for name in {*measured} - {UNCORRECTED})


@pytest.mark.parametrize("rule", [name for name in MEASURED if name != UNCORRECTED])
def test_rules_are_those_of_the_package(small, rule):
    """No option is given: what is measured is what the package does by default."""
    shipped = select_timestep(small.model, small.train, method=rule, feature=FEATURE, timesteps=STEPS, progress=False)
    # HFR's noise is another draw here, for all features at once
    np.testing.assert_allclose(scores_of(small, rule), shipped.scores, atol=2e-2 if rule[:3] == "hfr" else 1e-4)
    assert shipped.cost.forward_passes == RULES[rule].runs * IMAGES * len(STEPS)


@pytest.mark.parametrize("rule", [name for name, rule in MEASURED.items() if rule.labels != "none"])
def test_rules_for_masks_are_those_of_the_package(masked, rule):
    shipped = select_timestep(masked.model, masked.train, method=rule, feature=FEATURE, timesteps=STEPS, progress=False)
    np.testing.assert_allclose(scores_of(masked, rule), shipped.scores, atol=1e-4)


def test_samples_are_those_of_the_package(small, masked):
    labels = np.asarray(small.train.labels)
    (rows,) = Measurement(PAIRS["fashion-mnist"], small)._samples(RULES["logme"], {}, 30, 1)
    np.testing.assert_array_equal(rows, stratified_sample(labels, 30, 100, LEAST_PER_CLASS))
    measurement = Measurement(PAIRS["fashion-mnist-segmentation"], masked)
    (rows,) = measurement._samples(RULES["logme"], {}, 30, 1)
    tokens_of_an_image = len(measurement.labels) // IMAGES
    assert len({*measurement.images[rows]}) == 30
    assert len({*rows}) == len(rows) == 30 * tokens_of_an_image


def test_other_noise_changes_rows_a_little(small):
    rows, other = (
        features["blocks.4.mlp"] for features in (small.labeled_rows, small.with_other_noise("labeled rows", 1))
    )
    assert rows.shape == other.shape == (3, 60, 144)
    similar = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(rows, other, strict=True)]
    assert similar[0] > 0.99 > similar[1] > similar[2]


@pytest.fixture
def content():
    """Two features, three timesteps; by `own_scores`, rule ridge picks the second of the first feature."""
    rows = {"a": [[0, 2, 1], [0, 2, 1]], "b": [[3, 1, 0], [3, 1, 0]]}
    scores = {rule: rows for rule in MEASURED}
    own = {rule: {"usual": [rows["a"], rows["a"]], "few": [[0, 2, 1], [2, 0, 1]]} for rule in MEASURED}
    truth = {"a": {"mean": [0.5, 0.6, 0.7], "deviation": [0] * 3}, "b": {"mean": [0.9, 0.2, 0.1], "deviation": [0] * 3}}
    return {"default_feature": "a", "timesteps": [0, 100, 200], "truth": truth, "scores": scores, "own_scores": own}


def test_figures_of_a_rule(content):
    found = report.figures(content, "ridge")
    np.testing.assert_allclose(found["regrets"], [10] * 4)
    np.testing.assert_allclose(found["few_regrets"], [10, 20])
    assert found["stable"] == 1
    assert found["all"] == pytest.approx((10 + 0) / 2)
    assert found["rank"] == pytest.approx((0.5 + 1) / 2)
    assert (found["own"], found["auto"]) == (pytest.approx(30), pytest.approx(0))
    assert "auto" not in report.figures(content, "hfr")
    np.testing.assert_allclose(report.figures(content, "fixed t = 100")["regrets"], [10])


def test_a_shortlist_is_confirmed_by_the_second_rule(content):
    first, second = np.array([[5, 4, 3, 2, 1, 0.0]]), np.array([[0, 1, 2, 3, 4, 5.0]])
    combined = combine(COMBINED["shortlist"], [first, second])
    assert combined.argmax() == 4
    np.testing.assert_array_equal(combined, [[0, 1, 2, 3, 4, -np.inf]])


def test_pairs_cover_both_roles_and_tasks():
    kinds = {(pair.role, pair.task) for pair in PAIRS.values()}
    assert kinds == {(role, task) for role in ("develop", "confirm") for task in ("classification", "segmentation")}


def test_verdicts_of_picks_beside_what_they_truly_lose(content):
    good, bad = [0.0, 0.0, 1.0], [9.0, 5.0, 12.0]
    sure = {"labeled": 500, "informative": True, "regrets": [bad, good, good]}
    content["audit"] = [sure, sure | {"labeled": 1000, "informative": False}]
    assert report.audit_cases(content, "ridge", 500) == [(pytest.approx(10), "trust")]
    assert [verdict for _, verdict in report.audit_cases(content, "every timestep", 500)] == [
        "do not trust",
        *["trust"] * 2,
    ]
    assert report.audit_cases(content, "fixed t = 0", 1000) == [(pytest.approx(20), "do not trust")]


def test_verdict_of_the_default_pick_beside_what_it_truly_loses(content):
    audit = {"timestep": 100, "verdict": "trust", "probe": 0.71, "untrained": 0.5}
    *_, row = report.default_audits([content | {"pair": "p", "default_audit": audit}]).splitlines()
    assert row == "| p | 100 | 10.0 | trust | 71.0 | 50.0 |"


def test_agreement_of_rules_beside_what_their_picks_lose(content):
    own = content["own_scores"]
    own["consensus"] = {"usual": [[[0, 2, 1], [2, 0, 1]]]}
    own["hfr"] = {"usual": [[[0, 2, 1], [0, 1, 2]]]}
    assert report.agreement_cases(content, "hfr", "consensus") == [
        (pytest.approx(10), "trust"),
        (pytest.approx(0), "do not trust"),
    ]
    assert report.agreement_cases(content, "consensus", "hfr")[1] == (pytest.approx(20), "uncertain")
    content["audit"] = []
    head, _, first, *_ = report.agreements([content]).splitlines()
    assert first == "| hfr | consensus | 1 | 0% | 0% | 100% | 1 | 100% | 0% | 0% |"
    assert head.count("|") == first.count("|")
