"""Exhaustive probe curves of every block and kind, and what every rule would have picked.

    python -m benchmarks.selection.measure fashion-mnist nuclei --root data

Protocol. 20 candidate timesteps, dense at low noise; all blocks, the kinds of `feature="auto"`; token means, or single
tokens with their class for segmentation. The truth is the validation score (accuracy, or mean IoU of tokens) of a ridge
classifier (penalty by generalised cross-validation on training features), mean over three seeds that train on their own
80 % each. Every rule then sees `REPETITIONS` random samples of training images of the size that it has by default (HFR
64, label-free criteria 256, few labels 500 images or the tokens of 64), drawn from features computed once. Writes
`benchmarks/results/selection/<pair>.json`; `report.py` makes the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from aselect_hf import criteria
from aselect_hf.conversion import load_model
from aselect_hf.data import ImageData, load_images
from aselect_hf.feature_cache import pooled_rows, token_rows
from aselect_hf.files import atomic_file
from aselect_hf.modeling.features import list_features, parse_feature
from aselect_hf.modeling.high_frequency_ratio import high_frequency_ratio
from aselect_hf.modeling.modeling_aselect_dit import ASelectDiTModel
from aselect_hf.probe import fit_in_parallel
from aselect_hf.selection import default_timesteps
from aselect_hf.selection.criterion import KINDS
from aselect_hf.selection.feature_sweep import augmented_views, noise_views, stored_noise_view, sweep_features
from aselect_hf.selection.grid import choose_tokens, iou_counts, mean_iou
from aselect_hf.selection.inputs import SelectionInputs
from aselect_hf.versions import hardware, installed_versions
from benchmarks.selection.pairs import PAIRS, Pair

RESULTS = Path(__file__).parents[1] / "results" / "selection"
TRAIN, VALIDATION, VIEWED, HFR_IMAGES = 1000, 1000, 300, 128
TRAIN_TOKENS, VALIDATION_TOKENS = 8000, 6000
SEEDS, REPETITIONS = 3, 10
BATCH = 100

Curves = dict[str, np.ndarray]
"""By feature: `(timesteps,)` or `(repetitions, timesteps)`."""


class Measurement:
    """Everything about one pair.

    Args:
        known: what was computed for other pairs of the same model and data, and will be for this one.
    """

    def __init__(self, pair: Pair, root: Path, known: dict[str, Any]) -> None:
        self.pair, self.known = pair, known
        self.model: ASelectDiTModel = load_model(_locate(pair.model, root)).eval()
        config = self.model.config
        self.timesteps = default_timesteps(self.model.noise_schedule)
        names = list_features(config.num_hidden_layers)
        self.features = [name for name in names if parse_feature(name, config.num_hidden_layers).kind in KINDS]
        segmentation = pair.task == "segmentation"
        train = ImageData.of(load_images(_locate(pair.data, root), "train", masks=segmentation))
        if (validation := _validation(_locate(pair.data, root), segmentation)) is None:
            rows = np.random.default_rng(0).permutation(len(train))
            train, validation = train.subset(rows[:-VALIDATION]), train.subset(rows[-VALIDATION:])
        self.train, self.validation = train.sample(TRAIN, 0), validation.sample(VALIDATION, 0)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """The content of the pair's JSON."""
        (train, labels, images), (validation, truth, _) = (
            self._rows(*data)
            for data in (("train", self.train, TRAIN_TOKENS), ("validation", self.validation, VALIDATION_TOKENS))
        )
        if "label-free" not in self.known:
            self.known["label-free"] = self._label_free(train) | self._hfr()
        curves = self._truth(train, labels, validation, truth)
        picks = self._few_labels(train, labels, images) | self.known["label-free"]
        return {
            "pair": self.pair.name,
            "role": self.pair.role,
            "task": self.pair.task,
            "default_feature": str(self.model.config.feature),
            "timesteps": self.timesteps,
            "truth": {name: {"mean": _rounded(x.mean(axis=0)), "deviation": _rounded(x.std(axis=0, ddof=1))}
                      for name, x in curves.items()},
            "scores": {rule: {name: _rounded(x) for name, x in scores.items()} for rule, scores in picks.items()},
            "images": {"train": len(self.train), "validation": len(self.validation)},
            "protocol": (__doc__ or "").split("Protocol. ")[1].split(" Writes")[0].replace("\n", " "),
            "hardware": hardware(self.model.device),
            "versions": installed_versions(),
        }  # fmt: skip

    def _labels(self, data: ImageData) -> np.ndarray:
        labels = np.asarray(data.labels)
        if self.pair.coarse is None:
            return labels
        group_of = {label: group for group, members in enumerate(self.pair.coarse) for label in members}
        return np.array([group_of[label] for label in labels.tolist()])

    def _rows(self, split: str, data: ImageData, max_tokens: int) -> tuple[Curves, np.ndarray, np.ndarray]:
        """Features `(timesteps, rows, width)` by name with the stored noise, labels, and the image of every row."""
        if split not in self.known:
            self.known[split] = self._compute_rows(data, max_tokens)
        values, labels, images = self.known[split]
        return values, self._labels(data) if labels is None else labels, images

    def _compute_rows(self, data: ImageData, max_tokens: int) -> tuple[Curves, np.ndarray | None, np.ndarray]:
        model = self.model
        if self.pair.task == "classification":
            kept, labels, images = pooled_rows(model, len(data), 1), None, np.arange(len(data))
        else:
            inputs = SelectionInputs(model, data, None, str(model.config.feature), self.timesteps)
            chosen = choose_tokens(inputs, data, max_tokens)
            data, labels, images = chosen.data, chosen.labels, chosen.images
            kept = token_rows(model, data, chosen.tokens)
        views = stored_noise_view(model, data, BATCH, segmentation=kept.segmentation)
        swept = self._sweep(views, kept, "stored noise")
        return {name: values[:, :, 0] for name, values in swept.items()}, labels, images

    def _sweep(self, views: Any, kept: Any, name: str) -> Curves:
        return sweep_features(
            self.model, views, self.timesteps, self.features, kept, batch_size=BATCH, progress=True, name=name
        ).values

    def _truth(self, train: Curves, labels: np.ndarray, validation: Curves, truth: np.ndarray) -> Curves:
        """`(seeds, timesteps)` by feature."""
        generators = [np.random.default_rng(seed) for seed in range(SEEDS)]
        subsets = [each.permutation(len(labels))[: int(0.8 * len(labels))] for each in generators]
        jobs = [
            partial(_probe, train[name][column], labels, validation[name][column], truth, subset, self.pair.task)
            for name in self.features
            for column in range(len(self.timesteps))
            for subset in subsets
        ]
        scores = [*tqdm(fit_in_parallel(jobs), total=len(jobs), desc="probes", unit="probe")]
        cells = np.array(scores).reshape(len(self.features), len(self.timesteps), SEEDS)
        return {name: cell.T for name, cell in zip(self.features, cells, strict=True)}

    def _few_labels(self, train: Curves, labels: np.ndarray, images: np.ndarray) -> dict[str, Curves]:
        grouped = self.pair.task == "segmentation"

        def accuracy(predict: Callable[..., np.ndarray], x: np.ndarray, rows: np.ndarray) -> float:
            groups = images[rows] if grouped else None
            predicted = predict(x[rows], labels[rows], groups)
            return _score(labels[rows], predicted, self.pair.task)

        rules = {
            "ridge": partial(accuracy, lambda x, y, groups: criteria.ridge_predictions(x, y, groups=groups).classes),
            "knn": partial(accuracy, lambda x, y, groups: criteria.knn_predictions(x, y, 5, groups=groups)),
            "logme": lambda x, rows: criteria.logme(x[rows], labels[rows]),
        }
        count = 64 if grouped else 500
        samples = [_rows_of(images, sample) for sample in self._samples(int(images.max()) + 1, count)]
        return {rule: self._scores(score, train, samples, rule) for rule, score in rules.items()}

    def _label_free(self, train: Curves) -> dict[str, Curves]:
        """Of image means, whatever the task."""
        model, some = self.model, self.train.subset(range(min(VIEWED, len(self.train))))
        kept = pooled_rows(model, len(some), 1)
        samples = self._samples(len(some), 256)
        if self.pair.task == "segmentation":
            stored = {name: x[:, :, 0] for name, x in self._sweep(
                stored_noise_view(model, some, BATCH), kept, "stored noise").items()}  # fmt: skip
        else:
            stored = train
        found = {
            "rankme": self._scores(lambda x, rows: criteria.rankme(x[rows]), stored, samples, "rankme"),
            "alpha_req": self._scores(lambda x, rows: criteria.alpha_req(x[rows]), stored, samples, "alpha_req"),
        }
        augmented = self._sweep(augmented_views(model, some, 2, BATCH, 0), kept, "augmented views")
        for rule, criterion in (("lidar", criteria.lidar), ("retrieval", criteria.view_retrieval)):
            found[rule] = self._scores(lambda x, rows, of=criterion: of(x[rows]), augmented, samples, rule)
        noisy = self._sweep(noise_views(model, some, 2, BATCH, 0), kept, "noise views")
        found["snr"] = self._scores(lambda x, rows: criteria.signal_to_noise(x[rows]), noisy, samples, "snr")
        return found

    def _hfr(self) -> dict[str, Curves]:
        """As `select_timestep(method="hfr")`, of all features in one sweep."""
        model, some = self.model, self.train.subset(range(min(HFR_IMAGES, len(self.train))))
        clean = noise_views(model, some, 1, BATCH, 0)
        latents, noise = clean.latents[0], clean.noise[0, 0]
        grid, shape = model.grid_size(latents), (2, len(self.timesteps), len(some))
        ratios = {name: np.empty(shape) for name in self.features}
        for column, t in enumerate(tqdm(self.timesteps, desc="hfr", unit="timestep")):
            for kind, signal in enumerate((latents, torch.zeros_like(latents))):
                noisy = model.noise_schedule.add_noise(signal, noise, t)
                for first in range(0, len(some), BATCH):
                    part = noisy[first : first + BATCH]
                    steps = torch.full((len(part),), t)
                    for name, tokens in model.features_of_noisy(part, steps, self.features).items():
                        found = high_frequency_ratio(tokens.float(), grid).numpy()
                        ratios[name][kind, column, first : first + len(part)] = found
        samples = self._samples(len(some), 64)
        raw = {name: np.array([x[0][:, rows].mean(axis=1) for rows in samples]) for name, x in ratios.items()}
        control = {name: np.array([x[1][:, rows].mean(axis=1) for rows in samples]) for name, x in ratios.items()}
        return {"hfr": {name: raw[name] - control[name] for name in raw}, "hfr, uncorrected": raw}

    @staticmethod
    def _samples(available: int, count: int) -> list[np.ndarray]:
        generators = [np.random.default_rng(100 + seed) for seed in range(REPETITIONS)]
        return [generator.permutation(available)[:count] for generator in generators]

    def _scores(
        self, score: Callable[[np.ndarray, np.ndarray], float], values: Curves, samples: list[np.ndarray], rule: str
    ) -> Curves:
        """`(repetitions, timesteps)` by feature."""
        jobs = [
            partial(score, values[name][column], rows)
            for name in self.features
            for rows in samples
            for column in range(len(self.timesteps))
        ]
        found = [*tqdm(fit_in_parallel(jobs), total=len(jobs), desc=rule, unit="score")]
        cells = np.array(found).reshape(len(self.features), len(samples), len(self.timesteps))
        return dict(zip(self.features, cells, strict=True))


