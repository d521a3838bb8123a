"""Bootstrap intervals over images: resample the images with replacement, take the score again.

Images that count the same (same correctness, or same label and cluster) are exchangeable, so a resample is drawn as
multinomial counts over the distinct values instead of over images: the same distribution, at a fraction of the cost.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


def mean_interval(
    values: ArrayLike, *, seed: int = 0, confidence: float = CONFIDENCE, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [n], one value per image."""
    distinct, group = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)

    def mean(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        return counts @ distinct / counts.sum(1)

    return bootstrap_interval(group, mean, seed=seed, confidence=confidence, num_resamples=num_resamples)


def bootstrap_interval(
    group: ArrayLike,
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    *,
    seed: int = 0,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    centre: float | None = None,
) -> tuple[float, float]:
    """Percentile interval of a statistic that depends only on how many images each group holds.

    Args:
        group: [n] group of each image, integers from 0.
        statistic: counts [R, G] of R resamples -> [R] values.
        seed: Seed of the resampling; the same call gives the same interval on every machine.
        centre: The score itself, for a statistic whose resamples are biased (an entropy, a count of distinct things):
            the percentiles are shifted so that the mean of the resamples falls on it.
    """
    sizes = np.bincount(np.asarray(group, dtype=np.int64))
    num_images = int(sizes.sum())
    if num_images == 0:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    chunk = max(1, min(num_resamples, 2**24 // len(sizes)))
    values = [
        statistic(generator.multinomial(num_images, sizes / num_images, size=min(chunk, num_resamples - start)))
        for start in range(0, num_resamples, chunk)
    ]
    tail = 100 * (1 - confidence) / 2
    resamples = np.concatenate(values)
    shift = 0.0 if centre is None else centre - resamples.mean()
    low, high = np.percentile(resamples, [tail, 100 - tail]) + shift
    return float(low), float(high)
