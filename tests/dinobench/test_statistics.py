from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dinobench import statistics
from dinobench.statistics import Effect, compare_checkpoints, compare_methods, holm, may_be_bold, mcnemar, paired_t
from pretrain.errors import DinobenchError
from suites.interval import mean_interval

DRAWS, IMAGES = 2000, 500
ERROR = 20.0
"""Mean error in percent of the simulated methods."""
SEED_SDS = (0.0, 0.5, 1.0, 2.0, 3.0)


class Simulation:
    """`DRAWS` experiments: test images are drawn, some of them hard, and two equal methods are trained with S seeds.

    A network errs on image i with probability e_i (1 + sd / ERROR * z), z the luck of its seed: its accuracy over all
    images of the world is 100 - ERROR - sd z, over the drawn ones in expectation 100 (1 - mean_i e_i).
    """

    def __init__(self, seed_sd: float, num_seeds: int):
        generator = np.random.default_rng([int(10 * seed_sd), num_seeds])
        hard = generator.random((DRAWS, IMAGES)) < 0.3
        error = np.where(hard, 0.5, (ERROR / 100 - 0.3 * 0.5) / 0.7).astype(np.float32)
        self.expected_here = 100 * (1 - error.mean(1))
        luck = np.clip(generator.standard_normal((2, num_seeds, DRAWS)), -3, 3)
        self.of_network = 100 - ERROR - seed_sd * luck
        rate = 1 + seed_sd / ERROR * luck.astype(np.float32)
        self.correct = np.empty((2, num_seeds, DRAWS, IMAGES), dtype=bool)
        for method in range(2):
            for seed in range(num_seeds):
                draw = generator.random((DRAWS, IMAGES), dtype=np.float32)
                self.correct[method, seed] = draw >= error * rate[method, seed, :, None]

    @property
    def scores(self) -> NDArray[np.float64]:
        """[2, S, DRAWS] percent."""
        return 100 * self.correct.mean(3)


@cache
def image_interval(num_right: int) -> tuple[float, float]:
    """Images that count the same are exchangeable, so the interval depends on the number of right ones alone."""
    return mean_interval(np.r_[np.full(num_right, 100.0), np.zeros(IMAGES - num_right)])


@cache
def paired_interval(only_first: int, only_second: int) -> tuple[float, float]:
    values = np.zeros(IMAGES)
    values[:only_first], values[only_first : only_first + only_second] = 100.0, -100.0
    return mean_interval(values)


def share_within(bounds: list[tuple[float, float]], truth: NDArray[np.float64]) -> float:
    low, high = np.array(bounds).T
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("seed_sd", SEED_SDS)
def test_intervals_cover_their_own_claim_and_tests_hold_their_level(seed_sd: float, num_seeds: int) -> None:
    simulation = Simulation(seed_sd, num_seeds)
    scores = simulation.scores

    # a method: its expected score over seeds, on these images
    _, low, high, _ = paired_t(scores[0].T)
    assert 0.93 <= ((low <= simulation.expected_here) & (simulation.expected_here <= high)).mean() <= 0.97
    # two methods of equal expectation on these images
    _, low, high, p = paired_t((scores[0] - scores[1]).T)
    assert 0.93 <= ((low <= 0) & (high >= 0)).mean() <= 0.97
    assert 0.03 <= (p < 0.05).mean() <= 0.065

    # a network: its accuracy on all images of the world
    network = simulation.correct[0, 0]
    assert 0.93 <= share_within([image_interval(k) for k in network.sum(1)], simulation.of_network[0, 0]) <= 0.97


@pytest.mark.parametrize("seed_sd", SEED_SDS)
def test_the_tests_of_two_checkpoints_hold_their_level(seed_sd: float) -> None:
    """Two networks of equal accuracy in the world: whatever the luck of the seed, both have the same."""
    simulation = Simulation(0.0, 2)
    generator = np.random.default_rng(int(10 * seed_sd))
    luck = np.clip(generator.standard_normal((DRAWS, 1)), -3, 3) * seed_sd / 100
    flipped = generator.random((2, DRAWS, IMAGES)) < np.abs(luck)
    one, two = (np.where(flip, luck < 0, net) for flip, net in zip(flipped, simulation.correct[0], strict=True))
    first, second = (one & ~two).sum(1), (two & ~one).sum(1)
    assert (mcnemar(first, second) < 0.05).mean() <= 0.065
    bounds = [paired_interval(*pair) for pair in zip(first.tolist(), second.tolist(), strict=True)]
    assert 0.93 <= share_within(bounds, np.zeros(DRAWS)) <= 0.97


