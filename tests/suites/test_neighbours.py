from __future__ import annotations

import pytest
import torch

from pretrain.errors import DinobenchError
from suites import neighbours
from suites.neighbours import find_neighbours

BACKENDS = ["torch", "faiss"]


def plain(base: torch.Tensor, queries: torch.Tensor, k: int) -> torch.Tensor:
    base, queries = (torch.nn.functional.normalize(x, dim=1) for x in (base, queries))
    return (queries @ base.T).sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_base", [64, 999, 5003])
def test_neighbours_equal_a_full_stable_sort(backend: neighbours.Backend, num_base: int) -> None:
    generator = torch.Generator().manual_seed(num_base)
    base, queries = torch.randn(num_base, 24, generator=generator), torch.randn(130, 24, generator=generator)
    found = find_neighbours(base, queries, 20, backend=backend)
    assert torch.equal(found.indices, plain(base, queries, 20))
    assert (found.similarity.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 7, 20, 64])
@pytest.mark.parametrize("num_base", [64, 6400])
def test_ties_go_to_the_lower_index_also_across_the_kth_place(
    backend: neighbours.Backend, k: int, num_base: int
) -> None:
    # Axis-parallel features: similarities are exactly 0 or 1, so nearly everything is a tie.
    axis = torch.randint(4, (num_base,), generator=torch.Generator().manual_seed(0))
    base, queries = torch.eye(4)[axis], torch.eye(4)
    assert torch.equal(find_neighbours(base, queries, k, backend=backend).indices, plain(base, queries, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_collapsed_features_give_the_first_images(backend: neighbours.Backend) -> None:
    found = find_neighbours(torch.ones(4000, 8), torch.ones(9, 8), 5, backend=backend)
    assert torch.equal(found.indices, torch.arange(5).expand(9, 5))


def test_two_stage_selection_equals_topk() -> None:
    similarity = torch.randn(50, 320 * neighbours.GROUP, generator=torch.Generator().manual_seed(0))
    value, index = neighbours._top_grouped(similarity, 40)
    assert torch.equal(value, similarity.topk(40).values)
    assert torch.equal(similarity.gather(1, index), value)


def test_auto_takes_torch_for_small_searches_and_faiss_for_large_ones_on_the_cpu() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert neighbours.choose_backend("auto", 1e6, cpu) == "torch"
    assert neighbours.choose_backend("auto", 1e12, cpu) == "faiss"
    assert neighbours.choose_backend("auto", 1e12, cuda) == "torch"


def test_without_faiss_auto_is_torch_and_faiss_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours.importlib.util, "find_spec", lambda name: None)
    assert neighbours.choose_backend("auto", 1e12, torch.device("cpu")) == "torch"
    with pytest.raises(DinobenchError, match="use backend 'torch'"):
        find_neighbours(torch.eye(3), torch.eye(3), 1, backend="faiss")


def test_search_leaves_the_matmul_precision_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        find_neighbours(torch.eye(3), torch.eye(3), 1, backend="torch")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_gpu_search_equals_the_cpu_search(backend: neighbours.Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    base, queries = torch.randn(20000, 64, generator=generator), torch.randn(500, 64, generator=generator)
    on_gpu, on_cpu = (find_neighbours(base, queries, 20, backend=backend, device=d) for d in ("cuda", "cpu"))
    agreement = (on_gpu.indices.cpu() == on_cpu.indices).double().mean()
    assert agreement > 0.999  # neighbours whose similarities differ by rounding only may swap
