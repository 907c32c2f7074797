"""Tables of the audit: what it says of picks, beside what they truly lose."""

from __future__ import annotations

import itertools

import numpy as np

from aselect_hf.audit import (
    DO_NOT_TRUST,
    NUM_AUDITED,
    TOLERANCE,
    TRUST,
    TRUSTED_UPPER,
    UNCERTAIN,
    verdict_of,
    verdict_of_agreement,
)
from aselect_hf.audit.regret import Regret
from aselect_hf.selection.rule import CHECK_WITHOUT_LABELS, WITHOUT_LABELS
from aselect_hf.selection.rules import RULES
from benchmarks.selection.curves import Content, correlation, scores_of, table, true_curve
from benchmarks.selection.pairs import PAIRS

AUDITED = ("hfr", "consensus", "consensus_rank", "logme", "fixed t = 100")
AGREEMENTS = (
    ("hfr", "consensus"),
    ("rankme", "consensus"),
    ("consensus", "hfr"),
    ("consensus_rank", "hfr"),
    ("hfr", "retrieval"),
)
MOST_FALSE_ALARMS, ALWAYS_FLAGGED = 0.1, 3.0
"""The goals: of timesteps that lose less than `TOLERANCE` points at most this share is flagged; beyond 3 points all."""
LIMITS = tuple(itertools.product((1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0), (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)))
"""Points of the estimate and of the upper bound up to which a timestep may be trusted, strictest first."""
LOSSES = (0, 0.5, 1, 2, 3, 5)
OF_PICKS = (TRUST, UNCERTAIN, DO_NOT_TRUST)
VERDICT_HEADS = [f"{head}{each}" for head in ("lost > 2: ", "lost less: ") for each in ("picks", *reversed(OF_PICKS))]


def audits(contents: list[Content]) -> str:
    """What the audit says of picks that lose more than `TOLERANCE` points, and of others."""
    rows = []
    for count, name in itertools.product((NUM_AUDITED, RULES["ridge"].num_images), (*AUDITED, "every timestep")):
        cases = [case for content in contents for case in audit_cases(content, name, count)]
        rows.append([str(count), name, *_verdicts(cases)])
    return table(["labeled images", "pick of", *VERDICT_HEADS], rows)


def limits(contents: list[Content]) -> str:
    """The limits of trust that developing pairs choose, and what they flag on those that confirm.

    The strictest limits are chosen that hold both goals on the developing pairs with 1,000 labeled images, if any do;
    beside them are the limits that ship.
    """
    developing, confirming = ([c for c in contents if PAIRS[c["pair"]].role == role] for role in ("develop", "confirm"))
    holding = [each for each in LIMITS if _holds(*_flagged(developing, NUM_AUDITED, *each))]
    shipped = (TOLERANCE, TRUSTED_UPPER * TOLERANCE)
    some = [("shipped", shipped, developing)]
    if len(others := [c for c in developing if not PAIRS[c["pair"]].is_twin]) < len(developing):
        some.append(("shipped, without the twins", shipped, others))
    if holding:
        some.append(("chosen on the developing pairs", holding[0], developing))
    rows = []
    for (name, each, pairs), count in itertools.product(some, (NUM_AUDITED, RULES["ridge"].num_images)):
        cells = [f"{share:.0%}" for part in (pairs, confirming) for share in _flagged(part, count, *each)]
        rows.append([name, *map("{:g}".format, each), str(count), *cells])
    heads = [
        f"{role}: {what}" for role in ("develop", "confirm") for what in ("lost < 2, flagged", "lost > 3, flagged")
    ]
    return table(["limits", "estimate", "upper bound", "labeled images", *heads], rows)


def missed(contents: list[Content]) -> str:
    """The timesteps that lose more than 3 points and are trusted with 1,000 labeled images."""
    found = []
    for content in contents:
        for (loss, verdict), t in zip(
            audit_cases(content, "every timestep", NUM_AUDITED), itertools.cycle(content["timesteps"]), strict=False
        ):
            if loss > ALWAYS_FLAGGED and verdict == TRUST:
                found.append(f"t = {t} of {content['pair']} ({loss:.1f} points)")
    return ", ".join(found) or "none"


def _holds(false_alarms: float, found: float) -> bool:
    return false_alarms <= MOST_FALSE_ALARMS and found == 1


