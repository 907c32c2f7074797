"""Exhaustive probe curves of every block and kind, and what every rule would have picked.

    python -m benchmarks.selection.measure fashion-mnist nuclei --root data --device cuda

Protocol. 20 candidate timesteps, dense at low noise; all blocks, the kinds of `feature="auto"`; token means, or single
tokens with their class for segmentation. The truth is the validation score (accuracy, or mean IoU of tokens) of a ridge
classifier (penalty by generalized cross-validation on training features), mean over three seeds that train on their own
80 % each. Every rule runs as the package runs it by default: number of images (HFR 64, criteria without labels 256,
with labels 500, of every class its share; of masks 500, at most 4,000 tokens of them), views, neighbors. Its samples
are random, without replacement, from up to 1,000 training images (300 for rules with views and, of masks, for those
without labels; 128 for HFR): 1 sample for every feature; for the checkpoint's own one 20, and 20 of 64 images (of masks
about 8 tokens of each), and where features depend on the stored noise, 20 with another draw of it. The audit is that of
every timestep by leave-one-out ridge, on 1,000 labeled images and on 5 samples of 500 (of masks: 6 samples of 4,000
tokens).
Writes `benchmarks/results/selection/<pair>.json`; `report.py` makes tables and picture.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from aselect_hf.audit import NUM_AUDITED, audit_timestep
from aselect_hf.audit.regret import best_exceeds, paired_regret
from aselect_hf.data.classes import stratified_sample
from aselect_hf.data.image_data import ImageData
from aselect_hf.files import write_text
from aselect_hf.modeling.features import parse_feature
from aselect_hf.selection.probe import fit_in_parallel
from aselect_hf.selection.rule import Rule
from aselect_hf.selection.rules import RULES
from aselect_hf.selection.rules.few_labels import MAX_TOKENS, ridge_classes
from aselect_hf.selection.samples import LEAST_PER_CLASS
from aselect_hf.selection.uncertainty import class_score, iou_counts, iou_influence
from aselect_hf.tasks import Task, find_task
from aselect_hf.versions import hardware, installed_versions
from benchmarks.selection.pairs import PAIRS, Pair, coarse_labels
from benchmarks.selection.rules import MEASURED, criterion_of
from benchmarks.selection.sources import Features, Sources

RESULTS = Path(__file__).parents[1] / "results" / "selection"
SEEDS, SAMPLES, OWN_SAMPLES, OTHER_NOISE = 3, 1, 20, (1,)
FEW_IMAGES, FEW_LABELS = RULES["hfr"].num_images, RULES["ridge"].num_images
AUDITS = ((NUM_AUDITED, 0), *((FEW_LABELS, seed) for seed in range(5)))
CPU = torch.device("cpu")


class Measurement:
    """Everything about one pair.

    Args:
        sources: may be shared by pairs of the same model and data.
    """

    def __init__(self, pair: Pair, sources: Sources) -> None:
        self.pair, self.sources = pair, sources
        self.labels, self.images = self._truth_of(sources.train)
        self.num_images = len(sources.train) if self.images is None else 1 + int(self.images.max())

    def run(self) -> dict[str, Any]:
        """The content of the pair's JSON."""
        sources, own = self.sources, self.sources.default_feature
        curves = self.curves(sources.labeled_rows, sources.validation_rows)
        scores = {
            name: self._scores(rule, sources.seen_by(rule), rule.num_images, SAMPLES) for name, rule in MEASURED.items()
        }
        fresh = self.curves(*sources.fresh_noise_rows([own]))[own] if self.pair.fresh_noise else None
        return {
            "pair": self.pair.name,
            "task": self.pair.task,
            "default_feature": own,
            "timesteps": sources.timesteps,
            "truth": {name: _mean_and_deviation(x) for name, x in curves.items()},
            "fresh_noise_truth": None if fresh is None else _mean_and_deviation(fresh),
            "scores": {rule: {name: _rounded(x) for name, x in found.items()} for rule, found in scores.items()},
            "own_scores": {name: self._own_scores(rule) for name, rule in MEASURED.items()},
            "audit": self._audit(),
            "default_audit": self._default_audit(),
            "images": {"train": len(sources.train), "validation": len(sources.validation)},
            "protocol": (__doc__ or "").split("Protocol. ")[1].split("\nWrites")[0].replace("\n", " "),
            "hardware": self._hardware(),
            "versions": installed_versions(),
        }

    def _hardware(self) -> str:
        device = self.sources.model.device
        return hardware(CPU) if device.type == "cpu" else f"features on {hardware(device)}, scores on {hardware(CPU)}"

    def _truth_of(self, data: Any) -> tuple[np.ndarray, np.ndarray | None]:
        labels, images = self.sources.truth(data)
        if self.pair.coarse is not None:
            labels = coarse_labels(labels, self.pair.coarse)
        return labels, images

    def curves(self, train: Features, validation: Features) -> Features:
        """Of the probe, `(seeds, timesteps)` by feature."""
        truth, images = self._truth_of(self.sources.validation)
        generators = [np.random.default_rng(seed) for seed in range(SEEDS)]
        subsets = [each.permutation(len(self.labels))[: int(0.8 * len(self.labels))] for each in generators]
        jobs = [
            partial(_probe, train[name][column], self.labels, validation[name][column], truth, images, subset)
            for name in train
            for column in range(len(self.sources.timesteps))
            for subset in subsets
        ]
        scores = [*tqdm(fit_in_parallel(jobs), total=len(jobs), desc="probes", unit="probe")]
        cells = np.array(scores).reshape(len(train), -1, SEEDS)
        return {name: cell.T for name, cell in zip(train, cells, strict=True)}

    def _scores(self, rule: Rule, values: Features, num_images: int, samples: int) -> Features:
        """`(samples, timesteps)` by feature."""
        rows_of_samples = self._samples(rule, values, num_images, samples)
        every = [each for name in values for each in values[name]]
        jobs = [
            partial(self._score, rule, cells, rows)
            for rows in rows_of_samples
            for cells in ([every] if criterion_of(rule).together else every)
        ]
        found = [*tqdm(fit_in_parallel(jobs), total=len(jobs), desc=rule.name, unit="score")]
        cells = np.array(found).reshape(samples, len(values), -1)
        return {name: cells[:, index] for index, name in enumerate(values)}

    def _score(self, rule: Rule, values: Any, rows: np.ndarray) -> Any:
        criterion = criterion_of(rule)
        if criterion.together:
            return criterion.score([each[rows] for each in values])
        if rule.labels == "none":
            return criterion.score(values[rows])
        return criterion.score(values[rows], self.labels[rows], None if self.images is None else self.images[rows])

    def _samples(self, rule: Rule, values: Features, num_images: int, samples: int) -> list[np.ndarray]:
        """Rows of random images, chosen as `select_timestep` chooses them."""
        seeds = range(100, 100 + samples)
        if rule.labels != "none" and self.images is not None:
            return [self._tokens(num_images, seed) for seed in seeds]
        if rule.labels != "none":
            return [stratified_sample(self.labels, num_images, seed, LEAST_PER_CLASS) for seed in seeds]
        available = next(iter(values.values())).shape[1]
        return [np.random.default_rng(seed).permutation(available)[:num_images] for seed in seeds]

    def _tokens(self, num_images: int, seed: int) -> np.ndarray:
        """Rows of random images' tokens, at most `MAX_TOKENS` of them."""
        generator = np.random.default_rng(seed)
        rows = np.flatnonzero(np.isin(self.images, generator.permutation(self.num_images)[:num_images]))
        return np.sort(generator.permutation(rows)[:MAX_TOKENS])

    def _own_scores(self, rule: Rule) -> dict[str, Any]:
        """Of the checkpoint's feature: `(draws of noise, samples, timesteps)`; of few images `(samples, timesteps)`."""
        sources, own = self.sources, self.sources.default_feature
        draws = [{own: sources.seen_by(rule)[own]}]
        few = self._scores(rule, draws[0], FEW_IMAGES, OWN_SAMPLES)[own]
        if criterion_of(rule).sees in ("labeled rows", "images"):
            draws += [sources.with_other_noise(criterion_of(rule).sees, seed) for seed in OTHER_NOISE]
        usual = [self._scores(rule, draw, rule.num_images, OWN_SAMPLES)[own] for draw in draws]
        return {"usual": _rounded(np.stack(usual)), "few": _rounded(few)}

    def _audit(self) -> list[dict[str, Any]]:
        """By sample of the checkpoint's own feature: estimate and bounds of the audit, in points, for every pick."""
        (values,) = self.sources.default_rows.values()
        found = []
        for count, seed in AUDITS:
            order = np.random.default_rng(100 + seed).permutation(len(self.labels))
            rows = np.sort(order[: count if self.images is None else MAX_TOKENS])
            outcomes = np.stack([*fit_in_parallel(partial(self._outcomes, x[rows], rows) for x in values)], axis=1)
            chance = np.bincount(self.labels[rows]).max() / len(rows)
            regrets = [
                paired_regret(self.sources.timesteps, outcomes, pick, seed=0) for pick in range(outcomes.shape[1])
            ]
            found.append({
                "labeled": count,
                "informative": self.images is not None or best_exceeds(outcomes, chance, 0),
                "regrets": [[round(x, 2) for x in (each.estimate, each.lower, each.upper)] for each in regrets],
            })  # fmt: skip
        return found

    def _default_audit(self) -> dict[str, Any]:
        """What `aselect audit` says of the default rule's pick, and the best scores of its probe."""
        images = self.sources.train
        if self.pair.coarse is not None:
            images = ImageData(images.items, coarse_labels(np.asarray(images.labels), self.pair.coarse))
        found = audit_timestep(self.sources.model, images, progress=False)
        return {
            "timestep": found.timestep,
            "verdict": found.verdict,
            "sentence": found.sentence,
            "warnings": found.warnings,
            "probe": max(found.selections["ridge"].scores),
            "untrained": found.untrained,
        }

    def _outcomes(self, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        labels, images = self.labels[rows], None if self.images is None else self.images[rows]
        if images is not None:
            images = np.unique(images, return_inverse=True)[1]
        classes = ridge_classes(values, labels, images)
        return (
            (classes == labels).astype(float) if images is None else iou_influence(iou_counts(labels, classes, images))
        )


def is_one_of_few(name: str, own: str, depth: int) -> bool:
    """Whether a feature is the checkpoint's own, or one of five others that cover depths and kinds."""
    feature = parse_feature(name, depth)
    few = ((0.25, "query"), (0.5, "hidden"), (0.7, "query"), (0.75, "value"))
    return name == own or feature in [(int(x * depth), kind) for x, kind in few] or feature == (depth - 1, "mlp")


def _probe(
    features: np.ndarray,
    labels: np.ndarray,
    validation: np.ndarray,
    truth: np.ndarray,
    images: np.ndarray | None,
    subset: np.ndarray,
) -> float:
    scaler = StandardScaler().fit(features[subset])
    classifier = RidgeClassifierCV(alphas=np.logspace(-1, 4, 6)).fit(scaler.transform(features[subset]), labels[subset])
    return class_score(truth, classifier.predict(scaler.transform(validation)), images)


def _mean_and_deviation(curves: np.ndarray) -> dict[str, list[float]]:
    return {"mean": _rounded(curves.mean(axis=0)), "deviation": _rounded(curves.std(axis=0, ddof=1))}


def _rounded(values: np.ndarray) -> list[Any]:
    return np.round(values, 4).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", choices=PAIRS)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of checkpoints and data, see pairs.py")
    parser.add_argument(
        "--few_features", action="store_true", help="measure six features instead of all blocks and kinds"
    )
    parser.add_argument("--device", default="cpu", help="where the networks run; scores are computed on the CPU")
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # on a GPU, too, features are those of float32
    known: dict[tuple[str, str, Task, float, float], Sources] = {}
    for pair in (PAIRS[name] for name in arguments.pairs):
        model, data = (x if x == "sample" else str(arguments.root / x) for x in (pair.model, pair.data))
        task = find_task(pair.task)
        key = (model, data, task, pair.flipped, pair.imbalance)
        if key not in known:
            few = is_one_of_few if arguments.few_features else None
            options = {"device": arguments.device, "feature_filter": few, "change_training": pair.training_images}
            known[key] = Sources(model, data, task, **options)
        content = Measurement(pair, known[key]).run()
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_text(RESULTS / f"{pair.name}.json", json.dumps(content))
        print(f"wrote {RESULTS / pair.name}.json")


if __name__ == "__main__":
    main()
