from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from suites.label_maps import IGNORED
from suites.overlap import Overlap, count_pixels, overlap_of

CLASSES = 5


@pytest.fixture
def maps() -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Labels and predictions of images of several sizes; a fifth of the pixels is not judged, class 4 is nowhere."""
    generator = np.random.default_rng(0)
    labels, found = [], []
    for number in range(12):
        shape = (7 + number, 9)
        label = generator.integers(0, 4, shape).astype(np.uint8)
        right = generator.random(shape) < 0.5
        found.append(np.where(right, label, generator.integers(0, 4, shape)).astype(np.uint8))
        label[generator.random(shape) < 0.2] = IGNORED
        labels.append(label)
    return labels, found


def measured(labels: list[NDArray[np.uint8]], found: list[NDArray[np.uint8]]) -> Overlap:
    pairs = zip(labels, found, strict=True)
    return overlap_of(torch.stack([count_pixels(torch.from_numpy(a), torch.from_numpy(b), CLASSES) for a, b in pairs]))


def reference(labels: list[NDArray[np.uint8]], found: list[NDArray[np.uint8]]) -> list[float]:
    """IoU of every class by sets of pixels, one class after the other."""
    values = []
    for one in range(CLASSES):
        intersection = union = 0
        for label, prediction in zip(labels, found, strict=True):
            judged = label != IGNORED
            wanted, given = (label == one) & judged, (prediction == one) & judged
            intersection += int((wanted & given).sum())
            union += int((wanted | given).sum())
        values.append(intersection / union if union else float("nan"))
    return values


def test_mean_iou_equals_a_count_by_sets(maps: tuple[list, list]) -> None:
    overlap, expected = measured(*maps), reference(*maps)
    np.testing.assert_allclose(overlap.class_iou(), expected)
    assert np.isnan(expected[4])
    assert overlap.mean_iou() == pytest.approx(np.mean(expected[:4]))
    everything = [np.concatenate([part.ravel() for part in parts]) for parts in maps]
    judged = everything[0] != IGNORED
    hits = everything[0][judged] == everything[1][judged]
    assert overlap.pixel_accuracy() == pytest.approx(hits.mean())
    recalls = [hits[everything[0][judged] == one].mean() for one in range(4)]
    assert overlap.class_accuracy() == pytest.approx(np.mean(recalls))


def test_pixels_that_are_not_judged_count_nowhere(maps: tuple[list, list]) -> None:
    labels, found = maps
    changed = [np.where(label == IGNORED, (b + 1) % CLASSES, b) for label, b in zip(labels, found, strict=True)]
    first, second = measured(labels, found), measured(labels, changed)
    for name in ("shared", "labelled", "predicted"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_a_class_that_is_given_and_never_there_counts_zero() -> None:
    label = np.zeros((2, 4), dtype=np.uint8)
    found = label.copy()
    assert measured([label], [found]).mean_iou() == 1
    found[0, 0] = 3
    np.testing.assert_allclose(measured([label], [found]).class_iou()[[0, 3]], [7 / 8, 0])
    assert measured([label], [found]).mean_iou() == pytest.approx(7 / 16)


def test_nothing_judged_has_no_value() -> None:
    label = np.full((2, 4), IGNORED, dtype=np.uint8)
    overlap = measured([label], [np.zeros_like(label)])
    assert np.isnan(overlap.mean_iou()) and np.isnan(overlap.pixel_accuracy())


def test_interval_equals_scoring_the_images_drawn(maps: tuple[list, list]) -> None:
    """Bootstrap the plain way: the pixels of the images that a draw holds, scored by sets."""
    labels, found = maps
    generator = np.random.default_rng(3)
    draws = generator.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=2000)
    values = []
    for draw in draws[:40]:
        chosen = np.repeat(np.arange(len(labels)), draw)
        values.append(np.nanmean(reference([labels[i] for i in chosen], [found[i] for i in chosen])))
    counts = measured(labels, found)
    drawn = draws.astype(float)
    shared, labelled, predicted = (drawn @ part for part in (counts.shared, counts.labelled, counts.predicted))
    union = (labelled + predicted - shared)[:, :4]
    all_values = (shared[:, :4] / union).mean(1)
    np.testing.assert_allclose(all_values[:40], values)
    low, high = np.percentile(all_values, [2.5, 97.5])
    assert counts.interval(seed=3) == pytest.approx((low, high))


def test_tables_add_up(maps: tuple[list, list]) -> None:
    overlap = measured(*maps)
    images, classes = overlap.images(), overlap.classes(("a", "b", "c", "d", "e"))
    assert images["correct_pixels"].sum() == classes["correct_pixels"].sum()
    assert images["pixels"].sum() == classes["labelled_pixels"].sum() == classes["predicted_pixels"].sum()
    alone = reference(maps[0][2:3], maps[1][2:3])
    assert images["miou"][2] == pytest.approx(100 * np.nanmean(alone))
    np.testing.assert_allclose(classes["iou"], 100 * np.array(reference(*maps)))
