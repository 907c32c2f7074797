"""Tables and picture of the regrets, from what `measure.py` wrote.

    python -m benchmarks.selection.report          # docs/evidence.md and its pictures; prints the README's table

Regret, in points: the best true score over the grid of timesteps minus that at the pick.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from scipy.stats import spearmanr

from aselect_hf.audit import (
    DO_NOT_TRUST,
    NUM_AUDITED,
    TOLERANCE,
    TRUST,
    UNCERTAIN,
    verdict_of,
    verdict_of_agreement,
)
from aselect_hf.audit.regret import Regret
from aselect_hf.files import atomic_file, read_json, write_text
from aselect_hf.selection.rule import WITHOUT_LABELS
from aselect_hf.selection.rules import RULES
from benchmarks.selection.pairs import PAIRS
from benchmarks.selection.rules import COMBINED, MEASURED, combine, criterion_of, parts_of

RESULTS = Path(__file__).parents[1] / "results" / "selection"
DOCS = Path(__file__).parents[2] / "docs"
GUESSES = {"fixed t = 100": 100, "fixed t = 0": 0}
AUDITED = ("hfr", "consensus", "logme", "fixed t = 100")

AGREEMENTS = (("hfr", "consensus"), ("rankme", "consensus"), ("consensus", "hfr"), ("hfr", "retrieval"))
LOSSES = (0, 0.5, 1, 2, 3, 5)
OF_PICKS = (TRUST, UNCERTAIN, DO_NOT_TRUST)
VERDICT_HEADS = [f"{head}{each}" for head in ("lost > 2: ", "lost less: ") for each in ("picks", *reversed(OF_PICKS))]

Content = dict[str, Any]


def scores_of(content: Content, rule: str, kind: str) -> np.ndarray:
    """Of the checkpoint's own feature: `(samples, timesteps)`, all draws of noise together.

    Args:
        kind: `"usual"`, the number of images that the rule has by default, or `"few"`, 64.
    """
    if rule in GUESSES:
        return -np.abs(np.array(content["timesteps"]) - float(GUESSES[rule]))[None]
    if rule in COMBINED:
        return combine(COMBINED[rule], [scores_of(content, part, kind) for part in parts_of(COMBINED[rule])])
    found = np.array(content["own_scores"][rule][kind])
    return found.reshape(-1, found.shape[-1])


def feature_scores(content: Content, rule: str) -> dict[str, np.ndarray]:
    """Of every feature: `(samples, timesteps)`."""
    if rule in GUESSES:
        return {name: scores_of(content, rule, "usual") for name in content["truth"]}
    if rule in COMBINED:
        parts = [feature_scores(content, part) for part in parts_of(COMBINED[rule])]
        return {name: combine(COMBINED[rule], [part[name] for part in parts]) for name in content["truth"]}
    return {name: np.array(x) for name, x in content["scores"][rule].items()}


def is_measured(content: Content, rule: str) -> bool:
    """Whether a pair has scores of a rule, or of the rules that a combined one is made of."""
    parts = parts_of(COMBINED[rule]) if rule in COMBINED else [rule]
    return rule in GUESSES or all(part in content["own_scores"] for part in parts)


def figures(content: Content, rule: str) -> dict[str, Any]:
    """Of one rule on one pair; regrets in points.

    Returns:
        regrets: at every sample's pick, on the checkpoint's own feature.
        few_regrets: of samples of 64 images.
        stable, few_stable: share of samples that pick the commonest timestep or a neighbor of it on the grid.
        all: regret, mean over all features.
        rank: Spearman correlation of the rule's curve with the true one, mean over features.
        own: what the checkpoint's own feature loses at the pick, against the best of all features and timesteps.
        auto: the same where block and kind are chosen together with the timestep; where the rule can.
    """
    truth = {name: 100 * np.array(curve["mean"]) for name, curve in content["truth"].items()}
    own = truth[content["default_feature"]]
    picks, few = (scores_of(content, rule, kind).argmax(axis=1) for kind in ("usual", "few"))
    everywhere = feature_scores(content, rule)
    flat = np.concatenate([*truth.values()])
    found = {
        "regrets": own.max() - own[picks],
        "few_regrets": own.max() - own[few],
        "stable": _stability(picks[: len(few)]),  # the first draw of noise
        "few_stable": _stability(few),
        "all": float(np.mean([_regrets(truth[name], x).mean() for name, x in everywhere.items()])),
        "rank": float(np.nanmean([_correlation(x.mean(axis=0), truth[name]) for name, x in everywhere.items()])),
        "own": float((flat.max() - own[picks]).mean()),
    }
    if rule in RULES and RULES[rule].chooses_feature:
        stacked = np.concatenate([*everywhere.values()], axis=1)
        found["auto"] = float((flat.max() - flat[stacked.argmax(axis=1)]).mean())
    return found


def _stability(picks: np.ndarray) -> float:
    mode = int(np.bincount(picks).argmax())
    return float((np.abs(picks - mode) <= 1).mean())


def _regrets(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return truth.max() - truth[scores.argmax(axis=1)]


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(spearmanr(np.where(np.isfinite(one), one, -1e9), other).statistic)


def interval(values: np.ndarray) -> str:
    low, high = np.percentile(values, (2.5, 97.5))
    return f"{low:.1f}..{high:.1f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def summary(found: dict[str, dict[str, dict[str, Any]]], roles: dict[str, str]) -> str:
    """A line a rule: mean and greatest of the pairs' mean regrets, over all pairs of a role."""
    rows = []
    for rule, pairs in found.items():
        cells = [rule, "yes" if _labeled(rule) else "no", str(_runs(rule))]
        for role in ("develop", "confirm"):
            own = [pairs[pair]["regrets"] for pair in roles if roles[pair] == role and pair in pairs]
            if not own:
                cells += ["-", "-"]
                continue
            cells.append(f"{np.mean(own):.1f} ({interval(np.mean(own, axis=0))})" + _of_how_many(len(own), role, roles))
            cells.append(f"{max(x.mean() for x in own):.1f}, {max(x.max() for x in own):.1f}")
        means = {
            key: np.mean([np.mean(each[key]) for each in pairs.values() if key in each])
            for key in ("few_regrets", "few_stable", "stable", "all", "rank", "own", "auto")
            if any(key in each for each in pairs.values())
        }
        cells += [f"{means['stable']:.0%}", f"{means['few_regrets']:.1f}", f"{means['few_stable']:.0%}"]
        cells += [f"{means['all']:.1f}", f"{means['rank']:.2f}", f"{means['own']:.1f}"]
        cells.append(f"{means['auto']:.1f}" if "auto" in means else "-")
        rows.append(cells)
    return table(
        ["rule", "labels", "runs a timestep", "develop", "worst pair, sample", "confirm", "worst pair, sample",
         "stable", "of 64 images", "stable", "all features", "rank", "own", "`auto`"],
        rows,
    )  # fmt: skip


