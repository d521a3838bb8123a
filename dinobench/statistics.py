"""Which differences are more than chance. Two kinds of claim, never mixed.

Checkpoint against checkpoint: these two networks, on images like the test images. What varies is the draw of the
images; the networks are fixed. Interval: bootstrap over images. Test: McNemar (1947) on the images that one of them
gets right and the other does not, as mid-p (Fagerland, Lydersen, Laake, BMC Med. Res. Methodol. 13:91, 2013): exact
binomial, half the probability of the observed table itself. Nothing of it carries over to the methods: trained with
another seed, the same method gives another network. Few-shot scores are of the draws of labelled images that were made.

Method against method: the expected score over seeds, on these test images. What varies is the seed; the images are
fixed. Interval: Student's t over the seeds. Test: t on the differences of runs of equal seed, df = seeds - 1. Seeds
share the test images, so the noise of the draw of the images is in none of it: seeds that all agree have an interval of
width 0, which says where the method's mean lies on these images, not on others.

Holm (Scand. J. Stat. 6, 1979) over all pairs of a table; intervals are 95 % each, not adjusted.

Shapes: n images, S seeds, ... any leading dimensions. Scores and differences are in points of the score (percent).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from pretrain.errors import DinobenchError
from suites.interval import CONFIDENCE, mean_interval

LEVEL = 1 - CONFIDENCE
MIN_SEEDS = 5
"""Fewest seeds for a claim about methods; below it there is mean and spread only."""
NUM_FLIPS = 9999
"""Sign patterns drawn for the test of values other than right and wrong."""
_EQUAL = 1e-9
"""Points below which two scores are the same number, computed twice."""

Scores = Mapping[int, float]
"""Seed -> score."""


@dataclass(frozen=True)
class Effect:
    """First minus second: the difference, how sure it is, and what was tested."""

    difference: float
    interval: tuple[float, float] | None
    """95 %; None where the claim cannot be made (fewer than 5 seeds)."""
    p: float | None
    """Two-sided, not adjusted; None where nothing can be tested."""
    test: str
    n: int
    """Images or common seeds."""
    counts: tuple[int, int] | None = None
    """Images that only the first and only the second gets right (McNemar)."""


def seed_interval(scores: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's t interval of the expected score over seeds, on the same test images; None for fewer than 2 seeds."""
    if len(scores) < 2:
        return None
    _, low, high, _ = paired_t(np.asarray(scores, dtype=np.float64), confidence)
    return float(low), float(high)


def spread(scores: Sequence[float]) -> float | None:
    """Sample standard deviation over seeds; None for fewer than 2."""
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def difference_margin(scores: Sequence[float], confidence: float = CONFIDENCE) -> float | None:
    """How far two trainings that differ by the seed lie apart, judged by some of them; None for fewer than 2.

    Half the width of Student's t interval of a difference of two draws, t sd sqrt(2).
    """
    deviation = spread(scores)
    if deviation is None:
        return None
    return float(stats.t.ppf((1 + confidence) / 2, len(scores) - 1) * deviation * np.sqrt(2))


