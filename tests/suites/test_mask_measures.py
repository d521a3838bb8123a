from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from suites.mask_measures import contour, contour_accuracy, region_similarity, summarise, widen


def square(top: int, left: int, side: int, size: tuple[int, int] = (60, 80)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


NOTHING = square(0, 0, 0)


def test_overlap_of_squares_is_counted_by_hand() -> None:
    # 10 x 10 squares moved by 5 columns: 50 shared of 150.
    assert region_similarity(square(10, 10, 10), square(10, 15, 10)) == pytest.approx(1 / 3)
    assert region_similarity(square(10, 10, 10), square(10, 10, 10)) == 1
    assert region_similarity(square(10, 10, 10), square(40, 40, 10)) == 0
    assert region_similarity(NOTHING, NOTHING) == 1
    assert region_similarity(NOTHING, square(10, 10, 10)) == 0


def test_contour_is_the_rim_on_the_upper_left_side() -> None:
    mask = np.zeros((5, 6), dtype=bool)
    mask[2:4, 2:4] = True
    # Row 1 and column 1 lie outside, but differ from their right, lower or lower right neighbour; (2, 2) is inside.
    expected = np.array(
        [
            [0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 1, 0, 1, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0],
        ],
        dtype=bool,
    )
    np.testing.assert_array_equal(contour(mask), expected)


def test_the_border_of_the_image_is_no_contour() -> None:
    full = np.ones((5, 6), dtype=bool)
    assert not contour(full).any()
    half = full.copy()
    half[:, 3:] = False
    assert contour(half).sum() == 5 and contour(half)[:, 2].all()


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_widening_equals_dilation_by_a_disk(radius: int) -> None:
    points = np.random.default_rng(radius).random((30, 41)) < 0.02
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    np.testing.assert_array_equal(widen(points, radius), ndimage.binary_dilation(points, x * x + y * y <= radius**2))


def by_distance(found: np.ndarray, true: np.ndarray, radius: float) -> float:
    """F from all distances between contour points: the definition, without images of disks."""
    a, b = (np.argwhere(contour(mask)).astype(float) for mask in (found, true))
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    precision, recall = (distances.min(axis) <= radius for axis in (1, 0))
    p, r = precision.mean(), recall.mean()
    return 2 * p * r / (p + r) if p + r else 0.0


@pytest.mark.parametrize("move", range(8))
def test_contour_accuracy_follows_the_definition(move: int) -> None:
    true = square(15, 15, 20)
    found = square(15 + move // 2, 15 + move, 20)
    found[30:33, 40:70] = True
    radius = math.ceil(0.008 * math.hypot(60, 80))
    assert radius == 1
    assert contour_accuracy(found, true) == pytest.approx(by_distance(found, true, radius))


def test_contour_accuracy_tolerates_a_shift_within_the_radius_and_no_more() -> None:
    size = (480, 854)
    assert math.ceil(0.008 * math.hypot(*size)) == 8
    true = square(100, 100, 200, size)
    assert contour_accuracy(square(100, 108, 200, size), true) == 1
    assert contour_accuracy(square(100, 109, 200, size), true) < 1
    assert contour_accuracy(square(300, 500, 100, size), true) == 0


def test_contour_accuracy_of_empty_masks() -> None:
    assert contour_accuracy(NOTHING, NOTHING) == 1
    assert contour_accuracy(NOTHING, square(10, 10, 10)) == 0
    assert contour_accuracy(square(10, 10, 10), NOTHING) == 0


def test_summary_has_mean_recall_and_decay() -> None:
    # 1 + 9 frames: the quarters are frames 1-3, 3-5, 5-7, 7-9 (each shares its last frame with the next).
    values = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    found = summarise(values)
    assert found.mean == pytest.approx(0.6)
    assert found.recall == pytest.approx(5 / 9)
    assert found.decay == pytest.approx(0.9 - 0.3)
    assert summarise(np.array([0.7])).decay == 0
