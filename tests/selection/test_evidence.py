"""The benchmark of rules: it judges the rules that the package ships, and its figures are what their names say."""

import numpy as np
import pytest

from aselect_hf.data.classes import stratified_sample
from aselect_hf.data.image_data import ImageData
from aselect_hf.selection import RULES, select_timestep
from aselect_hf.selection.samples import LEAST_PER_CLASS
from aselect_hf.tasks import CLASSIFICATION, SEGMENTATION
from benchmarks.selection import audits, fused, goals, left_out, page, report, sources, spreads
from benchmarks.selection.measure import Measurement
from benchmarks.selection.pairs import PAIRS
from benchmarks.selection.rules import COMBINED, MEASURED, SUMS, UNCORRECTED, combine
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
    rows, other = (features[FEATURE] for features in (small.labeled_rows, small.with_other_noise("labeled rows", 1)))
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
    assert audits.audit_cases(content, "ridge", 500) == [(pytest.approx(10), "trust")]
    assert [verdict for _, verdict in audits.audit_cases(content, "every timestep", 500)] == [
        "do not trust",
        *["trust"] * 2,
    ]
    assert audits.audit_cases(content, "fixed t = 0", 1000) == [(pytest.approx(20), "do not trust")]


def test_verdict_of_the_default_pick_beside_what_it_truly_loses(content):
    audit = {"timestep": 100, "verdict": "trust", "probe": 0.71, "untrained": 0.5}
    *_, row = audits.default_audits([content | {"pair": "p", "default_audit": audit}]).splitlines()
    assert row == "| p | 100 | 10.0 | trust | 71.0 | 50.0 |"


def test_agreement_of_rules_beside_what_their_picks_lose(content):
    own = content["own_scores"]
    own["consensus"] = {"usual": [[[0, 2, 1], [2, 0, 1]]]}
    own["hfr"] = {"usual": [[[0, 2, 1], [0, 1, 2]]]}
    assert audits.agreement_cases(content, "hfr", "consensus") == [
        (pytest.approx(10), "trust"),
        (pytest.approx(0), "do not trust"),
    ]
    assert audits.agreement_cases(content, "consensus", "hfr")[1] == (pytest.approx(20), "uncertain")
    content["audit"] = []
    head, _, first, *_ = audits.agreements([content]).splitlines()
    assert first == "| hfr | consensus | 1 | 0% | 0% | 100% | 1 | 100% | 0% | 0% |"
    assert head.count("|") == first.count("|")


def test_no_checkpoint_and_no_images_both_develop_and_confirm():
    for what in ("model", "data"):
        roles = {}
        for pair in PAIRS.values():
            roles.setdefault(getattr(pair, what), set()).add(pair.role)
        assert all(len(each) == 1 for each in roles.values()), (what, roles)


def test_the_noised_twin_flips_a_fifth_of_the_labels_to_other_classes():
    images = ImageData(np.zeros((50, 1, 4, 4)), np.arange(50) % 5)
    noised = PAIRS["fashion-mnist-noised"].training_images(images)
    assert (np.asarray(noised.labels) != np.asarray(images.labels)).sum() == 10
    np.testing.assert_array_equal(noised.labels, PAIRS["fashion-mnist-noised"].training_images(images).labels)
    assert {*noised.labels} == {*images.labels}


def test_a_sample_of_the_noised_twin_has_its_share_of_flipped_labels():
    images = ImageData(np.zeros((4000, 1, 2, 2)), np.arange(4000) % 10)
    before, after = (each.sample(1000, 0) for each in (images, PAIRS["fashion-mnist-noised"].training_images(images)))
    assert 0.17 < (np.asarray(before.labels) != np.asarray(after.labels)).mean() < 0.23


def test_the_shifted_twin_has_fewer_images_of_every_next_class():
    images = ImageData(np.arange(100 * 16).reshape(100, 1, 4, 4), np.arange(100) % 5)
    shifted = PAIRS["fashion-mnist-shifted"].training_images(images)
    np.testing.assert_array_equal(np.bincount(shifted.labels), [20, 13, 8, 5, 4])
    assert PAIRS["fashion-mnist"].training_images(images) is images


def planted_pair(content, pair, best):
    """A pair whose best timestep is at index `best`, and where ridge alone finds it."""
    truth = {"a": {"mean": [0.5 + 0.1 * (each == best) for each in range(3)], "deviation": [0] * 3}}
    scores = {
        rule: [[[float(each == best if rule == "ridge" else each == 0) for each in range(3)]]] for rule in MEASURED
    }
    own = {rule: {"usual": found, "few": found[0]} for rule, found in scores.items()}
    return content | {"pair": pair, "truth": truth, "own_scores": own}


def test_a_choice_is_made_without_the_checkpoint_that_it_is_judged_on(content):
    # clean inputs are best on two checkpoints, the last timestep on the third; only a fixed timestep must be chosen
    pairs = [("mnist", 0), ("planted", 0), ("nuclei", 2)]
    contents = [planted_pair(content, pair, best) for pair, best in pairs]
    rows = [line for line in left_out.left_out(contents).splitlines() if "a fixed timestep" in line]
    assert [row.split(" | ")[1:4] for row in rows] == [
        ["checkpoint", "3.3", "10.0 (nuclei-dit)"],
        ["family", "3.3", "10.0 (nuclei-dit)"],
    ]


