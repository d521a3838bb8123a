"""Do the features cluster by class without labels? k-means, then normalised mutual information with the classes.

L2-normalised features; k-means with as many clusters as classes, fitted on train (scikit-learn, k-means++, best of
`num_inits` starts by inertia), applied to test; NMI with the arithmetic mean of the entropies, times 100, averaged over
`num_seeds` seeds. `nmi_sd` is the standard deviation over the seeds; the interval is over test images. A sample has its
cluster of the first seed as `cluster` and no prediction: clusters have no names.

Shapes: N train images, M test images, D features, S seeds.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from pretrain.errors import DinobenchError
from suites.interval import bootstrap_interval
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split

NEEDS_LABELS = True
Counts = NDArray[np.int64]


class Parameters(ProtocolParameters):
    """Numbers that define the score."""

    num_seeds: int = Field(default=5, ge=1)
    num_inits: int = Field(default=10, ge=1)
    """Starts per seed; the one of lowest inertia on train counts."""


def run(train: Split, test: Split, parameters: Parameters, context: Context) -> Outcome:
    """Cluster train features [N, D], score the clusters of test features [M, D]."""
    num_clusters = len(train.labels.unique())
    if len(train) < num_clusters:
        raise DinobenchError(f"k-means needs at least {num_clusters} train images, this set has {len(train)}")
    assignments = cluster(train.features, test.features, num_clusters, parameters, context.seed)
    label = np.unique(test.labels.numpy(), return_inverse=True)[1]
    values = [100 * normalised_mutual_information(contingency(label, found)[None])[0] for found in assignments]
    scores = {"nmi": float(np.mean(values))}
    if len(values) > 1:
        scores["nmi_sd"] = float(np.std(values, ddof=1))
    scores["num_clusters"] = float(num_clusters)
    samples = pd.DataFrame({"index": test.index.numpy(), "label": test.labels.numpy(), "cluster": assignments[0]})
    notes = [f"mean over {parameters.num_seeds} k-means seeds, {num_clusters} clusters fitted on {len(train)} images"]
    interval = _interval(label, assignments, scores["nmi"], context.seed)
    return Outcome(scores, len(test), interval, samples, notes=notes)


def cluster(
    train: Tensor, test: Tensor, num_clusters: int, parameters: Parameters, seed: int
) -> list[NDArray[np.int64]]:
    """Clusters of the test features [M, D] for each seed: S arrays [M]."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    fit_on, apply_to = (nn.functional.normalize(x.float().cpu(), dim=1).numpy() for x in (train, test))

    found = []
    with warnings.catch_warnings():
        # Collapsed features have fewer distinct points than clusters; the score says so, a warning adds nothing.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for offset in range(parameters.num_seeds):
            # set_params: the constructor's type stub knows n_init as a string only.
            model = KMeans(num_clusters, random_state=seed + offset).set_params(n_init=parameters.num_inits)
            found.append(np.asarray(model.fit(fit_on).predict(apply_to), dtype=np.int64))
    return found


def contingency(label: NDArray[np.int64], found: NDArray[np.int64]) -> Counts:
    """Images per (class, cluster): labels [M] and clusters [M], both from 0 -> counts [C, G]."""
    shape = (int(label.max()) + 1, int(found.max()) + 1)
    return np.bincount(label * shape[1] + found, minlength=shape[0] * shape[1]).reshape(shape)


def normalised_mutual_information(counts: NDArray[Any]) -> NDArray[np.float64]:
    """NMI of tables [R, C, G]: 2 I / (H(class) + H(cluster)); 1 when both have one value, 0 when one has."""
    share = counts / counts.sum((1, 2), keepdims=True)
    joint, classes, clusters = _entropy(share.reshape(len(share), -1)), _entropy(share.sum(2)), _entropy(share.sum(1))
    total = classes + clusters
    information = np.clip(classes + clusters - joint, 0, None)
    return np.where(total > 0, 2 * information / np.where(total > 0, total, 1), 1.0)


def _entropy(share: NDArray[np.float64]) -> NDArray[np.float64]:
    return -(share * np.log(np.where(share > 0, share, 1))).sum(1)


def _interval(
    label: NDArray[np.int64], assignments: list[NDArray[np.int64]], estimate: float, seed: int
) -> tuple[float, float]:
    """Bootstrap over images of the mean NMI: images with the same label and the same clusters form a group.

    Doubled images look like shared information, so resamples are biased upwards; the percentiles are shifted back.
    """
    rows, group = np.unique(np.stack([label, *assignments]), axis=1, return_inverse=True)

    def statistic(counts: Counts) -> NDArray[np.float64]:
        return 100 * np.mean([_resampled(counts, rows[0], found) for found in rows[1:]], axis=0)

    return bootstrap_interval(group.reshape(-1), statistic, seed=seed, centre=estimate)


def _resampled(counts: Counts, label: NDArray[np.int64], found: NDArray[np.int64]) -> NDArray[np.float64]:
    """NMI of R resamples: counts [R, U] of U kinds of image, their label [U] and cluster [U]."""
    num_classes, num_clusters = int(label.max()) + 1, int(found.max()) + 1
    cell = np.eye(num_classes * num_clusters)[label * num_clusters + found]
    return normalised_mutual_information((counts @ cell).reshape(-1, num_classes, num_clusters))
