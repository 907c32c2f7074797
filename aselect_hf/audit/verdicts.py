"""From a regret, or from two rules that agree, to a verdict and its sentence."""

from __future__ import annotations

from aselect_hf.audit.regret import Regret
from aselect_hf.selection import TimestepSelection
from aselect_hf.selection.rule import WITHOUT_LABELS

TRUST, UNCERTAIN, DO_NOT_TRUST = "trust", "uncertain", "do not trust"
VERDICTS = (TRUST, UNCERTAIN, DO_NOT_TRUST)

# What the verdicts rest on (ours).
TOLERANCE = 2.0
"""Points of the probe's score that a trusted pick may lose by the estimate; by the bound, twice as many."""
NEAR = 1
"""Places on the grid by which two picks may differ and still agree."""
ALIKE = 0.5
"""Rank correlation of two curves from which their rules agree."""
FEW_LABELED = 100


def judge_by_probe(
    probe: TimestepSelection, pick: int, regret: Regret, tolerance: float, informative: bool, itself: bool = False
) -> tuple[str, str]:
    """Verdict and sentence where there are labels.

    The curve is called flat where it varies by no more than `tolerance`, or nothing on it differs from the pick beyond
    its error. The bounds decide all the same: of too few images every curve is flat.

    Args:
        pick: index of the pick.
        informative: whether the probe is above chance somewhere.
        itself: whether the probe is also the rule that picked.
    """
    grid, t = probe.timesteps, probe.timesteps[pick]
    evidence = f"leave-one-out ridge, {probe.num_images} images"
    if itself:
        evidence += ", which also made the pick: it checks itself, and the bounds are optimistic"
    if not informative:
        return DO_NOT_TRUST, f"features tell nothing about these labels at any timestep ({evidence})"
    spread = 100 * (max(probe.scores) - min(probe.scores))
    flat = ""
    if spread <= tolerance:
        flat = f"the curve is flat: any timestep from {grid[0]} to {grid[-1]} is as good; "
    elif not regret.differs:
        flat = f"the curve is flat within its error: none from {grid[0]} to {grid[-1]} differs from t = {t}; "
    verdict, best = verdict_of(regret, tolerance, informative), "against the best of the grid"
    estimate, upper = f"{regret.estimate:.1f}", f"{regret.upper:.1f}"
    if verdict == DO_NOT_TRUST:
        loss = f"t = {t} loses about {estimate} points against t = {regret.best_timestep}"
        return verdict, f"{loss}, at least {regret.lower:.1f} with 95 % confidence ({evidence})"
    if verdict == UNCERTAIN:
        loss = f"t = {t} may lose up to {upper} points {best}"
        return verdict, f"{flat}{loss} (95 % confidence; estimate {estimate}; {evidence})"
    loss = f"is within {upper} points of the best of the grid"
    if regret.upper > tolerance:
        loss = f"loses about {estimate} points {best}, at most {upper}"
    return verdict, f"{flat}t = {t} {loss} with 95 % confidence ({evidence})"


def verdict_of(regret: Regret, tolerance: float, informative: bool) -> str:
    """Whether to trust a pick, by its regret.

    Trust needs an estimate within `tolerance` and an upper bound within twice that; distrust an estimate beyond it and
    a timestep that is surely better, or a probe that is nowhere above chance. How often either is right:
    `docs/evidence.md`.
    """
    if not informative:
        return DO_NOT_TRUST
    if regret.estimate > tolerance:
        return DO_NOT_TRUST if regret.lower > 0 else UNCERTAIN
    return TRUST if regret.upper <= 2 * tolerance else UNCERTAIN


def judge_by_agreement(
    picked: TimestepSelection,
    checked: TimestepSelection,
    name: str,
    grid: list[int],
    correlation: float | None,
    refuted: bool,
    doubt: str = "",
) -> tuple[str, str]:
    """Verdict and sentence where there are no labels.

    Args:
        name: of the rule that picked, see `Audit.method`.
        grid: timesteps of the curves.
        correlation: rank correlation of the curves; `None` where the rule has none: then the pick is not trusted.
        refuted: whether the check is better elsewhere than at the pick with 95 % confidence.
        doubt: see `doubt_of_pick`; with any, the pick is not trusted.
    """
    if picked.tied:
        reason = (
            f"no labels, and nothing to choose: all {len(picked.scores)} candidates score the same by {written(name)}"
        )
        return DO_NOT_TRUST, f"{reason}; label {FEW_LABELED} images and run again"
    picks = f"{written(name)} t = {picked.timestep}, {written(checked.method)} t = {checked.timestep}"
    places = abs(grid.index(picked.timestep) - grid.index(checked.timestep))
    agreement = verdict_of_agreement(places, correlation, refuted, picked.method == WITHOUT_LABELS)
    if agreement == DO_NOT_TRUST:
        return (
            DO_NOT_TRUST,
            f"no labels, and independent rules disagree ({picks}); label {FEW_LABELED} images and run again",
        )
    evidence = picks if correlation is None else f"{picks}, rank correlation {correlation:.2f}"
    if agreement == TRUST and not doubt:
        return (
            TRUST,
            f"no labels, but independent rules agree ({evidence}); labels would say how many points it may lose",
        )
    if agreement == TRUST:
        how = f"agree, but {doubt}"
    elif places == 0:
        how = "pick the same timestep, but " + ("one has no curve" if correlation is None else "their curves differ")
    else:
        how = "agree only in part"
    return UNCERTAIN, f"no labels, and independent rules {how} ({evidence}); label {FEW_LABELED} images to be sure"


def verdict_of_agreement(places: int, correlation: float | None, refuted: bool, best_rule: bool) -> str:
    """Whether to trust a pick, by that of an independent rule. How often it is right: `docs/evidence.md`.

    Args:
        places: of the grid, between the two.
        correlation, refuted: see `judge_by_agreement`.
        best_rule: whether the pick is of the rule that is best without labels: then it is at most uncertain.
    """
    alike = correlation is not None and correlation >= ALIKE
    if places <= NEAR:
        return TRUST if alike else UNCERTAIN
    contradicted = refuted or (correlation is not None and not alike)
    return DO_NOT_TRUST if contradicted and not best_rule else UNCERTAIN


def written(name: str) -> str:
    """A rule's name in a sentence."""
    return name.replace("hfr", "HFR")