def paired_t(
    differences: ArrayLike, confidence: float = CONFIDENCE
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean, interval and two-sided p [...] of the hypothesis that differences [..., S] of S >= 2 seeds average to 0.

    Differences that are all one number leave nothing to measure them by: the interval is that number, p is 1 where it
    is 0 and NaN elsewhere.
    """
    values = np.asarray(differences, dtype=np.float64)
    mean = np.asarray(values.mean(-1))
    flat = np.ptp(values, axis=-1) <= _EQUAL
    low, high = mean.copy(), mean.copy()
    p = np.asarray(np.where(np.abs(mean) <= _EQUAL, 1.0, np.nan))
    if not flat.all():
        found = stats.ttest_1samp(values[~flat], 0.0, axis=-1)
        bounds = found.confidence_interval(confidence)
        low[~flat], high[~flat], p[~flat] = bounds.low, bounds.high, found.pvalue  # type: ignore[attr-defined]
    return mean, low, high, p


def mcnemar(only_first: ArrayLike, only_second: ArrayLike) -> NDArray[np.float64]:
    """Two-sided mid-p [...] from the numbers [...] of images that only one of two networks gets right.

    2 P(X < k) + P(X = k) for the smaller number k, X ~ Binomial(first + second, 1/2). The exact test (2 P(X <= k))
    rejects less often than its level says, because the counts are discrete. Mid-p comes close to the level, and holds
    it over the draw of the images; given that just 8 or 10 images differ, say, it can be 7 % in place of 5.
    """
    first, second = np.asarray(only_first), np.asarray(only_second)
    smaller, total = np.minimum(first, second), first + second
    p = 2 * stats.binom.cdf(smaller - 1, total, 0.5) + stats.binom.pmf(smaller, total, 0.5)
    # equal numbers: both tails meet in the one middle value
    return np.where(first == second, 1.0, np.minimum(p, 1.0))


def compare_checkpoints(first: ArrayLike, second: ArrayLike, *, seed: int = 0) -> Effect:
    """Two networks by their scores [n] on the same images, in points (100 right, 0 wrong, or anything between).

    The difference has the paired bootstrap interval over images. Right and wrong are tested with McNemar's mid-p,
    other values (few-shot shares, average precisions) by flipping the signs of the differences at random, of which
    McNemar's exact test is the special case. An image where a score is NaN is left out.

    Raises:
        DinobenchError: different numbers of images, or none.
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape:
        raise DinobenchError(f"a paired test needs the same images: found {one.size} and {two.size} of them")
    kept = np.isfinite(one) & np.isfinite(two)
    one, two = one[kept], two[kept]
    if not one.size:
        raise DinobenchError("a paired test needs images; there is none with a score of both")
    differences = one - two
    interval = mean_interval(differences, seed=seed)
    if np.isin(np.r_[one, two], (0.0, 100.0)).all():
        counts = int((differences > 0).sum()), int((differences < 0).sum())
        return Effect(float(differences.mean()), interval, float(mcnemar(*counts)), "McNemar mid-p", one.size, counts)
    p = _sign_flips(differences, seed)
    return Effect(float(differences.mean()), interval, p, "sign flips over images", one.size)


def _sign_flips(differences: NDArray[np.float64], seed: int) -> float:
    moving = differences[np.abs(differences) > _EQUAL]
    if not moving.size:
        return 1.0
    batch = max(1, 2**22 // moving.size)
    found = stats.permutation_test(
        (moving,),
        lambda values, axis: values.mean(axis),
        permutation_type="samples",
        n_resamples=NUM_FLIPS,
        batch=batch,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def compare_methods(first: Scores, second: Scores) -> Effect:
    """Two methods by their scores under the seeds that both have; paired t, df = seeds - 1.

    With fewer than 5 common seeds there is the mean difference alone.

    Raises:
        DinobenchError: no seed in common.
    """
    seeds = sorted(set(first) & set(second))
    if not seeds:
        raise DinobenchError(f"no seed in common: {sorted(first)} and {sorted(second)}; train both with the same seeds")
    differences = np.array([first[seed] - second[seed] for seed in seeds], dtype=np.float64)
    if len(seeds) < MIN_SEEDS:
        return Effect(float(differences.mean()), None, None, f"none below {MIN_SEEDS} seeds", len(seeds))
    mean, low, high, p = (float(value) for value in paired_t(differences))
    if np.isnan(p):
        return Effect(mean, (low, high), None, "none: the difference is the same under every seed", len(seeds))
    return Effect(mean, (low, high), p, "paired t over seeds", len(seeds))


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjustment of p [m]: an adjusted p below the level holds it for all m together."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(np.arange(values.size, 0, -1) * values[order]), 1.0)
    return adjusted


def adjusted_p(effects: Sequence[Effect]) -> list[float | None]:
    """Holm over those effects that were tested; None for the others."""
    tested = {k: effect.p for k, effect in enumerate(effects) if effect.p is not None}
    adjusted: list[float | None] = [None] * len(effects)
    for k, value in zip(tested, holm(list(tested.values())), strict=True):
        adjusted[k] = float(value)
    return adjusted


def may_be_bold(table: Mapping[str, Mapping[str, Scores]], lower_is_better: Sequence[str] = ()) -> dict[str, str]:
    """What a table may print bold: in each column at most one method, better than every other one of it.

    Args:
        table: column -> method -> seed -> score; absent cells are left out.
        lower_is_better: columns whose smallest score is the best.

    "Better" is the method test, with at least 5 common seeds, after Holm over all pairs of methods in all columns of
    the table. One method of fewer seeds in a column leaves that column without bold: nothing shows that it is worse.
    """
    pairs = [(column, *pair) for column, methods in table.items() for pair in combinations(methods, 2)]
    effects = [compare_or_none(table[column][one], table[column][two]) for column, one, two in pairs]
    winners: dict[str, dict[str, int]] = {column: dict.fromkeys(methods, 0) for column, methods in table.items()}
    for (column, one, two), effect, p in zip(pairs, effects, adjusted_p(effects), strict=True):
        if p is not None and p < LEVEL:
            better_first = (effect.difference > 0) != (column in lower_is_better)
            winners[column][one if better_first else two] += 1
    return {
        column: method
        for column, wins in winners.items()
        for method, count in wins.items()
        if count == len(wins) - 1 and count > 0
    }


def compare_or_none(first: Scores, second: Scores) -> Effect:
    """As compare_methods; methods without a common seed are not tested."""
    if set(first) & set(second):
        return compare_methods(first, second)
    difference = float(np.mean(list(first.values())) - np.mean(list(second.values())))
    return Effect(difference, None, None, "none: no seed in common", 0)
