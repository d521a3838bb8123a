"""Rows and means over all ranks that carry a gradient, so that W ranks of B rows train like one rank of W x B rows.

DDP averages the gradients of the ranks. The two functions are scaled for that: the average of the ranks' gradients is
the gradient of the single process, when every rank has the same number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.training import runtime


def rank() -> int:
    """Index of this process in the group; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_rows(rows: Tensor) -> Tensor:
    """[B, D] of every rank -> [W B, D], rank by rank. The gradient of every rank's loss flows back to its rows."""
    return rows if runtime.world_size() == 1 else _GatherRows.apply(rows)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over ranks. Its backward pass is the identity (MSN `AllReduce`).

    Every rank holds the same loss of this mean; the factor 1 / W of the mean is the one DDP applies.
    """
    size = runtime.world_size()
    if size == 1:
        return value
    with torch.no_grad():
        others = runtime.all_reduce_sum(value) / size - value
    return value + others


class _GatherRows(torch.autograd.Function):
    """all_gather whose backward pass sums what the ranks' losses say about this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = runtime.all_reduce_sum(grads[0])
        start = dist.get_rank() * ctx.num_rows
        return total[start : start + ctx.num_rows]
