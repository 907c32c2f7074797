"""The verdict of an audit and its sentence, from a regret or from the agreement of two rules."""

from __future__ import annotations

from aselect_hf.audit.regret import Regret
from aselect_hf.selection import TimestepSelection
from aselect_hf.selection.rule import BY_CLUSTERS

ANY_TIMESTEP, TRUST, UNCERTAIN, DO_NOT_TRUST = "any timestep", "trust", "uncertain", "do not trust"
VERDICTS = (ANY_TIMESTEP, TRUST, UNCERTAIN, DO_NOT_TRUST)

# What the verdicts rest on (ours).
TOLERANCE = 2.0
"""Points that a trusted pick may lose by the estimate."""
TRUSTED_UPPER = 2.0
"""How many times as many points a trusted pick may lose by the upper bound."""
NEAR = 1
"""Places on the grid by which two picks may differ and still agree."""
ALIKE = 0.5
"""Least rank correlation of two curves that agree."""
FEW_LABELED = 100


def judge_by_probe(
    probe: TimestepSelection,
    pick: int,
    regret: Regret,
    tolerance: float,
    informative: bool,
    itself: bool = False,
    worst: float | None = None,
) -> tuple[str, str]:
    """Verdict and sentence with labels.

    There is nothing to choose if every timestep of the grid would be trusted. A curve that varies by at most
    `tolerance`, or without a significant difference from the pick, is only called flat in the sentence, because with
    too few images every curve is.

    Args:
        pick: index of the pick.
        informative: whether the probe is significantly above chance at some timestep.
        itself: whether the probe is also the rule that picked.
        worst: the points that any timestep of the grid may lose, if each would be trusted; else `None`.
    """
    grid, t = probe.timesteps, probe.timesteps[pick]
    evidence = f"leave-one-out ridge, {probe.num_images} images"
    if itself:
        evidence += "; the same rule made the pick, so it checks itself and the bounds are optimistic"
    if not informative:
        reason = "at no timestep do the features predict these labels significantly better than chance"
        return DO_NOT_TRUST, f"{reason} ({evidence})"
    if worst is not None:
        reason = f"nothing to choose: any timestep from {grid[0]} to {grid[-1]} is as good as t = {t}"
        return (
            ANY_TIMESTEP,
            f"{reason}; each is within {worst:.1f} points of the best with 95 % confidence ({evidence})",
        )
    spread = 100 * (max(probe.scores) - min(probe.scores))
    flat = ""
    if spread <= tolerance:
        flat = f"the curve is flat: all timesteps from {grid[0]} to {grid[-1]} are about equally good; "
    elif not regret.differs:
        span = f"{grid[0]} to {grid[-1]}"
        flat = f"the curve is flat within its error: no timestep from {span} differs significantly from t = {t}; "
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
    """Whether to trust a pick, by its regret. `docs/evidence.md` shows how often this is right.

    `"trust"` needs an estimate within `tolerance` and an upper bound within twice that. `"do not trust"` needs an
    estimate beyond `tolerance` and a significantly better timestep, or a probe that is nowhere above chance.
    """
    if not informative:
        return DO_NOT_TRUST
    if regret.estimate > tolerance:
        return DO_NOT_TRUST if regret.lower > 0 else UNCERTAIN
    return TRUST if regret.upper <= TRUSTED_UPPER * tolerance else UNCERTAIN


def judge_by_agreement(
    picked: TimestepSelection,
    checked: TimestepSelection,
    name: str,
    grid: list[int],
    correlation: float | None,
    refuted: bool,
    doubt: str = "",
) -> tuple[str, str]:
    """Verdict and sentence without labels.

    Args:
        name: name of the rule that picked, see `Audit.method`.
        grid: timesteps of the curves.
        correlation: rank correlation of the curves; `None` if the rule has no curve, which rules out `"trust"`.
        refuted: whether another timestep is better than the pick by the check with 95 % confidence.
        doubt: see `doubt_of_pick`; any doubt rules out `"trust"`.
    """
    if picked.tied:
        reason = f"no labels, and {written(name)} gives all {len(picked.scores)} candidates the same score"
        return DO_NOT_TRUST, f"{reason}; label {FEW_LABELED} images and run again"
    picks = f"{written(name)} t = {picked.timestep}, {written(checked.method)} t = {checked.timestep}"
    places = abs(grid.index(picked.timestep) - grid.index(checked.timestep))
    agreement = verdict_of_agreement(places, correlation, refuted, picked.method in BY_CLUSTERS)
    if agreement == DO_NOT_TRUST:
        reason = f"no labels, and independent rules disagree ({picks})"
        return DO_NOT_TRUST, f"{reason}; label {FEW_LABELED} images and run again"
    evidence = picks if correlation is None else f"{picks}, rank correlation {correlation:.2f}"
    if agreement == TRUST and not doubt:
        reason = f"no labels, but independent rules agree ({evidence})"
        return TRUST, f"{reason}; labels would show how many points the pick may lose"
    if agreement == TRUST:
        how = f"agree, but {doubt}"
    elif places == 0:
        how = "pick the same timestep, but " + ("one has no curve" if correlation is None else "their curves differ")
    else:
        how = "agree only partly"
    return UNCERTAIN, f"no labels, and independent rules {how} ({evidence}); label {FEW_LABELED} images to be sure"


def verdict_of_agreement(places: int, correlation: float | None, refuted: bool, best_rule: bool) -> str:
    """Whether to trust a pick, by that of an independent rule. `docs/evidence.md` shows how often this is right.

    Args:
        places: places on the grid between the two picks.
        correlation, refuted: see `judge_by_agreement`.
        best_rule: whether the best rule without labels picked; its pick is never `"do not trust"`.
    """
    alike = correlation is not None and correlation >= ALIKE
    if places <= NEAR:
        return TRUST if alike else UNCERTAIN
    contradicted = refuted or (correlation is not None and not alike)
    return DO_NOT_TRUST if contradicted and not best_rule else UNCERTAIN


def written(name: str) -> str:
    """A rule's name in a sentence."""
    return name.replace("hfr", "HFR")
