"""Probes on frozen features: logistic regression, ridge regression and nearest neighbors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from joblib import Parallel, delayed
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from aselect_hf.selection.softmax import SoftmaxRegression

INVERSE_REGULARIZATION = (0.001, 0.01, 0.1)
NEIGHBORS = (5, 20)
PENALTIES_PER_ROW = (0.001, 0.01, 0.1, 1.0)
SETTINGS = {"linear": INVERSE_REGULARIZATION, "knn": NEIGHBORS, "ridge": PENALTIES_PER_ROW}
PROBES = tuple(SETTINGS)
LARGE_ROWS = 50_000
"""Linear probes of more rows are fitted in torch (`SoftmaxRegression`), on an accelerator if there is one. Smaller ones
are scikit-learn's, which finds the same minimum."""

Result = TypeVar("Result")


@dataclass
class Probe:
    """A fitted probe and how it was chosen.

    Args:
        classifier: standardizes and classifies.
        setting: the chosen `C` (linear), `n_neighbors` (kNN) or penalty per row (ridge).
        validation_score: of that setting, in [0, 1].
    """

    classifier: Pipeline | SoftmaxRegression
    setting: float
    validation_score: float

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Share of correct predictions, in [0, 1]."""
        return float(self.classifier.score(features, labels))


def fit_in_parallel(calls: Iterable[Callable[[], Result]], num_rows: int = 0) -> Iterator[Result]:
    """Run independent fits side by side, one thread each; results come in the order of `calls`.

    Args:
        num_rows: rows of each. Fits of more than `LARGE_ROWS` run one after another, because each fills the memory.
    """
    if num_rows > LARGE_ROWS:
        yield from (call() for call in calls)
        return
    with threadpool_limits(1):
        yield from Parallel(n_jobs=-1, prefer="threads", return_as="generator")(delayed(call)() for call in calls)


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    validation_features: np.ndarray,
    validation_labels: np.ndarray,
    *,
    kind: str = "linear",
    metric: Callable[[np.ndarray, np.ndarray], float] = accuracy_score,
) -> Probe:
    """Fit on training features, and choose the regularization or the number of neighbors on validation features.

    Args:
        features, validation_features: `(samples, width)`.
        kind: `"linear"` (multinomial logistic regression), `"ridge"` (ridge regression of the classes) or `"knn"`
            (cosine distance), each on standardized features.
        metric: score of validation labels and predictions; higher is better.
    """
    if kind not in PROBES:
        raise ValueError(f"probe must be one of {', '.join(PROBES)}; got {kind!r}")
    if len(np.unique(labels)) < 2:
        raise ValueError("a probe needs samples of at least 2 classes")
    best: Probe | None = None
    classifier: Pipeline | SoftmaxRegression | None = None
    for setting in SETTINGS[kind]:
        if kind == "linear" and len(labels) > LARGE_ROWS:
            start = classifier if isinstance(classifier, SoftmaxRegression) else None
            classifier = SoftmaxRegression(setting).fit(features, labels, start)
        else:
            classifier = make_pipeline(StandardScaler(), _classifier(kind, setting, len(labels)))
            classifier.fit(features, labels)
        score = float(metric(validation_labels, classifier.predict(validation_features)))
        if best is None or score > best.validation_score:
            best = Probe(classifier, setting, score)
    assert best is not None
    return best


def _classifier(kind: str, setting: float, count: int) -> Any:
    if kind == "ridge":
        return RidgeClassifier(alpha=setting * count)
    if kind == "knn":
        return KNeighborsClassifier(n_neighbors=min(int(setting), count), metric="cosine")
    return LogisticRegression(C=setting, max_iter=500, tol=1e-3)
