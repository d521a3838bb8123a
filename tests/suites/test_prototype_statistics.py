from __future__ import annotations

import math

import pytest
import torch

from suites import prototype_statistics as statistics


def test_nearest_cosine_is_that_of_the_nearest_other_prototype() -> None:
    vectors = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    cosine = torch.corrcoef(torch.cat([vectors, -vectors], 1))[:40, :40]  # rows of mean 0: correlation is the cosine
    expected = (cosine - 2 * torch.eye(40)).amax(1).mean().item()
    assert statistics.nearest_cosine(3 * vectors) == pytest.approx(expected, abs=1e-6)
    assert statistics.nearest_cosine(vectors.repeat(2, 1)) == pytest.approx(1)
    assert statistics.nearest_cosine(torch.eye(5)) == 0


def test_nearest_cosine_of_a_sample_looks_among_all() -> None:
    vectors = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    copies = torch.cat([vectors, vectors])
    assert statistics.nearest_cosine(copies, sample=7) == pytest.approx(1)
    assert statistics.nearest_cosine(vectors, sample=10) == statistics.nearest_cosine(vectors, sample=10)


def test_unique_directions_are_swept_and_the_main_one_is_the_score() -> None:
    vectors = torch.eye(6).repeat(3, 1)
    scores, table = statistics.unique_directions(vectors, (0.1, 0.4), 0.025)
    assert scores == {"unique": 6, "nearest_cosine": 1}
    assert table["cosine_distance"].tolist() == [0.025, 0.1, 0.4]
    assert table["share"].tolist() == [pytest.approx(1 / 3)] * 3


def test_utilisation_of_even_and_single_use() -> None:
    even = statistics.utilisation(torch.tensor([5, 5, 5, 5]), torch.tensor([0.1, 0.3]))
    assert even["perplexity"] == pytest.approx(4)
    assert (even["used"], even["dead"], even["num_prototypes"]) == (4, 0, 4)
    assert even["usage_entropy"] == pytest.approx(math.log(4))
    assert even["assignment_entropy"] == pytest.approx(0.2)
    single = statistics.utilisation(torch.tensor([0, 9, 0]), torch.zeros(9))
    assert (single["used"], single["dead"], single["perplexity"]) == (1, 2, 1)