def test_mcnemar_is_no_test_of_methods() -> None:
    """Why the claims are kept apart: two methods of equal expectation, one run each, and seeds that matter."""
    simulation = Simulation(3.0, 2)
    one, two = simulation.correct[:, 0]
    p = mcnemar((one & ~two).sum(1), (two & ~one).sum(1))
    assert (p < 0.05).mean() > 0.2


@pytest.mark.parametrize("share", [0.002, 0.01, 0.02, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("num_images", [70, 500, 2000])
def test_mid_p_holds_its_level_exactly_over_the_draw_of_images(num_images: int, share: float) -> None:
    """Exact sum over the number of images that only one of the two gets right, `share` of them on average."""
    level = 0.0
    for discordant in range(1, num_images + 1):
        weight = stats.binom.pmf(discordant, num_images, share)
        if weight > 1e-7:
            k = np.arange(discordant + 1)
            level += weight * stats.binom.pmf(k, discordant, 0.5)[mcnemar(k, discordant - k) < 0.05].sum()
    assert level <= 0.0505


def test_mid_p_is_half_the_observed_table_less_than_the_exact_test() -> None:
    k, total = 3, 12
    exact = stats.binomtest(k, total).pvalue
    assert mcnemar(k, total - k) == pytest.approx(exact - stats.binom.pmf(k, total, 0.5), abs=1e-12)
    assert mcnemar(k, total - k) == mcnemar(total - k, k)
    assert mcnemar([0, 4], [0, 4]).tolist() == [1.0, 1.0]


def test_t_over_seeds_is_scipys() -> None:
    generator = np.random.default_rng(0)
    one, two = generator.normal(90, 1, (7, 5)), generator.normal(91, 1, (7, 5))
    expected = stats.ttest_rel(one, two, axis=1)
    mean, low, high, p = paired_t(one - two)
    assert p == pytest.approx(expected.pvalue)
    assert (low, high) == (pytest.approx(expected.confidence_interval().low), pytest.approx(high))
    assert mean == pytest.approx((one - two).mean(1))
    effect = compare_methods(dict(enumerate(one[0])), dict(enumerate(two[0])))
    assert effect.p == pytest.approx(expected.pvalue[0])
    assert (effect.n, effect.test) == (5, "paired t over seeds")


def test_runs_are_paired_by_seed_whatever_their_order() -> None:
    one = {4: 90.0, 0: 91.0, 1: 92.5, 2: 93.0, 3: 94.0}
    two = {seed: one[seed] - 1 - seed / 10 for seed in range(5)} | {9: 0.0}
    effect = compare_methods(one, two)
    assert effect.n == 5
    assert effect.difference == pytest.approx(1.2)


def test_fewer_than_five_seeds_make_no_claim() -> None:
    effect = compare_methods({0: 90.0, 1: 91, 2: 92, 3: 93}, {0: 50.0, 1: 51, 2: 52.5, 3: 53})
    assert (effect.p, effect.interval) == (None, None)
    assert effect.difference == pytest.approx(39.875)
    with pytest.raises(DinobenchError, match="no seed in common"):
        compare_methods({0: 1.0}, {1: 1.0})


def test_seeds_that_do_not_vary_show_nothing() -> None:
    scores = {seed: 90.0 + seed / 3 for seed in range(5)}
    shifted = compare_methods(scores, {seed: value - 0.2 for seed, value in scores.items()})
    assert (shifted.p, shifted.difference) == (None, pytest.approx(0.2))
    assert compare_methods(scores, scores).p == 1.0
    assert statistics.seed_interval([90.0, 90.0, 90.0]) == (90.0, 90.0)
    assert (statistics.seed_interval([90.0]), statistics.spread([90.0])) == (None, None)


def test_two_checkpoints_by_right_and_wrong() -> None:
    first, second = np.zeros(500), np.zeros(500)
    first[:450], second[20:455] = 100, 100
    effect = compare_checkpoints(first, second)
    assert effect.counts == (20, 5)
    assert effect.difference == pytest.approx(3.0)
    assert effect.p == pytest.approx(float(mcnemar(20, 5)))
    half = 1.96 * 100 * np.sqrt((25 / 500 - 0.03**2) / 500)
    assert effect.interval == pytest.approx((3 - half, 3 + half), abs=0.3)


def test_shares_are_tested_by_flipping_signs_of_which_mcnemar_is_a_case() -> None:
    generator = np.random.default_rng(0)
    first = generator.random(60) * 100
    second = first - generator.normal(3, 10, 60)
    effect = compare_checkpoints(first, second)
    assert effect.test == "sign flips over images"
    assert effect.p == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.02)
    right = np.r_[np.full(9, 100.0), np.full(2, -100.0)]
    assert statistics._sign_flips(right, 0) == pytest.approx(stats.binomtest(2, 11).pvalue, abs=1e-9)
    assert compare_checkpoints(first, first).p == 1.0


def test_images_without_a_score_are_left_out() -> None:
    effect = compare_checkpoints([100, 0, np.nan, 40], [100, 100, 0, np.nan])
    assert (effect.n, effect.counts) == (2, (0, 1))
    with pytest.raises(DinobenchError, match="same images"):
        compare_checkpoints([100.0], [100.0, 0.0])
    with pytest.raises(DinobenchError, match="there is none"):
        compare_checkpoints([np.nan], [0.0])


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]).size == 0
    effects = [Effect(1, None, p, "t", 5) for p in (0.01, None, 0.04)]
    assert statistics.adjusted_p(effects) == [pytest.approx(0.02), None, pytest.approx(0.04)]


