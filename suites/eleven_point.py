"""Average precision of Pascal VOC 2007: precision at eleven recalls.

Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2010, section 4.2: the mean over the recalls 0, 0.1,
..., 1 of the highest precision at this recall or a higher one. Images of equal score are answered together, as in
scikit-learn's precision_recall_curve (the official VOCcode takes them in the order of the list, so that a classifier
that tells nothing apart depends on it). Images in which every object of the class is marked difficult do not count,
neither as answers nor as something to be found.

Shapes: N images, C classes, R sets of weights.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_RECALLS = 11
CHUNK_VALUES = 2**22
"""Weights of one class handled at a time: 32 MiB."""


def average_precision(
    scores: NDArray[np.float64], presence: NDArray[np.int64], weights: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Average precision [R] of one class from scores [N] and presence [N] (1 there, 0 not, -1 does not count).

    Args:
        weights: [R, N]: how often each image counts; None = once, R = 1.

    Returns:
        In [0, 1]; NaN where no image that counts shows the class.
    """
    counted = presence >= 0
    weights = np.ones((1, len(scores)), dtype=np.int64) if weights is None else weights
    order = np.flatnonzero(counted)[np.argsort(-scores[counted], kind="stable")]
    found = presence[order] == 1
    if not found.any():
        return np.full(len(weights), np.nan)
    # Of each group of equal scores the last image; only groups that find something can raise the precision.
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    ends = ends[np.unique(np.searchsorted(ends, np.flatnonzero(found)))]
    rows = max(1, CHUNK_VALUES // len(order))
    parts = [_of_groups(weights[start : start + rows, order], found, ends) for start in range(0, len(weights), rows)]
    return np.concatenate(parts)


def _of_groups(weights: NDArray[np.int64], found: NDArray[np.bool_], ends: NDArray[np.int64]) -> NDArray[np.float64]:
    """Average precision [R] from weights [R, n] and hits [n] in the order of the answers, read at `ends`."""
    answers = weights.cumsum(1)[:, ends]
    hits = np.where(found, weights, 0).cumsum(1)[:, ends]
    total = hits[:, -1:]
    # Highest precision at this place or later.
    best = np.maximum.accumulate((hits / np.maximum(answers, 1))[:, ::-1], axis=1)[:, ::-1]
    steps = NUM_RECALLS - 1
    # In whole numbers: 3 of 10 reach the recall 0.3, which 3 * 0.1 in floating point exceeds.
    reached = [np.argmax(steps * hits >= step * total, axis=1) for step in range(NUM_RECALLS)]
    value = np.take_along_axis(best, np.stack(reached, 1), axis=1).mean(1)
    return np.where(total[:, 0] > 0, value, np.nan)


def mean_average_precision(
    scores: NDArray[np.float64], presence: NDArray[np.int64], weights: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Mean [R] over the classes of scores [N, C] and presence [N, C] that are there to be found."""
    values = [average_precision(scores[:, c], presence[:, c], weights) for c in range(scores.shape[1])]
    known = np.stack(values)
    number = np.isfinite(known).sum(0)
    return np.where(number > 0, np.nansum(known, 0) / np.maximum(number, 1), np.nan)