def _probe(
    features: np.ndarray, labels: np.ndarray, validation: np.ndarray, truth: np.ndarray, subset: np.ndarray, task: str
) -> float:
    scaler = StandardScaler().fit(features[subset])
    classifier = RidgeClassifierCV(alphas=np.logspace(-1, 4, 6)).fit(scaler.transform(features[subset]), labels[subset])
    return _score(truth, classifier.predict(scaler.transform(validation)), task)


def _score(truth: np.ndarray, predicted: np.ndarray, task: str) -> float:
    if task == "classification":
        return float((truth == predicted).mean())
    return float(mean_iou(iou_counts(truth, predicted, np.zeros_like(truth)).sum(axis=0)))


def _rounded(values: np.ndarray) -> list[Any]:
    return np.round(values, 4).tolist()


def _rows_of(images: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.isin(images, chosen))


def _locate(name: str, root: Path) -> str:
    return name if name == "sample" else str(root / name)


def _validation(source: str, masks: bool) -> ImageData | None:
    try:
        return ImageData.of(load_images(source, "validation", masks=masks))
    except ValueError:  # there is none
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", choices=PAIRS)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of checkpoints and data, see pairs.py")
    arguments = parser.parse_args()
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    for pair in (PAIRS[name] for name in arguments.pairs):
        content = Measurement(pair, arguments.root, known.setdefault((pair.model, pair.data, pair.task), {})).run()
        RESULTS.mkdir(parents=True, exist_ok=True)
        with atomic_file(RESULTS / f"{pair.name}.json") as temporary:
            temporary.write_text(json.dumps(content))
        print(f"wrote {RESULTS / pair.name}.json")


if __name__ == "__main__":
    main()
