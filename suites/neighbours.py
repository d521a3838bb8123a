"""Exact nearest neighbours by cosine similarity, with ties in a stated order, from torch or FAISS.

Order of the neighbours of a query: higher similarity first; at equal similarity the lower index first. Both backends
give the k first of that order, also when a tie lies across the k-th place.

Shapes: base [N, D], queries [M, D] (rows L2-normalised here), k neighbours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import DinobenchError, UsageError

Backend = Literal["auto", "torch", "faiss"]

GROUP = 16
"""Columns per group of the two-stage top-k."""
BLOCK = 2**14
"""Rows normalised at a time."""
CHUNK_VALUES = {"cpu": 2**25, "cuda": 2**28}
"""Similarities held at a time: 128 MiB on the CPU, 1 GiB on a GPU."""
FAISS_WORTH = 1e10
"""Multiplications above which "auto" loads FAISS on the CPU; below, importing it costs more than it saves."""


class Neighbours(NamedTuple):
    """similarity [M, k] float32 and indices [M, k] int64 into the base, in the order of the module."""

    similarity: Tensor
    indices: Tensor


def find_neighbours(
    base: Tensor, queries: Tensor, k: int, *, backend: Backend = "auto", device: str | torch.device = "cpu"
) -> Neighbours:
    """The k nearest rows of base [N, D] for each row of queries [M, D].

    Args:
        backend: "torch" is chunked matmul and top-k in float32; "faiss" is IndexFlatIP, on the GPU when FAISS sees one;
            "auto" takes FAISS for large searches on the CPU when it is installed, else torch.

    Raises:
        UsageError: k is larger than N.
        DinobenchError: backend "faiss" without FAISS.
    """
    if k > len(base):
        raise UsageError(
            f"k={k} needs {k} train images, this set has {len(base)}: lower k in a copy of the suite definition"
        )
    base, queries = (_unit_rows(x, device) for x in (base, queries))
    chosen = choose_backend(backend, len(base) * len(queries) * base.shape[1], base.device)
    parts = list(_search_faiss(base, queries, k) if chosen == "faiss" else _search_torch(base, queries, k))
    if not parts:
        return Neighbours(queries.new_empty(0, k), torch.empty(0, k, dtype=torch.long, device=queries.device))
    return Neighbours(torch.cat([p.similarity for p in parts]), torch.cat([p.indices for p in parts]))


def _unit_rows(x: Tensor, device: str | torch.device) -> Tensor:
    """Rows of x [N, D] of length 1, float32 on the device; in blocks, so that nothing else of this size is held."""
    unit = torch.empty(x.shape, dtype=torch.float32, device=device)
    for block, rows in zip(unit.split(BLOCK), x.split(BLOCK), strict=True):
        nn.functional.normalize(rows.to(device, torch.float32), dim=1, out=block)
    return unit


def choose_backend(backend: Backend, work: float, device: torch.device) -> Literal["torch", "faiss"]:
    """Resolve "auto" for a search of `work` multiplications."""
    if backend == "torch":
        return "torch"
    installed = importlib.util.find_spec("faiss") is not None
    if backend == "faiss":
        if not installed:
            raise DinobenchError("backend 'faiss' needs FAISS, which is not installed: use backend 'torch' or 'auto'")
        return "faiss"
    return "faiss" if installed and device.type == "cpu" and work >= FAISS_WORTH else "torch"


def _search_torch(base: Tensor, queries: Tensor, k: int) -> Iterator[Neighbours]:
    num_base = len(base)
    limit = CHUNK_VALUES.get(base.device.type, CHUNK_VALUES["cuda"])
    chunk = min(max(limit // num_base, 64), 2048)
    grouped = num_base >= 4 * GROUP * (k + 1)
    padding = -num_base % GROUP if grouped else 0  # so that the columns divide into groups; it never wins
    with _full_precision():
        for block in queries.split(chunk):
            similarity = block.new_full((len(block), num_base + padding), -torch.inf)
            torch.mm(block, base.T, out=similarity[:, :num_base])
            top = _top_grouped(similarity, k + 1) if grouped else similarity.topk(min(k + 1, num_base))
            yield _ordered(top[0], top[1], k, similarity[:, :num_base])


def _top_grouped(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k values and indices of similarity [B, N], N divisible by GROUP, reading it once.

    The k largest values lie in the k groups with the largest maxima (every value outside them is at most each of those
    k maxima), so the costly selection runs over N / GROUP maxima and then over k * GROUP candidates.
    """
    groups = similarity.unflatten(1, (GROUP, -1))  # [B, GROUP, N / GROUP]: a group is every (N / GROUP)-th column
    chosen = groups.amax(1).topk(k, sorted=False).indices
    candidates = groups.gather(2, chosen[:, None].expand(-1, GROUP, -1)).flatten(1)
    value, position = candidates.topk(k)
    index = chosen.gather(1, position % k) + (position // k) * groups.shape[2]
    return value, index


def _ordered(value: Tensor, index: Tensor, k: int, similarity: Tensor | None) -> Neighbours:
    """Cut the k + 1 best [B, k + 1], sorted by value, to k in the module's order.

    Rows with a tie across the k-th place are taken again from `similarity` [B, N].
    """
    tied = torch.zeros(len(value), dtype=torch.bool, device=value.device)
    if value.shape[1] > k:
        tied = value[:, k] == value[:, k - 1]
        value, index = value[:, :k], index[:, :k]
    index, order = index.sort(1)
    value, order = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    rows = tied.nonzero().squeeze(1)
    if similarity is not None and len(rows):
        for part in rows.split(64):
            value[part], index[part] = _first_of_ties(similarity[part], value[part, -1:], k)
    return Neighbours(value, index)


def _first_of_ties(similarity: Tensor, kth: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k first of rows [b, N] whose k-th value is kth [b, 1]: all larger values, then equal ones by index."""
    larger, equal = similarity > kth, similarity == kth
    room = k - larger.sum(1, keepdim=True)
    chosen = larger | (equal & (equal.cumsum(1) <= room))
    index = chosen.nonzero()[:, 1].unflatten(0, (-1, k))
    value, order = similarity.gather(1, index).sort(dim=1, descending=True, stable=True)
    return value, index.gather(1, order)


def _search_faiss(base: Tensor, queries: Tensor, k: int) -> Iterator[Neighbours]:
    import faiss

    index: Any = faiss.IndexFlatIP(base.shape[1])
    if getattr(faiss, "get_num_gpus", lambda: 0)() > 0:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(base.cpu().numpy())
    depth = min(k + 1, len(base))
    for block in queries.split(4096):
        value, position = (torch.from_numpy(x).to(base.device) for x in index.search(block.cpu().numpy(), depth))
        found = _ordered(value, position, k, None)
        tied = (value[:, k] == value[:, k - 1]).nonzero().squeeze(1) if depth > k else value.new_empty(0).long()
        if len(tied):  # the tie across the k-th place is resolved by the exact search
            again = list(_search_torch(base, block[tied], k))
            found.similarity[tied] = torch.cat([part.similarity for part in again])
            found.indices[tied] = torch.cat([part.indices for part in again])
        yield found


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products in float32: TF32 would reorder close neighbours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
