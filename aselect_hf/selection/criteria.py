"""Criteria that score features, without labels or with a few: pure functions of arrays, higher is better.

Arrays are numpy's or torch's; everything is computed in float64 on the CPU. "Standardized" means that every channel has
mean 0 and deviation 1 over the samples; a constant channel is 0. Otherwise a few massive channels would decide every
spectrum and every distance.

Shapes: `features` are `(samples, width)`. `views` are `(images, views, width)`, several versions of every image.
`labels` are `(samples,)` integers. `groups` are `(samples,)` integers, the image that each sample (a token) is of; the
samples of an image are then left out together.

All criteria raise `ValueError` for wrong shapes, fewer than 2 images, and NaN or infinite values. Those with labels
also raise it if labels are missing, are not one per sample, or have a single class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.cluster import KMeans, kmeans_plusplus

from aselect_hf.selection.ties import ROUNDING, best_of, near_best, ranking

Array = np.ndarray | torch.Tensor

RESOLUTION = 10 * ROUNDING
"""A channel whose deviation is a smaller part of its mean counts as constant: its variation may be rounding."""
NOISE_FLOOR = 10 * ROUNDING**2
"""Eigenvalues that are a smaller part of the largest one may come from rounding."""
STEEPEST = 10.0
"""Largest decay exponent of `alpha_req`; steeper spectra count as this."""
FIRST_RANK, LAST_RANK = 3, 100
PENALTIES = np.logspace(-6, 1, 15)
"""Candidates of `ridge_predictions`, as shares of the standardized features' sum of squares."""
CLUSTERS, CONSENSUS_COMPONENTS, CONSENSUS_ROUNDS, LEAST_KEPT = (5, 10, 20), 64, 4, 5
CLUSTERINGS = 8
"""Starts of k-means for each number of clusters: a mean over few of them depends on the last bits of features."""
EVIDENCE_REACH, EVIDENCE_POINTS = 25.0, 401
"""Half of the logarithmic range that is searched for the best evidence, and the number of points of the search."""
CHUNK = 512


def rankme(features: Array, *, standardize: bool = True) -> float:
    """Effective rank: RankMe (Garrido et al. 2023, arXiv 2210.02885).

    `exp(-sum p log p)`, where `p` are the singular values divided by their sum. The paper neither centers nor scales,
    so the few largest channels and their means decide; by default features are standardized (ours).

    Returns:
        1 (one direction, or all samples equal) to `min(samples, width)`.
    """
    rows = _matrix(features)
    return effective_rank(_principal(_standardized(rows) if standardize else rows)[1])


def alpha_req(features: Array, *, standardize: bool = True) -> float:
    """`-|alpha - 1|` of the power law `i ** -alpha` of the covariance's eigenvalues: α-ReQ (Agrawal et al. 2022).

    `alpha` is the slope in the log-log plane, by least squares with weights `1 / i` as in the paper's code. The fit is
    over ranks 3 to 100, or to half of the rank if that is less, because the tail of a sample's spectrum is too steep.
    Features are standardized by default (ours), so the spectrum is that of the correlations.

    Returns:
        0 at `alpha = 1`, which the paper finds best, down to -9: an `alpha` above 10, or a rank below 3, counts as 10.
        Eigenvalues below a billionth of the largest do not count.
    """
    rows = _matrix(features)
    rows = _standardized(rows) if standardize else rows - rows.mean(axis=0)
    return power_law(_principal(rows)[1] ** 2)