def short(found: dict[str, dict[str, dict[str, Any]]], roles: dict[str, str]) -> str:
    """The README's table: mean over pairs, and the worst pair's mean."""
    rows = []
    for rule, pairs in found.items():
        cells = [rule, "yes" if _labeled(rule) else "no", str(_runs(rule))]
        for role in ("develop", "confirm"):
            means = [pairs[pair]["regrets"].mean() for pair in roles if roles[pair] == role and pair in pairs]
            shown = f"{np.mean(means):.1f} ({max(means):.1f})" if means else "-"
            cells.append(shown + _of_how_many(len(means), role, roles))
        stable, few, few_stable = (
            np.mean([np.mean(each[key]) for each in pairs.values()]) for key in ("stable", "few_regrets", "few_stable")
        )
        rows.append([*cells, f"{stable:.0%}", f"{few:.1f}", f"{few_stable:.0%}"])
    counts = [sum(role == each for role in roles.values()) for each in ("develop", "confirm")]
    heads = [f"{role}, {count} pairs" for role, count in zip(("develop", "confirm"), counts, strict=True)]
    return table(["rule", "labels", "runs a timestep", *heads, "stable", "of 64 images", "stable"], rows)


def _of_how_many(count: int, role: str, roles: dict[str, str]) -> str:
    """How many pairs a mean is of, where a rule was not measured on all of them."""
    every = sum(each == role for each in roles.values())
    return "" if count in (0, every) else f", {count} of {every} pairs"


def by_pair(found: dict[str, dict[str, dict[str, Any]]], roles: dict[str, str]) -> str:
    rows = [
        [
            rule,
            *(
                f"{of[pair]['regrets'].mean():.1f} ({interval(of[pair]['regrets'])})" if pair in of else "-"
                for pair in roles
            ),
        ]
        for rule, of in found.items()
    ]
    return table(["rule", *(f"{pair} ({role})" for pair, role in roles.items())], rows)