def test_goals_are_judged_on_the_choice_without_the_checkpoint(content):
    # the default with labels misses the best of the third checkpoint; the others choose ridge, which does not
    contents = [planted_pair(content, pair, best) for pair, best in [("mnist", 0), ("planted", 0), ("nuclei", 2)]]
    rows = [line.split(" | ")[1:] for line in goals.goals(contents).splitlines() if "`logme`" in line]
    assert rows == [
        ["mean", "0.3", "3.33", "0.00", "yes |"],
        ["worst checkpoint", "1.5", "10.00", "0.00", "yes |"],
        ["of 64 images", "0.6", "3.33", "0.00", "yes |"],
    ]


def test_pairs_on_which_a_default_rule_loses_more_than_hfr(content):
    contents = [planted_pair(content, pair, 0) for pair in ("mnist", "nuclei")]
    assert goals.worse_than_baseline(contents) == "`consensus_rank` on no pair, `logme` on no pair"
    contents[1]["own_scores"] = contents[1]["own_scores"] | {"logme": {"usual": [[[0, 0, 1]]], "few": [[0, 0, 1]]}}
    assert goals.worse_than_baseline(contents).endswith("`logme` on 1 of 2 pairs (nuclei)")


def test_the_page_names_what_was_not_measured(content):
    whole = content | {"pair": "mnist", "versions": {"numpy": "2.5"}}
    part = content | {"pair": "nuclei", "versions": {"numpy": "2.4"}, "truth": dict.fromkeys("abcdef")}
    part["own_scores"] = {rule: each for rule, each in content["own_scores"].items() if rule not in ("icr", "snr")}
    assert page.gaps([whole]) == ""
    assert page.gaps([whole, part]) == (
        "Six features instead of all were measured on nuclei. Not measured on nuclei: `icr`, `snr`."
    )
    assert page.unmeasured([whole, part]).startswith("Defined and not measured: fashion-mnist, ")
    assert page.versions([whole, part]) == "numpy 2.4 or 2.5"


def test_limits_are_shown_without_the_twins_too(content):
    truth = {"a": {"mean": [0.7, 0.69, 0.6], "deviation": [0] * 3}}
    fine, trusted = (
        {"labeled": 1000, "informative": True, "regrets": [[0, 0, 1]] * 2 + [x]} for x in ([9, 5, 12], [0] * 3)
    )
    contents = [
        content | {"pair": name, "truth": truth, "audit": [audit, audit | {"labeled": 500}]}
        for name, audit in (("mnist", fine), ("fashion-mnist-noised", trusted), ("nuclei", fine))
    ]
    rows = [line.split(" | ") for line in audits.limits(contents).splitlines()[2:]]
    assert [(row[0], row[5]) for row in rows[::2]] == [("| shipped", "50%"), ("| shipped, without the twins", "100%")]


def test_checkpoints_that_share_images_are_one_family(content):
    contents = [content | {"pair": name} for name in ("cifar10", "cifar10-flow", "elpv", "nuclei", "mnist")]
    groups = left_out.families(contents)
    assert sorted(map(tuple, groups)) == [("cifar10-dit", "cifar10-flow-dit"), ("fashion-mnist-dit",), ("nuclei-dit",)]


def test_limits_of_trust_are_chosen_on_developing_pairs(content):
    truth = {"a": {"mean": [0.7, 0.69, 0.6], "deviation": [0] * 3}}
    far = {"labeled": 1000, "informative": True, "regrets": [[0, 0, 1], [1.9, 0, 3.9], [9, 5, 12]]}
    audit = [far, far | {"labeled": 500}]
    contents = [content | {"pair": name, "truth": truth, "audit": audit} for name in ("mnist", "nuclei")]
    shipped, _, chosen, _ = audits.limits(contents).splitlines()[2:]
    assert shipped == "| shipped | 2 | 4 | 1000 | 0% | 100% | 0% | 100% |"
    assert chosen == "| chosen on the developing pairs | 2 | 4 | 1000 | 0% | 100% | 0% | 100% |"


def test_spreads_of_rules_beside_that_of_the_truth(content):
    *_, row = spreads.spreads([content | {"pair": "p"}]).splitlines()
    assert row == "| p | 20.0 | 2.0 | 2.0 | 2.0 | 2.0 |"


def test_a_sum_of_rules_is_the_one_of_the_package(small):
    shipped = select_timestep(
        small.model, small.train, method="consensus_rank", feature=FEATURE, timesteps=STEPS, progress=False
    )
    parts = [np.array(scores_of(small, name))[None] for name in SUMS["consensus_rank"]]
    np.testing.assert_allclose(combine(RULES["consensus_rank"], parts)[0], shipped.scores, atol=1e-4)


def test_what_a_second_timestep_is_worth():
    seeds = [[0.70, 0.72], [0.71, 0.75]]
    found = {"rows": [{"timesteps": [50, 0][: count + 1], "test": tests} for count, tests in enumerate(seeds)]}
    one, two = fused.fused_table(found).splitlines()[2:]
    assert one == "| 50 | 1 | 71.0 ± 1.4 | - |"
    assert two == "| 50, 0 | 2 | 73.0 ± 2.8 | +2.0 ± 1.4 |"
