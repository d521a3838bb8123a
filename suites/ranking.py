"""Scores of a ranked list: average precision by trapezoids, mean precision at k (dino `utils.compute_map`).

For the j-th positive (from 0) at place r (from 0) of a list whose query has P positives in all,

    AP = sum_j (p0 + p1) / (2 P)        p0 = j / r (1 if r = 0)        p1 = (j + 1) / (r + 1)

Images to ignore ("junk") are taken out of the list before. Precision at k counts up to the last positive when that lies
before place k. A query without positives has no score (NaN) and is left out of the means.

Shapes: N images, Q queries, P positives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class RankingScores:
    """Scores in [0, 1]."""

    average_precision: Floats
    """[Q], NaN for a query without positives."""
    precision: Floats
    """[Q, K] precision at each k, NaN for a query without positives."""

    @property
    def num_scored(self) -> int:
        """Queries with positives."""
        return int(np.isfinite(self.average_precision).sum())

    @property
    def mean_average_precision(self) -> float:
        """mAP; NaN when no query has positives."""
        return float(np.mean(self.average_precision[self._scored])) if self.num_scored else float("nan")

    @property
    def mean_precision(self) -> Floats:
        """[K] mP@k."""
        return self.precision[self._scored].mean(0) if self.num_scored else np.full(self.precision.shape[1], np.nan)

    @property
    def _scored(self) -> NDArray[np.bool_]:
        return np.isfinite(self.average_precision)


def score_ranking(
    order: NDArray[np.int64],
    positives: Sequence[ArrayLike],
    junk: Sequence[ArrayLike],
    ks: Sequence[int] = (),
) -> RankingScores:
    """Scores of Q ranked lists.

    Args:
        order: [N, Q] images of each query, best first.
        positives: Q lists of images to be found.
        junk: Q lists of images that count neither way.
        ks: for mP@k.
    """
    num_queries = order.shape[1]
    average, precision = np.full(num_queries, np.nan), np.full((num_queries, len(ks)), np.nan)
    for query in range(num_queries):
        wanted = np.asarray(positives[query], dtype=np.int64)
        if len(wanted):
            places = places_of(order[:, query], wanted, np.asarray(junk[query], dtype=np.int64))
            average[query] = average_precision(places, len(wanted))
            precision[query] = [precision_at(places, k) for k in ks]
    return RankingScores(average, precision)


def places_of(order: Integers, positives: Integers, junk: Integers) -> Integers:
    """Places (from 0, ascending) of the positives in `order` [N] once the junk is taken out."""
    is_junk = np.isin(order, junk)
    places = np.flatnonzero(np.isin(order, positives))
    return places - np.cumsum(is_junk)[places]


def average_precision(places: ArrayLike, num_positives: int) -> float:
    """AP of a query with `num_positives` positives, of which those found are at `places` (from 0, ascending)."""
    place = np.asarray(places, dtype=np.float64)
    found = np.arange(len(place))
    before = np.where(place == 0, 1.0, found / np.maximum(place, 1))
    return float((before + (found + 1) / (place + 1)).sum() / (2 * num_positives))


def precision_at(places: ArrayLike, k: int) -> float:
    """Share of positives among the first k, or up to the last positive if that comes earlier; 0 when none was found."""
    place = np.asarray(places, dtype=np.int64) + 1
    if not len(place):
        return 0.0
    depth = min(int(place[-1]), k)
    return float((place <= depth).sum() / depth)