def _flagged(contents: list[Content], count: int, estimate: float, upper: float) -> tuple[float, float]:
    """Shares of timesteps flagged, of those that lose less than `TOLERANCE` points and of those that lose more than 3.

    Args:
        count: labeled images.
        estimate, upper: limits up to which a timestep is trusted.
    """
    losses, flags = [], []
    for content in contents:
        curve = true_curve(content)
        for audit in (each for each in content["audit"] if each["labeled"] == count):
            estimates, _, uppers = np.array(audit["regrets"]).T
            losses.append(curve.max() - curve)
            flags.append((estimates > estimate) | (uppers > upper) | (not audit["informative"]))
    lost, flagged = np.concatenate(losses), np.concatenate(flags)
    return float(flagged[lost < TOLERANCE].mean()), float(flagged[lost > ALWAYS_FLAGGED].mean())


def flags_by_loss(contents: list[Content]) -> str:
    """How often the audit of 1,000 labeled images does not trust a timestep, by what that truly loses."""
    cases = [case for content in contents for case in audit_cases(content, "every timestep", NUM_AUDITED)]
    rows = []
    for least, most in itertools.pairwise((*LOSSES, np.inf)):
        verdicts = [verdict for loss, verdict in cases if least <= loss < most]
        name = f"{least:g} to {most:g}" if most < np.inf else f"{least:g} or more"
        flagged = sum(verdict != TRUST for verdict in verdicts)
        rows.append([name, str(len(verdicts)), _share(flagged, len(verdicts))])
    return table(["points lost", "timesteps", "not trusted"], rows)


def agreements(contents: list[Content]) -> str:
    """What agreement with another rule says of picks, as `audits`."""
    rows = []
    for rule, check in AGREEMENTS:
        cases = [case for content in contents for case in agreement_cases(content, rule, check)]
        rows.append([rule, check, *_verdicts(cases)])
    return table(["pick of", "checked by", *VERDICT_HEADS], rows)


def agreement_cases(content: Content, rule: str, check: str) -> list[tuple[float, str]]:
    """By sample of both rules, of the first draw of noise: what the pick truly loses, in points, and the verdict."""
    curve = true_curve(content)
    cases = []
    for ours, theirs in zip(*(first_draw(content, name) for name in (rule, check)), strict=True):
        pick, alike = int(np.argmax(ours)), correlation(np.array(ours), np.array(theirs))
        places = abs(pick - int(np.argmax(theirs)))
        verdict = verdict_of_agreement(places, alike, False, rule in (WITHOUT_LABELS, CHECK_WITHOUT_LABELS))
        cases.append((float(curve.max() - curve[pick]), verdict))
    return cases


def first_draw(content: Content, rule: str) -> np.ndarray:
    """Scores with the first draw of the stored noise: `(samples, timesteps)`."""
    scores = scores_of(content, rule, "usual")
    return scores[: len(content["own_scores"]["hfr"]["usual"][0])]


def default_audits(contents: list[Content]) -> str:
    """What the whole audit says of the default pick of every pair."""
    rows = []
    for content in contents:
        found, curve = content["default_audit"], true_curve(content)
        loss = curve.max() - curve[content["timesteps"].index(found["timestep"])]
        scores = [f"{100 * found[name]:.1f}" for name in ("probe", "untrained")]
        rows.append([content["pair"], str(found["timestep"]), f"{loss:.1f}", found["verdict"], *scores])
    return table(["pair", "pick", "truly lost", "verdict", "probe", "untrained network"], rows)


def _verdicts(cases: list[tuple[float, str]]) -> list[str]:
    """Of picks that lose more than `TOLERANCE` points, and of others: how many, and the share of every verdict."""
    cells = []
    for bad in (True, False):
        verdicts = [verdict for loss, verdict in cases if (loss > TOLERANCE) == bad]
        cells += [str(len(verdicts)), *(_share(verdicts.count(each), len(verdicts)) for each in reversed(OF_PICKS))]
    return cells


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def audit_cases(content: Content, rule: str, labeled: int) -> list[tuple[float, str]]:
    """By audited sample: what the pick truly loses, in points, and the verdict.

    Args:
        labeled: images that the audit is given.
        rule: whose pick; or `"every timestep"`: as if each was picked once.
    """
    curve = true_curve(content)
    cases = []
    for sample, audit in enumerate(content["audit"]):
        if audit["labeled"] == labeled:
            picks = range(len(curve))
            if rule != "every timestep":
                scores = scores_of(content, rule, "usual")
                picks = [int(scores[sample % len(scores)].argmax())]
            for pick in picks:
                regret = Regret(0, *audit["regrets"][pick], True)
                cases.append((float(curve.max() - curve[pick]), verdict_of(regret, TOLERANCE, audit["informative"])))
    return cases