def seeds(mean: float, num: int = 5) -> dict[int, float]:
    return {seed: mean + 0.1 * np.sin(seed + mean) for seed in range(num)}


def test_bold_is_what_beats_every_other_method() -> None:
    table = {"knn": {"a": seeds(95), "b": seeds(90), "c": seeds(80)}}
    assert may_be_bold(table) == {"knn": "a"}
    assert may_be_bold(table, lower_is_better=("knn",)) == {"knn": "c"}


@pytest.mark.parametrize(
    "column",
    [
        {"a": seeds(95), "b": seeds(90), "c": seeds(80, 4)},
        {"a": seeds(95, 4), "b": seeds(90, 4)},
        {"a": seeds(95), "b": dict(enumerate(reversed(seeds(95).values())))},
        {"a": seeds(95)},
        {"a": seeds(95), "b": {9: 80.0}},
        {"a": dict.fromkeys(range(5), 95.0), "b": dict.fromkeys(range(5), 80.0)},
        {},
    ],
    ids=[
        "a row of 4 seeds",
        "4 seeds",
        "no difference",
        "one row",
        "no common seed",
        "seeds that do not vary",
        "empty",
    ],
)
def test_nothing_is_bold_without_support(column: dict) -> None:
    assert may_be_bold({"knn": column}) == {}


def test_bold_is_judged_over_all_pairs_of_the_table() -> None:
    generator = np.random.default_rng(1)
    close = {"a": {s: 91.0 + x for s, x in enumerate(generator.normal(0, 0.4, 5))}, "b": dict.fromkeys(range(5), 90.0)}
    assert may_be_bold({"knn": close}) == {"knn": "a"}
    noise = {name: {s: float(x) for s, x in enumerate(generator.normal(90, 1, 5))} for name in "abcdefgh"}
    assert may_be_bold({"knn": close, "other": noise}) == {}


def test_two_seeds_lie_no_further_apart_than_the_margin_as_often_as_said() -> None:
    draws = np.random.default_rng(0).normal(90, 2, (4000, 7))
    margins = np.array([statistics.difference_margin(list(row), 0.95) for row in draws[:, :5]])
    assert (np.abs(draws[:, 5] - draws[:, 6]) <= margins).mean() == pytest.approx(0.95, abs=0.01)
    assert statistics.difference_margin([90.0]) is None