def power_law(variances: np.ndarray) -> float:
    """`alpha_req` of the eigenvalues `(rank,)` of a covariance, largest first."""
    variances = variances[variances > NOISE_FLOOR * variances.max(initial=0.0)]
    if len(variances) < FIRST_RANK:
        return 1 - STEEPEST
    last = min(LAST_RANK, max(len(variances) // 2, FIRST_RANK))
    first = FIRST_RANK if last >= 10 else 1
    ranks = np.arange(first, last + 1)
    slope = np.polyfit(np.log(ranks), np.log(variances[first - 1 : last]), 1, w=ranks**-0.5)[0]
    return -abs(min(-slope, STEEPEST) - 1)


def lidar(views: Array, *, shrinkage: float = 0.1, standardize: bool = True) -> float:
    """Effective rank of the discriminant matrix with every image as a class: LiDAR (Thilak et al. 2023, 2312.04000).

    `exp(-sum p log p)`, where `p` are the eigenvalues of `W^-1/2 B W^-1/2` divided by their sum. `B` is the covariance
    of the images' means, and `W` is the mean covariance of the views of one image. `W` is shrunk toward its mean
    variance (ours). The paper, with 10 views of 1,000 images, adds 1e-4 to the diagonal; with fewer samples than
    channels that constant would decide. Features are standardized because the shrinkage depends on their scales.
    Pure noise scores highest: without a signal the spectrum is flat, and a flat spectrum has the highest rank.

    Returns:
        1 to `min(images - 1, width)`.
    """
    rows, (images, count, width) = _views(views, standardize)
    left, scales = _principal(rows)
    coordinates = (left * scales).reshape(images, count, -1)
    means = coordinates.mean(axis=1)
    within = (coordinates - means[:, None]).reshape(images * count, -1)
    covariance = within.T @ within / (images * (count - 1))
    mean_variance = np.trace(covariance) / width
    if mean_variance > 0:
        shrunk = (1 - shrinkage) * covariance + shrinkage * mean_variance * np.eye(len(covariance))
        means = np.linalg.solve(np.linalg.cholesky(shrunk), means.T).T
    return effective_rank(_principal(means)[1] ** 2)


def icr(views: Array, *, shrinkage: float = 0.1) -> float:
    """Invariant Contamination Ratio: how much views of one image differ, against images (Li et al., arXiv 2606.09718).

    `1 / (1 + mean(lambda))`, where `lambda` are the eigenvalues of `S v = lambda X v`. `S` is the covariance of the
    invariant parts, the means over views of one image; `X` is that of the residuals, the views less these means. Views
    differ by a random crop, a flip and their noise; two are enough. The mean of the eigenvalues is `trace(X^-1 S) / d`,
    where `d` is the rank of the views.

    The paper adds a multiple of the identity to `X`. Here features are standardized, and `X` is shrunk toward its mean
    variance, so that the result does not depend on scales (ours). `X` divides by `views - 1`, and the part of the
    residuals that remains in the means of few views is subtracted from the trace (ours).

    With few images for the width the result is too low, because the residuals' covariance then has too low a rank: of
    isotropic features with a ratio of one half, 256 images give 0.26 at width 192 and 0.08 at width 1152. Compare
    results of the same number of images and the same feature only.

    Returns:
        0 (views of an image are the same) to 1 (images are no more different than views of one). Lower is better.
    """
    rows, (images, count, _) = _views(views)
    left, scales = _principal(rows)
    coordinates = (left * scales).reshape(images, count, -1)
    means = coordinates.mean(axis=1)
    residuals = (coordinates - means[:, None]).reshape(images * count, -1)
    covariance = residuals.T @ residuals / (images * (count - 1))
    variance = np.trace(covariance) / max(len(scales), 1)
    if not variance > 0:
        return 0.0 if len(scales) else 1.0
    shrunk = (1 - shrinkage) * covariance + shrinkage * variance * np.eye(len(covariance))
    invariant = means.T @ means / images - covariance / count
    ratio = np.trace(np.linalg.solve(shrunk, invariant)) / len(scales)
    return float(1 / (1 + max(ratio, 0.0)))


def view_retrieval(views: Array, *, shrinkage: float = 0.1) -> float:
    """Share of images that are found again among other views: the mean of `retrieved`, from 0 to 1."""
    return float(retrieved(views, shrinkage=shrinkage).mean())


def retrieved(views: Array, *, shrinkage: float = 0.1) -> np.ndarray:
    """How often the nearest neighbor of each image, among all images of another view, is the image itself (ours).

    Neighbors are nearest by cosine after whitening: the channels are standardized, and each principal component of all
    views is divided by the root of its variance, which is shrunk toward the mean variance. The result is averaged over
    ordered pairs of views. Chance is `1 / images`. An image with an identical copy is not found.

    Returns:
        `(images,)`, from 0 to 1.
    """
    rows, (images, count, width) = _views(views)
    left, scales = _principal(rows)
    variances = scales**2 / len(rows)
    whitened = left * scales / np.sqrt((1 - shrinkage) * variances + shrinkage * variances.sum() / width)
    whitened = _unit(whitened).reshape(images, count, -1)
    found = np.zeros(images)
    for one in range(count):
        for other in range(count):
            if one != other:
                cosines = whitened[:, one] @ whitened[:, other].T
                own = np.diag(cosines).copy()
                np.fill_diagonal(cosines, -np.inf)
                found += own > cosines.max(axis=1) + ROUNDING
    return found / (count * (count - 1))


def signal_to_noise(views: Array) -> float:
    """Share of the features' variance that is between images rather than between the views of one image (ours).

    `S / (S + N)`, where `S` is the variance between images and `N` the variance within one, both summed over
    standardized channels. It orders candidates as `S / N` does, and stays finite if nothing varies within images. `S`
    is the variance of the images' means less `N / views`, the part that noise contributes, and at least 0.

    Returns:
        0 to 1 (all views of an image are the same).
    """
    rows, shape = _views(views)
    rows = rows.reshape(shape)
    within = rows.var(axis=1, ddof=1).mean(axis=0).sum()
    between = max(0.0, rows.mean(axis=1).var(axis=0, ddof=1).sum() - within / shape[1])
    return float(between / (between + within)) if between > 0 else 0.0


class RidgePredictions(NamedTuple):
    """Leave-one-out predictions.

    Args:
        classes: `(samples,)`, values of the labels.
        penalty: the chosen penalty, added to the diagonal of `X^T X` of the standardized features.
    """

    classes: np.ndarray
    penalty: float


def ridge_predictions(
    features: Array, labels: Any, *, groups: Any = None, penalties: np.ndarray = PENALTIES
) -> RidgePredictions:
    """Predict each sample by ridge regression on all others (of other groups), without a single refit.

    Features are standardized over all samples, targets are one-hot, and the intercept has no penalty. With the hat
    matrix `H`, the residuals of samples `g` that are left out are exactly `(I - H_gg)^-1` times their residuals in the
    whole fit. The penalty whose predictions have the smallest squared error is chosen.

    Args:
        penalties: candidates, as shares of the standardized features' sum of squares.
    """
    rows = _standardized(_matrix(features))
    classes, targets = _labels(labels, len(rows))
    members = _groups(groups, len(rows))
    one_hot = np.eye(len(classes))[targets]
    left, scales = _principal(rows)
    mean = one_hot.mean(axis=0)
    coefficients = left.T @ one_hot
    tried, errors = penalties * max(np.square(scales).sum(), 1.0), []
    sizes = np.array([len(group) for group in members])
    alike = [np.stack([members[at] for at in np.flatnonzero(sizes == size)]) for size in np.unique(sizes)]
    predictions = []
    for penalty in tried:
        shrink = scales**2 / (scales**2 + penalty)
        residuals = one_hot - mean - (left * shrink) @ coefficients
        if groups is None:
            residuals /= 1 - 1 / len(rows) - (left**2 @ shrink)[:, None]
        else:
            for some in alike:  # all groups of one size at once, because many are small
                own = left[some]
                hat = 1 / len(rows) + (own * shrink) @ own.swapaxes(1, 2)
                residuals[some] = np.linalg.solve(np.eye(some.shape[1]) - hat, residuals[some])
        errors.append(float(np.square(residuals).sum()))
        predictions.append(near_best(one_hot - residuals).argmax(axis=1))
    best = best_of(-np.array(errors))
    return RidgePredictions(classes[predictions[best]], float(tried[best]))


def knn_predictions(
    features: Array, labels: Any, k: int = 5, *, groups: Any = None, standardize: bool = True
) -> np.ndarray:
    """Predict each sample as the most common class of its `k` nearest others (of other groups).

    Neighbors are nearest by cosine, by default of standardized features. All samples as near as the last neighbor also
    vote: among copies, and in a single dimension, only the last bits would order them. Of equally common classes the
    smallest wins.

    Returns:
        `(samples,)`, values of the labels.

    Raises:
        ValueError: `k` is below 1, or above the number of samples that remain without the largest group.
    """
    rows = _matrix(features)
    rows = _unit(_standardized(rows) if standardize else rows)
    classes, targets = _labels(labels, len(rows))
    members = _groups(groups, len(rows))
    most = len(rows) - max(len(group) for group in members)
    if not 1 <= k <= most:
        raise ValueError(f"k must be in 1..{most} (the number of other samples), got {k}")
    group_of = np.empty(len(rows), dtype=np.int64)
    for number, group in enumerate(members):
        group_of[group] = number
    one_hot, predictions = np.eye(len(classes))[targets], []
    for chunk in np.array_split(np.arange(len(rows)), -(-len(rows) // CHUNK)):
        cosines = rows[chunk] @ rows.T
        cosines[group_of[chunk][:, None] == group_of] = -np.inf
        last = np.partition(cosines, len(rows) - k, axis=1)[:, [len(rows) - k]]
        votes = (cosines >= last - ROUNDING) @ one_hot
        predictions.append(votes.argmax(axis=1))
    return classes[np.concatenate(predictions)]


def logme(features: Array, labels: Any, *, standardize: bool = True) -> float:
    """Logarithm of the maximum evidence per sample, in nats: LogME (You et al. 2021, arXiv 2102.11005).

    Each class's indicator is regressed on the features by Bayesian linear regression with weights `N(0, 1 / alpha)` and
    noise `N(0, 1 / beta)`. The log evidence is maximized over `alpha` and `beta`, divided by the number of samples and
    averaged over classes. Given `alpha / beta`, the best `beta` has a closed form. The ratio is searched on a grid, and
    a parabola through the three highest points gives the maximum; the paper iterates to a fixed point of the same
    evidence. By default features are standardized, and indicators centered in place of an intercept (ours); the paper
    does neither.
    """
    rows = _matrix(features)
    classes, targets = _labels(labels, len(rows))
    one_hot = np.eye(len(classes))[targets]
    if standardize:
        rows, one_hot = _standardized(rows), one_hot - one_hot.mean(axis=0)
    return float(_evidences_of(*_principal(rows), one_hot).mean())


class Consensus(NamedTuple):
    """What candidates agree on.

    Args:
        scores: `(candidates,)`, mean LogME of the clusters.
        clusters: `(clusterings, samples)`.
    """

    scores: np.ndarray
    clusters: np.ndarray


def consensus(candidates: Sequence[Array], *, seed: int = 0) -> Consensus:
    """LogME of clusters that the candidates agree on, which needs no labels (ours).

    Groups that the features of several candidates share come from the images and not from the noise. Deep clustering
    (Caron et al. 2018, arXiv 1807.05520) learns from such groups; here they only score.

    1. The standardized features of all candidates that are kept are put side by side. K-means splits their first 64
       principal components into 5, 10 and 20 clusters (at most half as many as samples), 8 times each from new starts.
    2. The score of a candidate is the mean LogME of all clusterings. A single k-means ends in one of many local optima,
       and the last bit of a feature may decide which; the mean over many starts does not depend on it.
    3. The better half, at least 5, are kept. There are at most 4 rounds, fewer if the same candidates are kept. The
       last round scores all candidates.

    Args:
        candidates: `(samples, width)` each, of the same samples; widths may differ.
    """
    principal = [_principal(_standardized(_matrix(features))) for features in candidates]
    count = len(principal[0][0])
    if any(len(left) != count for left, _ in principal):
        raise ValueError("candidates must be of the same samples")
    numbers = sorted({*np.minimum(CLUSTERS, max(2, count // 2)).tolist()})
    kept = np.arange(len(principal))
    for _ in range(CONSENSUS_ROUNDS):
        gram = np.zeros((count, count))
        for left, scales in (principal[index] for index in kept):
            gram += (left * np.square(scales)) @ left.T
        left, scales = roots(gram, count)
        coordinates = (left * scales)[:, :CONSENSUS_COMPONENTS]
        clusters = np.stack([_clusters(coordinates, n, seed + start) for n in numbers for start in range(CLUSTERINGS)])
        scores = np.array([_clusters_evidence(*each, clusters) for each in principal])
        better = np.sort(ranking(scores)[: max(LEAST_KEPT, len(kept) // 2)])
        if np.array_equal(better, kept):  # the next round would be this one
            break
        kept = better
    return Consensus(scores, clusters)


def _clusters(coordinates: np.ndarray, count: int, seed: int) -> np.ndarray:
    """K-means from one start; samples that are all the same are one cluster.

    Each center of the start has a single trial: with several, two samples that are nearest to each other and to no
    other would tie, and the last bit would decide.
    """
    if not coordinates.shape[1]:
        return np.zeros(len(coordinates), dtype=np.int64)
    count = min(count, len(np.unique(coordinates, axis=0)))
    centers, _ = kmeans_plusplus(coordinates, count, random_state=seed, n_local_trials=1)
    return KMeans(count, init=centers, n_init=1).fit_predict(coordinates).astype(np.int64)


def clusters_logme(features: Array, clusters: np.ndarray) -> float:
    """The score of `consensus`: mean LogME of `clusters` `(clusterings, samples)`; a single cluster counts as 0."""
    return _clusters_evidence(*_principal(_standardized(_matrix(features))), clusters)


def _clusters_evidence(left: np.ndarray, scales: np.ndarray, clusters: np.ndarray) -> float:
    indicators = [(each[:, None] == np.unique(each)).astype(float) for each in clusters if np.ptp(each)]
    if not indicators:
        return 0.0
    found = _evidences_of(left, scales, np.concatenate([each - each.mean(axis=0) for each in indicators], axis=1))
    ends = np.cumsum([each.shape[1] for each in indicators])[:-1]
    return float(sum(part.mean() for part in np.split(found, ends)) / len(clusters))


def _evidences_of(left: np.ndarray, scales: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log evidence per sample of every column of `targets`, given the principal components of the features."""
    return evidences(left.T @ targets, np.square(targets).sum(axis=0), scales, len(targets))


def evidences(projected: np.ndarray, squares: np.ndarray, scales: np.ndarray, count: int) -> np.ndarray:
    """Log evidence per sample of each of several targets.

    Args:
        projected: `(rank, targets)`, the targets in the basis of the features' left singular vectors.
        squares: `(targets,)`, their sums of squares.
        scales: `(rank,)`, singular values of the features.
        count: number of samples.
    """
    projections = np.square(projected).T  # (targets, rank)
    rest = np.maximum(squares - projections.sum(axis=1), 0)
    variances = np.square(scales)
    middle = np.log(variances.sum()) if len(variances) else 0.0  # of log(alpha / beta)
    grid = middle + np.linspace(-EVIDENCE_REACH, EVIDENCE_REACH, EVIDENCE_POINTS)
    shrunk = 1 / (1 + variances / np.exp(grid)[:, None])  # (points, rank)
    noise = (projections @ shrunk.T + rest[:, None]) / count  # (targets, points)
    values = -0.5 * (np.log(2 * np.pi * noise) + 1 - np.log(shrunk).sum(axis=-1) / count)
    peaks = values.argmax(axis=1).clip(1, EVIDENCE_POINTS - 2)
    before, at, after = (values[np.arange(len(values)), peaks + step] for step in (-1, 0, 1))
    bend = before + after - 2 * at
    rise = np.where(bend < 0, np.square(after - before) / (8 * np.where(bend < 0, -bend, 1.0)), 0.0)
    return np.maximum(at + rise, values.max(axis=1))


def _matrix(features: Array) -> np.ndarray:
    return _checked(features, "features", "(samples, width)", 2)


def _views(views: Array, standardize: bool = True) -> tuple[np.ndarray, tuple[int, int, int]]:
    """All views as rows, standardized or centered, and the shape of `views`."""
    values = _checked(views, "views", "(images, views, width)", 3)
    images, count, width = values.shape
    if count < 2:
        raise ValueError(f"views must hold at least 2 views of every image, got {count}")
    rows = values.reshape(images * count, width)
    return (_standardized(rows) if standardize else rows - rows.mean(axis=0)), (images, count, width)


def _checked(values: Array, name: str, shape: str, ndim: int) -> np.ndarray:
    array = values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, float)
    if array.ndim != ndim or not array.shape[-1]:
        raise ValueError(f"{name} must be {shape}, got {array.shape}")
    if len(array) < 2:
        raise ValueError(f"{name} must be those of at least 2 images, got {len(array)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} hold NaN or infinite values")
    return array


def _labels(labels: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The classes, ascending, and the index of each sample's class."""
    if labels is None:
        raise ValueError("labels are missing: this criterion needs the class of every sample")
    values = np.asarray(labels)
    if values.shape != (count,):
        raise ValueError(f"labels must be {count} integers, one per sample; got an array of shape {values.shape}")
    classes, targets = np.unique(values, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels must be of at least 2 classes; all are {classes[0]}")
    return classes, targets


def _groups(groups: Any, count: int) -> list[np.ndarray]:
    """Rows of every group; without groups, each sample is one."""
    values = np.arange(count) if groups is None else np.asarray(groups)
    if values.shape != (count,):
        raise ValueError(f"groups must be {count} integers, one per sample; got an array of shape {values.shape}")
    found, numbers = np.unique(values, return_inverse=True)
    if len(found) < 2:
        raise ValueError("groups must name at least 2 images, got 1")
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.cumsum(np.bincount(numbers))[:-1])


def _standardized(rows: np.ndarray) -> np.ndarray:
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    varies = deviation > RESOLUTION * np.abs(mean)
    return np.where(varies, (rows - mean) / np.where(varies, deviation, 1.0), 0.0)


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


def _principal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors `(samples, rank)` and singular values, largest first, by the smaller Gram matrix."""
    wide = rows.shape[0] <= rows.shape[1]
    vectors, scales = roots(rows @ rows.T if wide else rows.T @ rows, max(rows.shape))
    return (vectors if wide else rows @ vectors / scales), scales


def roots(gram: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors of a Gram matrix with positive eigenvalues, and the roots of these eigenvalues, largest first."""
    squares, vectors = np.linalg.eigh(gram)
    squares, vectors = squares[::-1], vectors[:, ::-1]
    kept = squares > size * np.finfo(float).eps * squares.max(initial=0.0)
    return vectors[:, kept], np.sqrt(squares[kept])


def effective_rank(values: np.ndarray) -> float:
    """Exponential of the entropy of non-negative values; 1 if all are 0."""
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
