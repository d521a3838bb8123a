from __future__ import annotations

import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve

from suites import eleven_point
from suites.eleven_point import average_precision, mean_average_precision


def reference(scores: NDArray, presence: NDArray) -> float:
    """The definition, threshold by threshold, in fractions of whole numbers."""
    pairs = [(s, p) for s, p in zip(scores.tolist(), presence.tolist(), strict=True) if p != -1]
    total = sum(p for _, p in pairs)
    points = []
    for threshold in {s for s, _ in pairs}:
        answered = [p for s, p in pairs if s >= threshold]
        points.append((sum(answered), sum(answered) / len(answered)))
    best = [
        max((precision for hits, precision in points if 10 * hits >= step * total), default=0) for step in range(11)
    ]
    return sum(best) / 11


def drawn(seed: int, num: int = 60, *, levels: int | None = None) -> tuple[NDArray, NDArray]:
    random = np.random.default_rng(seed)
    presence = random.choice([-1, 0, 1], num, p=[0.1, 0.6, 0.3])
    scores = presence + 2 * random.standard_normal(num)
    return scores if levels is None else np.round(scores * levels / 4), presence


@pytest.mark.parametrize("levels", [None, 20, 4, 0])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition_with_and_without_ties(seed: int, levels: int | None) -> None:
    scores, presence = drawn(seed, levels=levels)
    assert average_precision(scores, presence)[0] == pytest.approx(reference(scores, presence), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_curve_of_scikit_learn(seed: int) -> None:
    scores, presence = drawn(seed, levels=12)
    counted = presence >= 0
    curve = precision_recall_curve(presence[counted], scores[counted])
    precision, recall = curve[0][:-1], curve[1][:-1]  # its last point, precision 1 at recall 0, is not measured
    expected = np.mean([precision[recall >= level - 1e-9].max() for level in np.linspace(0, 1, 11)])
    assert average_precision(scores, presence)[0] == pytest.approx(expected, abs=1e-12)


def test_an_example_worked_by_hand() -> None:
    # Hits at places 1, 3 and 6 of 6: precision 1 up to recall 1/3, 2/3 up to 2/3, 1/2 up to 1.
    scores, presence = np.array([6.0, 5, 4, 3, 2, 1]), np.array([1, 0, 1, 0, 0, 1])
    assert average_precision(scores, presence)[0] == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11)


def test_recalls_are_compared_in_whole_numbers() -> None:
    # 3 of 10 is the recall 0.3, where 0.1 + 0.1 + 0.1 is more: a comparison of floats loses the step.
    scores, presence = -np.arange(20.0), np.array([1] * 3 + [0] * 10 + [1] * 7)
    assert average_precision(scores, presence)[0] == pytest.approx((4 + 7 * 10 / 20) / 11)


def test_a_classifier_that_tells_nothing_apart_gets_the_share_of_the_class_in_any_order() -> None:
    presence = np.array([1, 1, 0, 0, 0, -1])
    assert average_precision(np.zeros(6), presence)[0] == average_precision(np.zeros(6), presence[::-1])[0]
    assert average_precision(np.zeros(6), presence)[0] == pytest.approx(2 / 5)


def test_difficult_images_are_neither_answers_nor_wanted() -> None:
    scores, presence = drawn(0)
    counted = presence >= 0
    moved = np.where(counted, scores, 100.0)
    assert average_precision(moved, presence) == average_precision(scores[counted], presence[counted])


@pytest.mark.parametrize("levels", [None, 6])
def test_weights_are_repeated_images(levels: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, presence = drawn(1, levels=levels)
    weights = np.random.default_rng(2).multinomial(60, [1 / 60] * 60, size=40)
    whole = average_precision(scores, presence, weights)
    for value, counts in zip(whole, weights, strict=True):
        assert value == pytest.approx(reference(np.repeat(scores, counts), np.repeat(presence, counts)), abs=1e-12)
    monkeypatch.setattr(eleven_point, "CHUNK_VALUES", 300)
    np.testing.assert_array_equal(average_precision(scores, presence, weights), whole)


def test_a_class_without_images_is_left_out_of_the_mean() -> None:
    scores = np.stack([drawn(seed)[0] for seed in range(3)], 1)
    presence = np.stack([drawn(seed)[1] for seed in range(3)], 1)
    presence[:, 1] = np.minimum(presence[:, 1], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mean_average_precision(scores, presence)
        assert np.isnan(average_precision(scores[:, 1], presence[:, 1])).all()
    assert found[0] == pytest.approx(np.mean([reference(scores[:, c], presence[:, c]) for c in (0, 2)]))
    # In a resample too: the only image of class 1 does not count in the first, and twice in the second.
    presence[0, 1] = 1
    weights = np.ones((2, 60), dtype=int)
    weights[:, 0] = 0, 2
    values = mean_average_precision(scores, presence, weights)
    others = [np.mean([average_precision(scores[:, c], presence[:, c], weights)[r] for c in (0, 2)]) for r in (0, 1)]
    assert values[0] == pytest.approx(others[0]) and values[1] != pytest.approx(others[1])
    assert np.isnan(mean_average_precision(scores, np.zeros_like(presence))).all()
