from __future__ import annotations

import numpy as np
import pytest

from suites.interval import bootstrap_interval, mean_interval


def test_interval_of_an_accuracy_is_the_binomial_one() -> None:
    correct = np.r_[np.ones(450), np.zeros(50)] * 100
    low, high = mean_interval(correct)
    half = 1.96 * 100 * np.sqrt(0.9 * 0.1 / 500)
    assert low == pytest.approx(90 - half, abs=0.5)
    assert high == pytest.approx(90 + half, abs=0.5)


def test_grouped_resampling_is_resampling_of_images() -> None:
    values = np.random.default_rng(0).integers(0, 5, 40) / 4
    resampled = np.random.default_rng(1).choice(values, (20000, 40)).mean(1)
    assert mean_interval(values, num_resamples=20000) == pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=0.01)


def test_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).random(300)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_interval_of_a_perfect_score_is_a_point() -> None:
    assert mean_interval(np.full(20, 100.0)) == (100.0, 100.0)


def test_many_groups_are_resampled_in_chunks() -> None:
    group = np.arange(20000)
    low, high = bootstrap_interval(group, lambda counts: (counts > 0).mean(1), num_resamples=300)
    assert low < 1 - np.exp(-1) < high


def test_no_image_has_no_interval() -> None:
    assert np.isnan(mean_interval([])).all()
