"""Tables and picture of the regrets, from what `measure.py` wrote.

    python -m benchmarks.selection.report          # docs/evidence.md and its pictures; prints the README's table

Regret, in points: the best true score over the grid of timesteps minus that at the pick.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from aselect_hf.files import write_text
from aselect_hf.selection.rules import RULES
from benchmarks.selection.audits import agreements, audits, default_audits, flags_by_loss, limits, missed
from benchmarks.selection.curves import (
    GUESSES,
    Content,
    correlation,
    feature_scores,
    interval,
    is_measured,
    needs_labels,
    runs_of,
    scores_of,
    stored,
    table,
)
from benchmarks.selection.fused import stored_table
from benchmarks.selection.goals import goals, worse_than_baseline
from benchmarks.selection.left_out import by_checkpoint, fixed_by_hand, left_out, weights
from benchmarks.selection.page import PAGE, gaps, hardware, unmeasured, versions
from benchmarks.selection.pairs import PAIRS
from benchmarks.selection.pictures import DOCS, draw_curves, draw_regrets
from benchmarks.selection.rules import COMBINED, MEASURED
from benchmarks.selection.spreads import spreads, tellers


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
        "rank": float(np.nanmean([correlation(x.mean(axis=0), truth[name]) for name, x in everywhere.items()])),
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


def summary(found: dict[str, dict[str, dict[str, Any]]], roles: dict[str, str]) -> str:
    """A line a rule: mean and greatest of the pairs' mean regrets, over all pairs of a role."""
    rows = []
    for rule, pairs in found.items():
        cells = [rule, "yes" if needs_labels(rule) else "no", str(runs_of(rule))]
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
        cells = [rule, "yes" if needs_labels(rule) else "no", str(runs_of(rule))]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    contents = stored()
    roles = {content["pair"]: PAIRS[content["pair"]].role for content in contents}
    rules = (*MEASURED, *COMBINED, *GUESSES)
    measured = {rule: [content for content in contents if is_measured(content, rule)] for rule in rules}
    found = {rule: {each["pair"]: figures(each, rule) for each in some} for rule, some in measured.items() if some}
    print(short(found, roles))
    draw_regrets(found, roles)
    draw_curves(contents)
    page = PAGE.format(
        protocol=contents[0]["protocol"],
        hardware=hardware(contents),
        versions=versions(contents),
        gaps=gaps(contents),
        unmeasured=unmeasured(contents),
        goals=goals(contents),
        worse=worse_than_baseline(contents),
        curves=curves(contents),
        summary=summary(found, roles),
        checkpoints=by_checkpoint(contents, [*found]),
        left_out=left_out(contents),
        weights=weights(contents),
        fixed_by_hand=fixed_by_hand(),
        limits=limits(contents),
        missed=missed(contents),
        spreads=spreads(contents),
        tellers=tellers(contents),
        noise=by_noise(contents),
        pairs=by_pair(found, roles),
        fused=stored_table(),
        default_audits=default_audits(contents),
        audits=audits(contents),
        flags=flags_by_loss(contents),
        agreements=agreements(contents),
    )
    write_text(DOCS / "evidence.md", page)


if __name__ == "__main__":
    main()
