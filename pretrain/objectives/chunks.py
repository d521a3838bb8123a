"""A loss over rows of K logits, some rows at a time, so that its memory does not grow with batch x views x K.

A loss between soft targets and predictions is a sum over rows (images with all their views, or masked patches), and so
are its gradients with respect to bottleneck outputs z and prototypes W:

    L = sum_c L_c      dL/dz = [dL_c/dz_c]      dL/dW = sum_c dL_c/dW        c: a chunk of rows

Each chunk's logits, targets and gradients are formed in the forward pass and its logits then freed: nothing is computed
twice, and targets, whose making moves the centre, are made once. What couples the rows of a batch (Sinkhorn-Knopp,
softmax over the batch, me-max) has no such sum and keeps every logit.

Shapes: R rows, P bottleneck, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PartialLoss = Callable[[Tensor, Tensor, slice], Tensor]
"""(z of the chunk [..., r, P], W [K, P], the chunk's rows) -> its term of the sum, a scalar."""


def num_rows(max_bytes: int, bytes_per_row: int) -> int:
    """Rows whose logits fit in `max_bytes`; one row at least, whatever it needs."""
    return max(1, max_bytes // bytes_per_row)


def sum_over_chunks(loss: PartialLoss, z: Tensor, vectors: Tensor, rows: int) -> Tensor:
    """sum of loss(z[..., chunk, :], vectors, chunk) over chunks of `rows` rows; a scalar.

    Gradients reach `z` and `vectors` alone, not what else `loss` may depend on. Without any row `loss` is called once,
    with an empty chunk.

    Args:
        loss: called once for each chunk, in order, within the forward pass.
        z: bottleneck outputs [..., R, P].
        vectors: prototypes [K, P].
        rows: at a time.
    """
    return _SumOverChunks.apply(z, vectors, loss, rows)


class _SumOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, vectors: Tensor, loss: PartialLoss, rows: int) -> Tensor:
        total = z.new_zeros(())
        dz, dw = torch.empty_like(z), torch.zeros_like(vectors)
        weight = vectors.detach().requires_grad_()
        for start in range(0, max(z.shape[-2], 1), rows):
            part = slice(start, start + rows)
            z_part = z[..., part, :].detach().requires_grad_()
            with torch.enable_grad():
                value = loss(z_part, weight, part)
            # As in a backward pass after the forward one, which autocast does not reach.
            with torch.autocast(z.device.type, enabled=False):
                dz[..., part, :], dw_part = torch.autograd.grad(value, (z_part, weight))
            dw += dw_part
            total += value.detach()
            del value, dw_part  # of the size of W: not to be held beside the next chunk
        ctx.save_for_backward(dz, dw)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dz, dw = ctx.saved_tensors
        (grad,) = grads
        return dz * grad, dw * grad, None, None
