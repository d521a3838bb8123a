"""Whether the loss curve of one training stays within a band around that of another.

Curves are means over the last WINDOW steps. After the warm-up the curve of an
optimised run stays, at every step, as near to the plain one as the larger of
    the sample standard deviation between the plain runs of the three seeds, pooled over POOL steps around: a training
        that is changed by less than another seed changes it supports the same conclusions. Two seeds are further apart
        than this about half of the time, so the band is narrower than what exchanging the seed would need; pooled,
        because three curves cross, and where they do their deviation says nothing
    FLOOR of the loss: what one step from equal weights may differ in bf16, so no less can be asked of 2,000
and the first FIRST steps of optimised_fp32, one by one, by no more than one step from equal weights may differ in fp32.

Shapes: T steps, S curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

WINDOW, POOL, FIRST = 50, 201, 20
FLOOR, EXACT = 5e-3, 1e-5
"""Of the loss: what one step from equal weights may differ in bf16 and in fp32 before the benchmark times it."""


def smooth(losses: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Mean over the last `window` steps, of fewer at the start: [T] -> [T]."""
    total = np.concatenate([[0.0], np.cumsum(losses)])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def deviation_between(smoothed: Sequence[np.ndarray], pool: int = POOL) -> np.ndarray:
    """Sample standard deviation between curves, its square averaged over `pool` steps around each: [T]."""
    variance = np.var(np.stack(smoothed), axis=0, ddof=1)
    half = pool // 2
    return np.array([np.sqrt(variance[max(t - half, 0) : t + half + 1].mean()) for t in range(len(variance))])


def half_width(reference: np.ndarray, controls: Sequence[np.ndarray]) -> np.ndarray:
    """The band around the smoothed reference, [T]: see the module's docstring."""
    return np.maximum(deviation_between([reference, *controls]), FLOOR * reference)


def judge(run: np.ndarray, reference: np.ndarray, width: np.ndarray, warmup: int) -> dict[str, Any]:
    """Smoothed curves [T] against each other after the warm-up."""
    difference, width, reference = (run - reference)[warmup:], width[warmup:], reference[warmup:]
    share = np.abs(difference) / width
    return {
        "inside": bool((share <= 1).all()),
        "steps_inside": float((share <= 1).mean()),
        "largest_share_of_band": float(share.max()),
        "at_step": int(share.argmax()) + warmup + 1,
        "largest_difference": float(np.abs(difference).max()),
        "largest_relative_difference": float(np.abs(difference / reference).max()),
        "mean_difference": float(difference.mean()),
        "difference_at_end": float(difference[-1]),
    }


def judge_first(run: np.ndarray, reference: np.ndarray, tolerance: float = EXACT) -> dict[str, Any]:
    """The first steps one by one, not smoothed."""
    worst = np.abs(run[:FIRST] / reference[:FIRST] - 1)
    return {"steps": len(worst), "inside": bool((worst <= tolerance).all()), "largest_relative": float(worst.max())}