def by_checkpoint(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What rules lose where every checkpoint counts once, and what a rule loses that the other checkpoints chose."""
    everywhere = max(map(len, found.values()))
    lost: dict[str, dict[str, float]] = {}
    rows = []
    for rule, pairs in found.items():
        parts: dict[str, list[np.ndarray]] = {}
        for pair, of in pairs.items():
            parts.setdefault(PAIRS[pair].model, []).append(of["regrets"])
        means = {model: float(np.mean([x.mean() for x in own])) for model, own in parts.items()}
        few = np.mean([np.mean([pairs[p]["few_regrets"].mean() for p in pairs if PAIRS[p].model == m]) for m in parts])
        worst = max(means, key=lambda model: means[model])
        sample = max(float(x.max()) for own in parts.values() for x in own)
        if len(pairs) == everywhere:
            lost[rule] = means
        rows.append([
            rule, "yes" if _labeled(rule) else "no", str(len(means)), f"{np.mean([*means.values()]):.1f}",
            f"{means[worst]:.1f} ({worst})", f"{sample:.1f}", f"{few:.1f}",
        ])  # fmt: skip
    for labeled in (False, True):
        rules = [rule for rule in lost if _labeled(rule) == labeled and rule not in GUESSES]
        chosen = {}
        for model in next(iter(lost.values())):
            others = {rule: np.mean([x for m, x in lost[rule].items() if m != model]) for rule in rules}
            chosen[model] = lost[min(others, key=lambda rule: others[rule])][model]
        worst = max(chosen, key=lambda model: chosen[model])
        name = f"the best of the others, {'with' if labeled else 'without'} labels"
        cells = [f"{np.mean([*chosen.values()]):.1f}", f"{chosen[worst]:.1f} ({worst})", "-", "-"]
        rows.append([name, "yes" if labeled else "no", str(len(chosen)), *cells])
    heads = ["rule", "labels", "checkpoints", "mean", "worst checkpoint", "worst sample", "of 64 images"]
    return table(heads, rows)


def by_noise(contents: list[Content]) -> str:
    """What every rule's picks lose where images have noise of their own, beside what they lose with the stored draw."""
    some = [content for content in contents if content["fresh_noise_truth"] is not None]
    rows = []
    for rule in (*MEASURED, *COMBINED, *GUESSES):
        cells = []
        for content in some:
            if not is_measured(content, rule):
                cells.append("-")
                continue
            picks = scores_of(content, rule, "usual").argmax(axis=1)
            curves = (content["truth"][content["default_feature"]]["mean"], content["fresh_noise_truth"]["mean"])
            stored, fresh = (100 * (max(curve) - np.array(curve)[picks]).mean() for curve in curves)
            cells.append(f"{stored:.1f}, {fresh:.1f}")
        if set(cells) != {"-"}:
            rows.append([rule, *cells])
    return table(["rule", *(content["pair"] for content in some)], rows)


def curves(contents: list[Content]) -> str:
    """The truth of every pair."""
    rows = []
    for content in contents:
        own = content["truth"][content["default_feature"]]
        mean, deviation = 100 * np.array(own["mean"]), 100 * np.array(own["deviation"])
        best = int(mean.argmax())
        name, everywhere = max(content["truth"].items(), key=lambda item: max(item[1]["mean"]))
        best_of_all = int(np.argmax(everywhere["mean"]))
        fresh = content["fresh_noise_truth"]
        rows.append([
            content["pair"], content["default_feature"], f"{mean[0]:.1f}",
            f"{mean[best]:.1f} ± {deviation[best]:.1f} at t = {content['timesteps'][best]}", f"{mean[-1]:.1f}",
            f"{100 * max(everywhere['mean']):.1f}, {name}, t = {content['timesteps'][best_of_all]}",
            "-" if fresh is None else f"{100 * max(fresh['mean']):.1f} at t = "
            f"{content['timesteps'][int(np.argmax(fresh['mean']))]}, last {100 * fresh['mean'][-1]:.1f}",
        ])  # fmt: skip
    return table(
        ["pair", "feature", "score at t = 0", "best", "last", "best of all features", "fresh noise for each image"],
        rows,
    )


def audits(contents: list[Content]) -> str:
    """What the audit says of picks that lose more than `TOLERANCE` points, and of others."""
    rows = []
    for count, name in itertools.product((NUM_AUDITED, RULES["ridge"].num_images), (*AUDITED, "every timestep")):
        cases = [case for content in contents for case in audit_cases(content, name, count)]
        rows.append([str(count), name, *_verdicts(cases)])
    return table(["labeled images", "pick of", *VERDICT_HEADS], rows)


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
    curve = 100 * np.array(content["truth"][content["default_feature"]]["mean"])
    cases = []
    for ours, theirs in zip(*(content["own_scores"][name]["usual"][0] for name in (rule, check)), strict=True):
        pick, correlation = int(np.argmax(ours)), _correlation(np.array(ours), np.array(theirs))
        places = abs(pick - int(np.argmax(theirs)))
        verdict = verdict_of_agreement(places, correlation, False, rule == WITHOUT_LABELS)
        cases.append((float(curve.max() - curve[pick]), verdict))
    return cases


def default_audits(contents: list[Content]) -> str:
    """What the whole audit says of the default pick of every pair."""
    rows = []
    for content in contents:
        found, curve = content["default_audit"], 100 * np.array(content["truth"][content["default_feature"]]["mean"])
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
    curve = 100 * np.array(content["truth"][content["default_feature"]]["mean"])
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


def _labeled(rule: str) -> bool:
    known = MEASURED | COMBINED
    return rule in known and known[rule].labels != "none"


def _runs(rule: str) -> int:
    """Runs of the network at a timestep; those that parts of a rule share count once."""
    if rule in COMBINED:
        return sum({criterion_of(MEASURED[part]).sees: _runs(part) for part in parts_of(COMBINED[rule])}.values())
    return MEASURED[rule].num_images * MEASURED[rule].runs if rule in MEASURED else 0


def draw_regrets(found: dict[str, dict[str, dict[str, Any]]], roles: dict[str, str]) -> None:
    """Mean regret, a row a rule and a column a pair."""
    values = np.array(
        [[of[pair]["regrets"].mean() if pair in of else np.nan for pair in roles] for of in found.values()]
    )
    figure, axes = pyplot.subplots(figsize=(2.4 + 0.62 * len(roles), 1.8 + 0.3 * len(found)), layout="constrained")
    shown = axes.imshow(values, cmap="RdYlGn_r", vmin=0, vmax=6, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color, text = "white" if value > 5 else "black", "-" if np.isnan(value) else f"{value:.1f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    names = [f"{pair} ({role})" for pair, role in roles.items()]
    axes.set_xticks(range(len(roles)), names, rotation=50, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(found)), [*found], fontsize=8)
    axes.set_title("Points lost against exhaustive search (mean over samples of images)", fontsize=9)
    figure.colorbar(shown, label="points", extend="max")
    _save(figure, "regret.png")


def draw_curves(contents: list[Content]) -> None:
    """The true curve of every pair, and where three rules pick."""
    columns = 4
    rows = -(-len(contents) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.1 * columns, 2.3 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(contents) :]:
        axes.axis("off")
    for content, axes in zip(contents, grid.flat, strict=False):
        own, steps = content["truth"][content["default_feature"]], np.array(content["timesteps"])
        mean, deviation = 100 * np.array(own["mean"]), 100 * np.array(own["deviation"])
        axes.plot(steps, mean, color="black", marker=".", markersize=4, label="probe (the truth)")
        axes.fill_between(steps, mean - deviation, mean + deviation, color="black", alpha=0.15, linewidth=0)
        if content["fresh_noise_truth"] is not None:
            fresh = 100 * np.array(content["fresh_noise_truth"]["mean"])
            axes.plot(steps, fresh, color="gray", linestyle=":", label="fresh noise for each image")
        for rule, color in (("hfr", "tab:red"), ("consensus", "tab:orange"), ("logme", "tab:green")):
            picks, counts = np.unique(scores_of(content, rule, "usual").argmax(axis=1), return_counts=True)
            sizes = 20 + 100 * counts / counts.sum()
            axes.scatter(steps[picks], mean[picks], s=sizes, color=color, alpha=0.7, label=rule, zorder=3)
        axes.set_title(f"{content['pair']} ({content['role']})", fontsize=9)
        axes.set_xscale("symlog", linthresh=20)
        axes.tick_params(labelsize=7)
        axes.set_ylabel("accuracy, %" if content["task"] == "classification" else "mean IoU, %", fontsize=7)
    grid.flat[0].legend(fontsize=6)
    figure.supxlabel("t", fontsize=9)
    _save(figure, "curves.png")


def _save(figure: Any, name: str) -> None:
    with atomic_file(DOCS / name) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


PAGE = """# How far is every rule from exhaustive search?

Made by `python -m benchmarks.selection.report` from `benchmarks/results/selection/*.json`, which
`python -m benchmarks.selection.measure PAIR... --root ROOT` writes; the pairs, the commands that make their checkpoints
and which of them developed the rules are in [pairs.py](../benchmarks/selection/pairs.py).

{protocol}

Hardware: {hardware}. {versions}. The checkpoints, except for the shipped, the planted and the class-conditional one,
were trained on one NVIDIA H100 in bfloat16. Of the class-conditional one (trained on two cores of a CPU) six features
were measured instead of all. `icr` and `hfr_authors` came later: they were measured on five pairs, on a CPU.

## In one picture

![Regret of every rule on every pair](regret.png)

## The truth, and where three rules pick

Band: standard deviation over the probe's seeds. Size of a dot: how often. The axis of t is logarithmic from 20 on.

![Curves of all pairs](curves.png)

{curves}

## All pairs together

Points lost. `develop`, `confirm`: mean over pairs, in brackets the 95 % interval of that mean over samples of images
and draws of noise; then the worst pair's mean, and the worst single sample. `stable`: share of the samples that pick
the commonest timestep or its neighbor on the grid. `of 64 images`: mean over all pairs of picks from 64 images
(labeled for the rules with labels), and then how stable those are. `all features`: mean over all blocks and kinds.
`rank`: Spearman correlation with the true curve. `own`: what is lost against the best of all features and timesteps by
the checkpoint's own feature at the pick; `auto`: by block, kind and timestep chosen together. `all features`, `rank`,
and `auto` are of one sample, and of `consensus` by the clusters of all features together.

{summary}

## Every checkpoint once

Pairs that share a checkpoint tell less than their number. Here the pairs of a checkpoint are averaged first. The last
lines choose, for every checkpoint, the rule that loses least on all others (of the rules that were measured on all
pairs): that is what to expect of a default on a network that it was not chosen on.

{checkpoints}

## Stored noise, or noise of each image's own

A probe can subtract a stored draw of noise, which is the same for every image; noise of each image's own it cannot. The
two curves differ, and so do the rules that find their best timesteps: points lost with the stored draw, and with fresh
noise, of the same picks. With fresh noise clean inputs are best, and rules that favor them are right: HFR (whose own
images have fresh noise), ICR, RankMe, retrieval. With the stored draw they are not, where the best is inside.

{noise}

## Pair by pair

Mean and 95 % interval over samples and draws, the checkpoint's own feature.

{pairs}

## The audit

`aselect audit` of the default rule's pick, on the training images that the rules see. `truly lost`: points, by the
benchmark's truth. `probe`: the highest leave-one-out score of the audit's probe; `untrained network`: its score on a
network of the same shape with random weights, at that timestep.

{default_audits}

What it says of picks, by whether they truly lose more than 2 points: of 1,000 labeled images (one sample a pair) and of
500 (five samples); of masks, of 4,000 tokens. `every timestep`: as if each had been picked once.

{audits}

Of 1,000 images, every timestep, by what it truly loses. Near the 2 points the truth is itself a matter of luck: it is
measured on 1,000 other images (500 of `elpv`, 510 of `nuclei`), with a standard error of 0.5 to 1.9 points for
accuracies.

{flags}

Without labels it asks another rule: `consensus`, and of that one's picks `hfr`. Every sample of both rules; without the
bounds and warnings that can make a verdict of the shipped audit worse. The last line: why `retrieval` is not the check.

{agreements}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    contents = [read_json(path) for name in PAIRS if (path := RESULTS / f"{name}.json").is_file()]
    roles = {content["pair"]: content["role"] for content in contents}
    rules = (*MEASURED, *COMBINED, *GUESSES)
    measured = {rule: [content for content in contents if is_measured(content, rule)] for rule in rules}
    found = {rule: {each["pair"]: figures(each, rule) for each in some} for rule, some in measured.items() if some}
    print(short(found, roles))
    draw_regrets(found, roles)
    draw_curves(contents)
    page = PAGE.format(
        protocol=contents[0]["protocol"],
        hardware="; ".join(sorted({content["hardware"] for content in contents})),
        versions=", ".join(f"{name} {version}" for name, version in contents[0]["versions"].items()),
        curves=curves(contents),
        summary=summary(found, roles),
        checkpoints=by_checkpoint(found),
        noise=by_noise(contents),
        pairs=by_pair(found, roles),
        default_audits=default_audits(contents),
        audits=audits(contents),
        flags=flags_by_loss(contents),
        agreements=agreements(contents),
    )
    write_text(DOCS / "evidence.md", page)


if __name__ == "__main__":
    main()
