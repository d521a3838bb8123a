from __future__ import annotations

import math

import pytest
import torch

from pretrain.objectives import prototype_usage
from pretrain.objectives.prototype_usage import unique_count, unique_counts


def plain_greedy_cover(prototypes: torch.Tensor, threshold: float) -> int:
    kept: list[torch.Tensor] = []
    for prototype in torch.nn.functional.normalize(prototypes, dim=1):
        if all(1 - float(prototype @ other) > threshold for other in kept):
            kept.append(prototype)
    return len(kept)


@pytest.mark.parametrize("chunk", [7, 64, 1024])
def test_chunked_count_equals_the_plain_greedy_cover(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(200, 4, generator=generator)
    counts = unique_counts(prototypes, chunk=chunk)
    assert list(counts) == list(prototype_usage.THRESHOLDS)
    for threshold, count in counts.items():
        assert count == plain_greedy_cover(prototypes, threshold)
    assert counts[0.4] < counts[0.001]


def test_copies_of_few_directions_count_once_whatever_their_norm() -> None:
    directions = torch.eye(5, 16)
    scale = torch.rand(100, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert unique_count(directions.repeat(20, 1) * scale) == 5


def test_prototypes_of_norm_zero_are_not_counted() -> None:
    assert unique_count(torch.zeros(8, 4)) == 0
    assert unique_count(torch.cat([torch.zeros(8, 4), torch.eye(4)])) == 4


def test_opposite_directions_are_different() -> None:
    assert unique_count(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 2


def test_usage_entropy_is_log_k_for_equal_use_and_zero_for_one_prototype() -> None:
    equal = prototype_usage.usage_counts(torch.arange(32), 32)
    assert prototype_usage.usage_entropy(equal).item() == pytest.approx(math.log(32), abs=1e-6)
    assert prototype_usage.perplexity(equal).item() == pytest.approx(32, rel=1e-5)
    single = prototype_usage.usage_counts(torch.full((50,), 3), 32)
    assert prototype_usage.usage_entropy(single).item() == 0
    assert prototype_usage.num_used(single).item() == 1


def test_usage_entropy_of_nothing_is_zero() -> None:
    assert prototype_usage.usage_entropy(torch.zeros(8)).item() == 0


def test_kappa_quantiles_divide_the_norms_by_the_temperature() -> None:
    norms = torch.linspace(1, 3, 101)
    quantiles = prototype_usage.kappa_quantiles(norms, 0.05, (0.0, 0.5, 1.0))
    assert quantiles.tolist() == pytest.approx([20, 40, 60], rel=1e-5)


def test_many_prototypes_are_counted_in_bounded_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(50, 32, generator=generator)
    prototypes = directions[torch.randint(50, (8192,), generator=generator)]
    prototypes = prototypes + 0.01 * torch.randn(prototypes.shape, generator=generator)
    assert unique_count(prototypes) == 50
