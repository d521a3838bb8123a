"""Soft-target cross-entropy between views over K prototypes, without the loop over pairs.

DINO sums -p_g . log q_v over all pairs (teacher view g, student view v), v != g. The sum over g moves inside, so that
each student view needs one log-sum-exp and the teacher meets the student in one product of p-dimensional vectors:

    loss = (1/n) [ sum_v c_v LSE(s_v) - sum_g <a_g, m_g>/tau - (V-1) sum_g p_g . b ]
    s_v = z_v W^T / tau + b      m_g = p_g W      a_g = sum_v z_v - z_g      c_v = number of teachers v is paired with

Shapes: V views (the first G are global), B images, K prototypes, D bottleneck;
z [V, B, D], W [K, D], b [K], p [G, B, K].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

MAX_CHUNK_LOGITS = 2**22
"""Logits held at a time on a CPU: 16 MiB stay in its caches, and the allocator keeps blocks under 32 MiB for reuse."""
MAX_CHUNK_LOGITS_GPU = 2**30


class ObjectiveConfig(BaseModel):
    """The loss between student and teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Literal["cross_entropy"] = "cross_entropy"
    student_temperature: float = Field(default=0.1, gt=0)
    """tau_s (DINO section 3.2)."""


def multi_view_cross_entropy(
    student: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float
) -> Tensor:
    """Mean over pairs and images of the cross-entropy of `target` against the student's logits; a scalar.

    Args:
        student: bottleneck outputs [V, B, D], global views first.
        weight: prototypes [K, D].
        bias: log-normalisers [K] at the student's temperature, or None.
        target: teacher probabilities [G, B, K]; every row sums to one and carries no gradient.
        temperature: tau_s.
    """
    num_views, batch, dim = student.shape
    num_teachers = target.shape[0]
    # A global view is paired with every teacher view but its own, a local one with all of them.
    paired = torch.full((num_views, 1), float(num_teachers), device=student.device, dtype=weight.dtype)
    paired[:num_teachers] -= 1
    log_sum = _WeightedLogSumExp.apply(
        student.reshape(-1, dim), weight, bias, temperature, paired.expand(-1, batch).reshape(-1)
    )
    expected = (target.to(weight.dtype).flatten(0, 1) @ weight).view(num_teachers, batch, dim)  # m_g
    partners = student.sum(0) - student[:num_teachers]  # a_g
    agreement = (partners * expected).sum() / temperature
    if bias is not None:
        agreement = agreement + (num_views - 1) * (target.sum((0, 1)).to(bias.dtype) @ bias)
    return (log_sum - agreement) / (num_teachers * (num_views - 1) * batch)


class _WeightedLogSumExp(torch.autograd.Function):
    """sum_r c_r LSE_k(z_r . w_k / tau + b_k), in chunks of rows.

    The gradients are formed in the forward pass, while a chunk of logits is at hand: no logits are kept for the
    backward pass and each is touched once.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, counts: Tensor) -> Tensor:
        low = torch.get_autocast_dtype(z.device.type) if torch.is_autocast_enabled(z.device.type) else z.dtype
        with torch.autocast(z.device.type, enabled=False):
            total = counts.new_zeros(())
            scaled, weight_low = z / temperature, weight.to(low)
            dz, dw = torch.empty_like(z), torch.empty_like(weight)
            db = torch.zeros_like(bias) if bias is not None else None
            chunk = max(1, (MAX_CHUNK_LOGITS_GPU if z.is_cuda else MAX_CHUNK_LOGITS) // weight.shape[0])
            for start in range(0, len(z), chunk):
                part = slice(start, start + chunk)
                logits = (scaled[part].to(low) @ weight_low.T).to(weight.dtype)
                if bias is not None:
                    logits += bias
                top = logits.amax(1, keepdim=True)
                soft = logits.sub_(top).exp_()  # divided by its sum below, in rows of D values instead of K
                mass = soft.sum(1, keepdim=True)
                total += counts[part] @ (mass.log() + top).squeeze(1)
                share = counts[part, None] / mass
                soft_low, rows = soft.to(low), (scaled[part] * share).to(low)
                dz[part] = (soft_low @ weight_low).to(dz.dtype) * (share / temperature)
                if low == dw.dtype:
                    dw.addmm_(soft.T, rows, beta=float(start > 0))
                else:
                    product = soft_low.T @ rows
                    dw = dw.add_(product) if start else product.to(dw.dtype)
                if db is not None:
                    db += share.squeeze(1) @ soft
            ctx.save_for_backward(dz, dw, db)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        dz, dw, db = ctx.saved_tensors
        (grad,) = grads
        return dz * grad, dw * grad, None if db is None else db * grad, None, None
