"""How well an unsupervised assignment agrees with the classes (iBOT, section 4.1.3: unsupervised clusters).

Source: bytedance/ibot@da316d8 `evaluation/unsupervised/unsup_cls.py`. The first three compare partitions of any sizes;
accuracy needs a one-to-one match of clusters and classes, the best one found by the Hungarian algorithm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def agreement(label: NDArray[np.int64], found: NDArray[np.int64]) -> dict[str, float]:
    """Classes [N] and clusters [N] -> NMI (arithmetic mean), ARI, Fowlkes-Mallows and accuracy, in percent.

    With more clusters than classes the clusters left over count as wrong.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics

    table = metrics.cluster.contingency_matrix(label, found)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return {
        "nmi": 100 * float(metrics.normalized_mutual_info_score(label, found)),
        "ari": 100 * float(metrics.adjusted_rand_score(label, found)),
        "fmi": 100 * float(metrics.fowlkes_mallows_score(label, found)),
        "hungarian": 100 * float(table[rows, columns].sum()) / len(label),
    }
