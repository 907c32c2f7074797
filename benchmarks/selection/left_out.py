"""Choices that are judged on what they were not made on: one checkpoint left out, or one family of checkpoints.

Whatever can be computed again from the stored curves is chosen on the other checkpoints: which rule, which rule beside
`consensus`, the parts and length of a shortlist, a fixed timestep. What needs the features again cannot be; those
constants are listed in `fixed_by_hand` with the pairs that had been looked at when they were set.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import numpy as np

from aselect_hf.selection import criteria
from aselect_hf.selection.rules import RULES, few_labels
from aselect_hf.selection.rules.consensus_rank import sum_of_scaled
from aselect_hf.selection.ties import ranking
from benchmarks.selection.curves import Content, is_measured, lost, needs_labels, scores_of, table
from benchmarks.selection.pairs import PAIRS
from benchmarks.selection.rules import COMBINED, MEASURED, SUMS

Scores = Callable[[Content, str], np.ndarray]
"""`scores(content, kind)`: `(samples, timesteps)`, see `curves.scores_of`."""

SHORTLIST_LENGTHS = (2, 3, 5, 8)
SECOND, WEIGHTS = ("rankme", "alpha_req", "snr", "hfr"), (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
FIGURES = ("mean", "worst checkpoint", "worst sample", "of 64 images")
SEEN = "fashion-mnist, its masks and coarse labels, cifar10, cifar10-short, planted, nuclei"
"""Pairs that had been looked at when the constants inside the rules were set."""


@dataclass
class Loss:
    """What a rule loses on the pairs of every checkpoint, in points, with arrays `(samples,)` by pair.

    Args:
        usual, few: by checkpoint, of the rule's own number of images and of 64.
    """

    usual: dict[str, list[np.ndarray]]
    few: dict[str, list[np.ndarray]]

    @classmethod
    def of(cls, contents: list[Content], scores: Scores) -> Loss:
        losses = cls({}, {})
        for content in contents:
            for kind, found in (("usual", losses.usual), ("few", losses.few)):
                found.setdefault(PAIRS[content["pair"]].model, []).append(lost(content, scores(content, kind)))
        return losses

    def mean(self, checkpoint: str) -> float:
        """Of a checkpoint, over its pairs and their samples."""
        return _mean(self.usual[checkpoint])

    def figures(self) -> dict[str, float]:
        """By name of `FIGURES`: what is lost where every checkpoint counts once, in points."""
        means = [self.mean(checkpoint) for checkpoint in self.usual]
        worst = max(float(part.max()) for parts in self.usual.values() for part in parts)
        of_few = np.mean([_mean(parts) for parts in self.few.values()])
        return dict(zip(FIGURES, (float(np.mean(means)), max(means), worst, float(of_few)), strict=True))


def _mean(parts: list[np.ndarray]) -> float:
    return float(np.mean([part.mean() for part in parts]))


def families(contents: list[Content]) -> list[list[str]]:
    """Checkpoints in groups; two that share a data set, also by way of a third, are in the same one."""
    groups: list[tuple[set[str], set[str]]] = []
    for pair in (PAIRS[content["pair"]] for content in contents):
        models, data = {pair.model}, {pair.data}
        for group in [each for each in groups if each[0] & models or each[1] & data]:
            models, data = models | group[0], data | group[1]
            groups.remove(group)
        groups.append((models, data))
    return [sorted(models) for models, _ in groups]


def by_checkpoint(contents: list[Content], rules: list[str]) -> str:
    """What every rule loses where every checkpoint counts once."""
    rows = []
    for rule in rules:
        some = [content for content in contents if is_measured(content, rule)]
        loss = Loss.of(some, partial(_scores, rule))
        rows.append([rule, "yes" if needs_labels(rule) else "no", str(len(loss.usual)), *_cells(loss)])
    return table(["rule", "labels", "checkpoints", *FIGURES], rows)


def _scores(rule: str, content: Content, kind: str) -> np.ndarray:
    return scores_of(content, rule, kind)


def _cells(loss: Loss) -> list[str]:
    """Mean over checkpoints, the worst one, the worst sample, and the mean of picks from 64 images."""
    mean, greatest, sample, of_few = (f"{x:.1f}" for x in loss.figures().values())
    return [mean, f"{greatest} ({max(loss.usual, key=loss.mean)})", sample, of_few]


def choices(contents: list[Content]) -> dict[str, dict[Hashable, Scores]]:
    """What is chosen, and its candidates by name: those that every pair has scores for."""
    everywhere = [rule for rule in (*MEASURED, *COMBINED) if all(is_measured(content, rule) for content in contents)]
    features = [rule for rule in everywhere if rule in MEASURED]
    free = [rule for rule in everywhere if not needs_labels(rule) and rule not in SUMS]  # the next row chooses sums
    labeled = [rule for rule in everywhere if needs_labels(rule)]
    beside = [rule for rule in features if not needs_labels(rule) and rule != "consensus"]
    parts = itertools.product(
        [rule for rule in features if not needs_labels(rule)],
        [rule for rule in features if needs_labels(rule)],
        SHORTLIST_LENGTHS,
    )
    timesteps = contents[0]["timesteps"]
    return {
        "a rule without labels": {rule: partial(_scores, rule) for rule in free},
        "`consensus` alone, or with a second rule": {
            "alone": partial(_scores, "consensus"),
            **{rule: partial(_beside_consensus, rule) for rule in beside},
        },
        "a fixed timestep": {t: partial(_fixed, t) for t in timesteps},
        "a rule with labels": {rule: partial(_scores, rule) for rule in labeled},
        "a shortlist: both rules, and its length": {each: partial(_shortlist, *each) for each in parts},
    }


def _beside_consensus(rule: str, content: Content, kind: str, weight: float = 1.0) -> np.ndarray:
    pairs = zip(scores_of(content, "consensus", kind), itertools.cycle(scores_of(content, rule, kind)), strict=False)
    return np.stack([sum_of_scaled(clusters, other, weight) for clusters, other in pairs])


def weights(contents: list[Content]) -> str:
    """What `consensus` loses with a second rule beside it, by how much that counts."""
    rows = []
    for rule in SECOND:
        losses = [Loss.of(contents, partial(_beside_consensus, rule, weight=each)) for each in WEIGHTS]
        means = [[loss.mean(checkpoint) for checkpoint in loss.usual] for loss in losses]
        rows.append([rule, *(f"{np.mean(each):.1f}, {max(each):.1f}" for each in means)])
    return table(["beside `consensus`", *map("{:g}".format, WEIGHTS)], rows)


def _fixed(timestep: int, content: Content, kind: str) -> np.ndarray:
    return -np.abs(np.array(content["timesteps"]) - float(timestep))[None]


def _shortlist(first: str, second: str, length: int, content: Content, kind: str) -> np.ndarray:
    rows = []
    for listing, scores in zip(*(scores_of(content, rule, kind) for rule in (first, second)), strict=False):
        kept = ranking(listing)[:length]
        rows.append(np.where(np.isin(np.arange(len(scores)), kept), scores, -np.inf))
    return np.stack(rows)


def left_out(contents: list[Content]) -> str:
    """What the choices lose, each made without the checkpoint, or without the family, that it is judged on."""
    groups, rows = families(contents), []
    alone = [[checkpoint] for group in groups for checkpoint in group]
    for name, candidates in choices(contents).items():
        losses = {each: Loss.of(contents, scores) for each, scores in candidates.items()}
        for what, parts in (("checkpoint", alone), ("family", groups)):
            found, chosen = judged(losses, parts)
            shown = ", ".join(f"{_written(each)} ({count})" for each, count in chosen.most_common())
            rows.append([name, what, *_cells(found), shown])
    return table(["what is chosen", "left out", *FIGURES, "chosen (times)"], rows)


def judged(losses: dict[Hashable, Loss], groups: list[list[str]]) -> tuple[Loss, Counter[Hashable]]:
    """What is lost on every group by the candidate that loses least on all others, and which that was."""
    found, chosen = Loss({}, {}), Counter[Hashable]()
    for group in groups:
        others = [checkpoint for each in groups if each != group for checkpoint in each]
        best = min(losses, key=lambda name: np.mean([losses[name].mean(checkpoint) for checkpoint in others]))
        chosen[best] += 1
        found.usual |= {checkpoint: losses[best].usual[checkpoint] for checkpoint in group}
        found.few |= {checkpoint: losses[best].few[checkpoint] for checkpoint in group}
    return found, chosen


def _written(name: Hashable) -> str:
    return (
        " + ".join(map(str, name)) if isinstance(name, tuple) else f"t = {name}" if isinstance(name, int) else f"{name}"
    )


def fixed_by_hand() -> str:
    """The constants that cannot be chosen again from stored curves."""
    clusters = ", ".join(map(str, criteria.CLUSTERS))
    numbers = ", ".join(f"{rule} {RULES[rule].num_images}" for rule in ("hfr", "consensus", "logme"))
    rows = [
        ["`consensus`", f"{clusters} clusters, {criteria.CONSENSUS_COMPONENTS} components, at most "
         f"{criteria.CONSENSUS_ROUNDS} rounds, at least {criteria.LEAST_KEPT} candidates kept", SEEN],
        ["`consensus`", f"{criteria.CLUSTERINGS} starts of k-means", "none: against rounding, see `ties.py`"],
        ["`consensus_rank`", "both scores count alike, and RankMe is the second",
         "all pairs but the twins and cifar10-mmdit; see the table above"],
        ["`hfr`", "cutoff 0.15, power spectrum, mean kept, less that of pure noise",
         "another checkpoint and CIFAR-10 (the cutoff is the authors')"],
        ["`lidar`, `icr`, `retrieval`", "covariances shrunk by 0.1", SEEN],
        ["`alpha_req`", f"ranks {criteria.FIRST_RANK} to {criteria.LAST_RANK}", SEEN],
        ["`knn`", f"{few_labels.NEIGHBORS} neighbors", SEEN],
        ["all", f"numbers of images ({numbers}), standardized channels", SEEN],
        ["all", "20 candidate timesteps, dense at low noise", SEEN],
    ]  # fmt: skip
    return table(["rule", "constant", "pairs that had been looked at"], rows)
