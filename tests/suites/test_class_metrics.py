from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

from suites.class_metrics import class_table, metric_interval, metric_value
from suites.eleven_point import average_precision


@pytest.fixture
def decided() -> tuple[torch.Tensor, torch.Tensor]:
    """Decisions [200, 5] and labels of 4 of the classes, 10 to 100 images each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 100 + [1] * 60 + [3] * 30 + [4] * 10)
    return torch.randn(200, 5, generator=generator).double() + 2 * torch.eye(5)[labels], labels


@pytest.fixture
def presence() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    there = torch.randint(-1, 2, (150, 3), generator=generator)
    return torch.randn(150, 3, generator=generator).double() + there, there


def test_accuracies_are_those_of_scikit_learn(decided: tuple[torch.Tensor, torch.Tensor]) -> None:
    decisions, labels = decided
    prediction = decisions.argmax(1)
    assert metric_value("top1", decisions, labels) == pytest.approx(100 * accuracy_score(labels, prediction))
    balanced = pytest.approx(100 * recall_score(labels, prediction, labels=[0, 1, 3, 4], average="macro"))
    assert metric_value("mean_per_class", decisions, labels) == balanced
    seen = (prediction != 2).nonzero().flatten()  # scikit-learn warns of predictions that no label has
    expected = 100 * balanced_accuracy_score(labels[seen], prediction[seen])
    assert metric_value("mean_per_class", decisions[seen], labels[seen]) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["top1", "mean_per_class"])
def test_interval_is_that_of_resampled_images(metric: str, decided: tuple[torch.Tensor, torch.Tensor]) -> None:
    decisions, labels = decided
    random = np.random.default_rng(3)
    draws = [torch.from_numpy(random.integers(0, 200, 200)) for _ in range(3000)]
    values = [metric_value(metric, decisions[rows], labels[rows]) for rows in draws]
    found = [metric_interval(metric, decisions, labels, seed=seed) for seed in range(4)]
    np.testing.assert_allclose(np.mean(found, 0), np.percentile(values, [2.5, 97.5]), atol=0.6)
    assert found[0] == metric_interval(metric, decisions, labels, seed=0)


def test_interval_of_the_average_precision_is_that_of_resampled_images(
    presence: tuple[torch.Tensor, torch.Tensor],
) -> None:
    scores, there = presence
    random = np.random.default_rng(3)
    draws = [torch.from_numpy(random.integers(0, 150, 150)) for _ in range(1000)]
    values = [metric_value("voc07_map", scores[rows], there[rows]) for rows in draws]
    found = metric_interval("voc07_map", scores, there, seed=0)
    np.testing.assert_allclose(found, np.percentile(values, [2.5, 97.5]), atol=0.8)


def test_a_last_class_that_is_always_wrong_or_right_keeps_its_place() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    wrong = torch.eye(2).double()[[0, 0, 0, 0]]
    assert metric_interval("mean_per_class", wrong, labels, seed=0)[1] == 100  # a resample of class 0 alone
    assert metric_value("mean_per_class", wrong, labels) == 50
    assert metric_interval("mean_per_class", torch.eye(2).double()[labels], labels, seed=0) == (100, 100)


def test_rows_per_class_average_to_the_score(
    decided: tuple[torch.Tensor, torch.Tensor], presence: tuple[torch.Tensor, torch.Tensor]
) -> None:
    decisions, labels = decided
    table = class_table(decisions, labels, ("a", "b", "c", "d"))
    assert table["class"].tolist() == ["a", "b", "d", "4"] and table["n"].tolist() == [100, 60, 30, 10]
    assert table["recall"].mean() == pytest.approx(metric_value("mean_per_class", decisions, labels))
    scores, there = presence
    there[:, 1] = there[:, 1].clamp_max(0)
    table = class_table(scores, there, ("a", "b", "c"))
    assert table["class"].tolist() == ["a", "c"]
    assert table["n"].tolist() == [int((there[:, c] == 1).sum()) for c in (0, 2)]
    assert table["average_precision"].mean() == pytest.approx(metric_value("voc07_map", scores, there))
    assert table["average_precision"][1] == 100 * average_precision(scores[:, 2].numpy(), there[:, 2].numpy())[0]
