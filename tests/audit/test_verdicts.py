"""The bounds of a pick's regret, the verdicts they lead to, and what is suspicious."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aselect_hf.audit import ANY_TIMESTEP, DO_NOT_TRUST, TRUST, UNCERTAIN, VERDICTS, verdict_of
from aselect_hf.audit.audit import _worst_if_all_are_trusted
from aselect_hf.audit.curves import audited_timesteps, rank_correlation, regret_by, rule_name
from aselect_hf.audit.regret import Regret, best_exceeds, estimate_regret, paired_deviations, pick_shares
from aselect_hf.audit.suspicions import doubt_of_agreement, doubt_of_pick, shares_of_picks, warn_of_model, warn_of_pick
from aselect_hf.audit.verdicts import judge_by_agreement, judge_by_probe
from aselect_hf.data.classes import has_classes
from aselect_hf.selection import TimestepSelection
from aselect_hf.selection.result import SelectionCost

seeds = st.integers(0, 1000)


def answers(accuracies: list[float], images: int, seed: int = 0, shared: float = 0.7) -> np.ndarray:
    """Right and wrong answers; an image is equally hard at all timesteps with probability `shared`."""
    rng = np.random.default_rng(seed)
    hardness = np.where(
        rng.random((images, len(accuracies))) < shared, rng.random((images, 1)), rng.random((images, len(accuracies)))
    )
    return (hardness < np.array(accuracies)).astype(float)


def selection(method: str, scores, *, per_image=None, timestep=None, schedule=None, **fields) -> TimestepSelection:
    timesteps = [100 * index for index in range(len(scores))]
    return TimestepSelection(
        method=method,
        feature="blocks.0.hidden",
        timestep=timesteps[int(np.argmax(scores))] if timestep is None else timestep,
        timesteps=timesteps,
        scores=[float(score) for score in scores],
        standard_errors=fields.pop("standard_errors", [0.01] * len(scores)),
        cost=SelectionCost(1, 1.0, 1.0),
        schedule=schedule or {},
        num_images=fields.pop("num_images", 100),
        per_image_scores=None if per_image is None else per_image.tolist(),
        **fields,
    )


def probed(accuracies: list[float], images: int = 500, pick: int = 0, tolerance: float = 2.0, seed: int = 0, **shared):
    outcomes = answers(accuracies, images, seed, **shared)
    probe = selection("ridge", outcomes.mean(axis=0), per_image=outcomes, num_images=images)
    return judge_by_probe(probe, pick, regret_by(probe, pick, seed), tolerance, informative=True)


def test_the_best_timestep_is_trusted():
    verdict, sentence = probed([0.8, 0.7, 0.5, 0.3])
    assert verdict == TRUST
    assert sentence == (
        "t = 0 is within 0.0 points of the best of the grid with 95 % confidence (leave-one-out ridge, 500 images)"
    )


def test_a_bad_timestep_is_not():
    verdict, sentence = probed([0.5, 0.7, 0.8, 0.3])
    assert verdict == DO_NOT_TRUST
    assert "t = 0 loses about" in sentence
    assert "against t = 200, at least" in sentence


def test_few_images_leave_it_open():
    verdict, sentence = probed([0.8, 0.79, 0.7, 0.6], images=40)
    assert verdict == UNCERTAIN
    assert "may lose up to" in sentence


def test_flat_curves_are_called_flat():
    verdict, sentence = probed([0.8] * 5, shared=1.0)
    assert verdict == TRUST
    assert sentence.startswith("the curve is flat: all timesteps from 0 to 400 are about equally good; t = 0 is within")
    verdict, sentence = probed([0.5] * 5, images=60, shared=0.5)
    assert verdict == UNCERTAIN
    assert sentence.startswith("the curve is flat within its error")


def test_nothing_to_choose_is_a_verdict_of_its_own():
    outcomes = answers([0.8] * 5, 2000, shared=0.98)
    probe = selection("ridge", outcomes.mean(axis=0), per_image=outcomes, num_images=2000)
    worst = _worst_if_all_are_trusted(probe, 2.0, True, 0)
    assert 0 < worst <= 4.0
    verdict, sentence = judge_by_probe(probe, 1, regret_by(probe, 1, 0), 2.0, True, worst=worst)
    assert verdict == ANY_TIMESTEP
    assert sentence.startswith("nothing to choose: any timestep from 0 to 400 is as good as t = 100; each is within")


def test_few_images_or_one_bad_timestep_leave_something_to_choose():
    for accuracies, images in ([0.8] * 5, 60), ([0.8, 0.8, 0.8, 0.8, 0.7], 2000):
        outcomes = answers(accuracies, images, shared=0.9)
        probe = selection("ridge", outcomes.mean(axis=0), per_image=outcomes, num_images=images)
        assert _worst_if_all_are_trusted(probe, 2.0, True, 0) is None


def test_a_probe_at_chance_tells_nothing():
    outcomes = answers([0.5] * 10, 200, shared=0.0)
    assert not best_exceeds(outcomes, 0.5, seed=0)
    assert best_exceeds(answers([0.5] * 9 + [0.75], 200, shared=0.0), 0.5, seed=0)
    probe = selection("ridge", outcomes.mean(axis=0), per_image=outcomes)
    verdict, sentence = judge_by_probe(probe, 0, regret_by(probe, 0, 0), 2.0, informative=False)
    assert verdict == DO_NOT_TRUST
    assert sentence.startswith("at no timestep do the features predict these labels significantly better than chance (")


@settings(max_examples=20)
@given(seeds, st.integers(0, 4), st.integers(3, 200), st.floats(0, 1))
def test_bounds_are_ordered_and_never_negative(seed, pick, images, shared):
    outcomes = answers(np.random.default_rng(seed).random(5).tolist(), images, seed, shared)
    regret = estimate_regret(range(5), outcomes.mean(axis=0), paired_deviations(outcomes, pick, seed), pick)
    assert 0 <= regret.lower <= regret.estimate <= regret.upper <= 200


@settings(max_examples=20)
@given(seeds, st.tuples(st.floats(0.1, 60), st.floats(0.1, 60)))
def test_more_tolerance_never_means_less_trust(seed, tolerances):
    accuracies = np.random.default_rng(seed).uniform(0.4, 0.9, 4).tolist()
    strict, lenient = (probed(accuracies, 80, tolerance=tolerance, seed=seed)[0] for tolerance in sorted(tolerances))
    assert VERDICTS.index(lenient) <= VERDICTS.index(strict)


@pytest.mark.parametrize(
    ("accuracies", "images"),
    [([0.7] * 8, 60), ([0.7, 0.72, 0.74, 0.75, 0.74, 0.7, 0.6, 0.5], 200), ([0.6] * 7 + [0.7], 100)],
    ids=["flat", "hill", "one"],
)
def test_bounds_cover_the_truth(accuracies, images):
    """In at least 90 of 100 repetitions the true regret is within either bound, where 95 are expected."""
    truth, below, above = 100 * (max(accuracies) - accuracies[0]), 0, 0
    for seed in range(100):
        outcomes = answers(accuracies, images, seed)
        regret = estimate_regret(range(8), outcomes.mean(axis=0), paired_deviations(outcomes, 0, seed), 0)
        above += regret.upper >= truth - 1e-9
        below += regret.lower <= truth + 1e-9
    assert above >= 90
    assert below >= 90


def test_the_estimate_is_less_cursed_than_the_maximum():
    plain, corrected = [], []
    for seed in range(50):
        outcomes = answers([0.7] * 10, 200, seed, shared=0.5)
        scores = outcomes.mean(axis=0)
        plain.append(100 * (scores.max() - scores[0]))
        corrected.append(estimate_regret(range(10), scores, paired_deviations(outcomes, 0, seed), 0).estimate)
    assert 0 < np.mean(corrected) < 0.75 * np.mean(plain)  # measured: 0.65


def test_scores_of_masks_are_judged_by_their_errors():
    probe = selection("ridge", [0.3, 0.5, 0.2], standard_errors=[0.01, 0.01, 0.01])
    regret = regret_by(probe, 0, seed=0)
    assert regret.lower < 20 < regret.upper
    assert regret.upper - regret.lower < 10
    assert regret_by(probe, 1, seed=0).upper == 0


@pytest.mark.parametrize(
    ("at", "correlation", "refuted", "doubt", "verdict"),
    [
        (1, 0.9, True, "", TRUST),
        (1, 0.9, False, "it shakes", UNCERTAIN),
        (1, 0.1, False, "", UNCERTAIN),
        (1, None, False, "", UNCERTAIN),
        (3, None, False, "", UNCERTAIN),
        (3, None, True, "", DO_NOT_TRUST),
        (3, 0.9, False, "", UNCERTAIN),
        (3, 0.9, True, "", DO_NOT_TRUST),
        (3, 0.1, False, "", DO_NOT_TRUST),
    ],
)
def test_without_labels_agreement_decides(at, correlation, refuted, doubt, verdict):
    hfr, retrieval = selection("hfr", [3, 2, 1, 0]), selection("retrieval", np.arange(4) == at)
    found, sentence = judge_by_agreement(hfr, retrieval, "hfr", hfr.timesteps, correlation, refuted, doubt)
    assert found == verdict
    assert f"HFR t = 0, retrieval t = {100 * at}" in sentence
    assert "None" not in sentence
    assert ("agree, but it shakes" in sentence) == bool(doubt)
    assert ("disagree" in sentence) == ("label 100 images and run again" in sentence) == (verdict == DO_NOT_TRUST)
    assert "trust" not in sentence  # the verdict says it


@pytest.mark.parametrize("places", [2, 3, 4, 5, 20])
def test_agreement_on_few_timesteps_is_never_trusted(places):
    falling, check = selection("rankme", -np.arange(places)), selection("consensus", -np.arange(places) / 2)
    doubt = doubt_of_agreement(falling, check)
    verdict, sentence = judge_by_agreement(falling, check, "rankme", falling.timesteps, 1.0, False, doubt)
    assert verdict == (TRUST if places >= 5 else UNCERTAIN)
    assert (f"agree, but {places} timesteps are too few to tell" in sentence) == (places < 5)


def test_equal_scores_are_no_pick_and_no_check():
    equal, falling = selection("rankme", [0.3] * 8), selection("consensus", -np.arange(8))
    verdict, sentence = judge_by_agreement(equal, falling, "rankme", equal.timesteps, 0.0, False)
    assert verdict == DO_NOT_TRUST
    assert sentence.startswith("no labels, and rankme gives all 8 candidates the same score; label 100 images")
    assert doubt_of_agreement(falling, selection("hfr", [0.3] * 8)) == "HFR gives all timesteps the same score"
    shaky = selection("rankme", -np.arange(8), perturbed_timesteps=[0, 300, 0])
    assert doubt_of_agreement(shaky, falling) == "the pick of rankme depends on rounding"


def test_a_probe_that_picked_says_so():
    outcomes = answers([0.8, 0.7, 0.5], 500)
    probe = selection("ridge", outcomes.mean(axis=0), per_image=outcomes, num_images=500)
    _, sentence = judge_by_probe(probe, 0, regret_by(probe, 0, 0), 2.0, True, itself=True)
    assert sentence.endswith(
        "500 images; the same rule made the pick, so it checks itself and the bounds are optimistic)"
    )


def test_hfr_as_a_check_is_bounded_on_its_own_scale():
    """Differences of HFR are hundredths: imaginary images with a difference of 1 would drown them."""
    scores = 0.3 + 0.001 * np.random.default_rng(0).standard_normal((64, 3)) + np.array([0.02, 0, 0])
    hfr = selection("hfr", scores.mean(axis=0), per_image=scores)
    assert regret_by(hfr, 1, seed=0).lower > 1


def test_suspicious_curves_are_warned_of(model):
    schedule = model.noise_schedule.to_dict()
    good = selection(
        "hfr", [0.4, 0.3, 0.1] + [0.0] * 7, schedule=schedule,
        raw_scores=[0.6] + [0.5] * 9, control_scores=[0.2] + [0.5] * 9,
    )  # fmt: skip
    assert warn_of_pick(good, good, "hfr", np.eye(10)[0]) == []
    bad = selection(
        "hfr", [0.01] + [0.0] * 9, schedule=schedule, num_images=8,
        raw_scores=[0.5] * 9 + [0.7], control_scores=[0.49] + [0.5] * 8 + [0.7],
    )  # fmt: skip
    few, unstable, trap, noise = warn_of_pick(bad, bad, "hfr", np.full(10, 0.1))
    assert "only 8 images" in few
    assert "unstable" in unstable
    assert "would pick t = 900" in trap
    assert "98% of the images' HFR" in noise
    assert doubt_of_pick(good, good, "hfr", np.eye(10)[0]) == doubt_of_pick(good, good, "hfr", None) == ""
    assert doubt_of_pick(good, good, "hfr", np.full(10, 0.1)) == "the pick of HFR is unstable"
    assert doubt_of_pick(bad, bad, "hfr", np.eye(10)[0]) == "the feature is mostly noise or position at this timestep"
    guess = selection("fixed", [], timestep=0)
    assert warn_of_pick(bad, guess, "fixed", None) == [noise]
    raw = selection("hfr", bad.raw_scores, schedule=schedule)
    assert any("picked t = 900" in warning for warning in warn_of_pick(bad, raw, "hfr, uncorrected", None))


@pytest.mark.parametrize(("trained", "images", "warned"), [(0.8, 500, False), (0.6, 500, True), (0.8, 12, True)])
def test_a_checkpoint_must_surely_beat_an_untrained_network(trained, images, warned):
    outcomes = answers([0.5, trained, 0.6], images, shared=1.0)
    probe = selection("ridge", [0.0, 1.0, 0.0], per_image=outcomes[:, :2].repeat(2, 1)[:, [0, 2, 0]])
    twin = selection("ridge", [outcomes[:, 2].mean()], per_image=outcomes[:, [2]])
    assert bool(warn_of_model(probe, twin, 0)) == warned


def test_shares_of_picks():
    sure = np.tile([0.0, 1.0, 0.5], (20, 1))
    assert pick_shares(sure, 0, 100).tolist() == [0, 1, 0]
    torn = np.array([[1.0, 0.0], [0.0, 1.0]] * 20)
    shares = pick_shares(torn, 0, 100)
    assert shares.sum() == pytest.approx(1)
    assert 0.3 < shares[0] < 0.75


def test_small_functions():
    rising, constant = selection("hfr", [1, 2, 3]), selection("hfr", [5, 5, 5])
    assert rank_correlation(rising, selection("logme", [10, 20, 90, 0])) == pytest.approx(1)
    assert rank_correlation(rising, constant) == 0
    assert rank_correlation(rising, selection("logme", [1, 2])) is None
    assert not has_classes(None)
    assert not has_classes([0, 0, 0, 1])
    assert has_classes([0, 0, 3, 3])


def test_the_grid_of_a_pick(model):
    """If a rule scored only some of its candidates, the audit shows all, and the name says that HFR searched."""
    whole = selection("hfr", [1, 2, 3])
    assert audited_timesteps(model, whole, None) == whole.timesteps
    assert rule_name(whole, whole.timesteps) == "hfr"
    guess = selection("fixed", [], timestep=7)
    assert audited_timesteps(model, guess, [0, 500]) == [0, 7, 500]
    assert len(audited_timesteps(model, guess, None)) == 21
    searched = selection("hfr", [1, 2], options={"search": "coarse_to_fine"})
    assert set(audited_timesteps(model, searched, 4)) == {0, 100, 105, 422, 949}
    assert rule_name(searched, audited_timesteps(model, searched, 4)) == "hfr, searched"
    assert rule_name(selection("hfr", [1], options={"noise_correction": False}), [0]) == "hfr, uncorrected"
    shortlist = selection("shortlist", [1, 2], per_image=np.tile([0.0, 1.0], (5, 1)))
    assert shares_of_picks(shortlist, [0, 50, 100], 0).tolist() == [0, 0, 1]
    assert shares_of_picks(whole, whole.timesteps, 0) is None


@pytest.mark.parametrize(
    ("estimate", "lower", "upper", "expected"),
    [
        (0.0, 0.0, 1.5, TRUST),
        (1.9, 0.5, 4.0, TRUST),
        (1.9, 0.0, 4.1, UNCERTAIN),
        (2.1, 0.0, 3.0, UNCERTAIN),
        (2.1, 0.1, 3.0, DO_NOT_TRUST),
    ],
)
def test_verdict_rests_on_estimate_and_bounds(estimate, lower, upper, expected):
    regret = Regret(0, estimate, lower, upper, differs=True)
    assert verdict_of(regret, 2.0, informative=True) == expected
    assert verdict_of(regret, 2.0, informative=False) == DO_NOT_TRUST
    assert verdict_of(regret, 20.0, informative=True) == TRUST
