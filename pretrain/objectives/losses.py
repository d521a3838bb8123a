"""Soft-target cross-entropy between views over K prototypes, without the loop over pairs.

DINO sums -p_g . log q_v over all pairs (teacher view g, student view v), v != g. The sum over g moves inside, so that
each student view needs one log-sum-exp and the teacher meets the student in one product of p-dimensional vectors:

    loss = (1/n) [ sum_v c_v LSE(s_v) - sum_g <a_g, m_g>/tau - (V-1) sum_g p_g . b ]
    s_v = z_v W^T / tau + b      m_g = p_g W      a_g = sum_v z_v - z_g      c_v = number of teachers v is paired with

Any other set of pairs C [G, V] of zeros and ones changes a_g, c_v and n only. A masked patch has one target and one
student vector, so its loss is the same sum with one pair per row.

Shapes: V views (the first G are global), B images, K prototypes, D bottleneck;
z [V, B, D], W [K, D], b [K], p [G, B, K]; M masked patches of all crops.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

MAX_CHUNK_LOGITS = 2**23
"""Logits held at a time on a CPU, 32 MiB: more rows to a product are faster than fewer that stay in its caches."""
MAX_CHUNK_LOGITS_GPU = 2**30
LIVE_LOGITS = {"cross_entropy": 2, "mse": 6}
"""Tensors of one value per logit that a loss and its targets hold at a time, per student and teacher row, at most."""


class ObjectiveConfig(BaseModel):
    """The loss between student and teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    """Between the class tokens: cross-entropy (DINO eq. 2), or the squared distance of DINO table 7, row MSE."""
    predictor: bool = False
    """An MLP in the student only, between projection and normalisation, as in BYOL (DINO table 7, row + predictor)."""
    image_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss between class tokens beside a loss between patches (iBOT's lambda_1)."""
    student_temperature: float = Field(default=0.1, gt=0)
    """tau_s (DINO section 3.2)."""


def multi_view_cross_entropy(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    pairs: Tensor | None = None,
) -> Tensor:
    """Mean over pairs and images of the cross-entropy of `target` against the student's logits; a scalar.

    Args:
        student: bottleneck outputs [V, B, D], global views first.
        weight: prototypes [K, D].
        bias: log-normalisers [K] at the student's temperature, or None.
        target: teacher probabilities [G, B, K]; every row sums to one and carries no gradient.
        temperature: tau_s.
        pairs: [G, V] of zeros and ones, which pairs count; by default all but those of a view with itself (g = v).
    """
    num_views, batch, dim = student.shape
    num_teachers = target.shape[0]
    if pairs is None:
        # A global view is paired with every teacher view but its own, a local one with all of them.
        views_each, count = weight.new_full((num_teachers, 1), num_views - 1.0), num_teachers * (num_views - 1)
        paired = weight.new_full((num_views, 1), float(num_teachers))
        paired[:num_teachers] -= 1
        partners = student.sum(0) - student[:num_teachers]  # a_g
    else:
        pairs = pairs.to(weight.dtype)
        views_each, count = pairs.sum(1, keepdim=True), pairs.sum()
        paired = pairs.sum(0)[:, None]
        partners = (pairs[..., None, None] * student).sum(1)
    total = _SoftCrossEntropy.apply(
        student.reshape(-1, dim),
        partners.reshape(-1, dim),
        weight,
        bias,
        target.flatten(0, 1),
        temperature,
        paired.expand(-1, batch).reshape(-1),
        views_each.expand(-1, batch).reshape(-1),
    )
    return total / (count * batch)


def masked_cross_entropy(
    student: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    row_weight: Tensor,
    num_crops: int,
) -> Tensor:
    """-(1 / num_crops) sum_m w_m p_m . log q_m over the masked patches of all crops (iBOT eq. 2); a scalar.

    With w_m = 1 / (masked patches of m's crop) it is the mean over crops, unmasked ones included, of the mean over a
    crop's masked patches (iBOT `iBOTLoss`, DINOv2 `iBOTPatchLoss`).

    Args:
        student: bottleneck outputs of the masked patches [M, D]; with M = 0 the loss is a zero with a graph, so that
            every parameter gets a gradient on every rank.
        weight: prototypes [K, D].
        bias: log-normalisers [K] at the student's temperature, or None.
        target: teacher probabilities of the same patches, unmasked [M, K]; rows sum to one and carry no gradient.
        temperature: tau_s.
        row_weight: w_m [M].
        num_crops: global crops of this rank's batch, masked or not.
    """
    row_weight = row_weight.to(weight.dtype)
    partners = student * row_weight[:, None]
    total = _SoftCrossEntropy.apply(student, partners, weight, bias, target, temperature, row_weight, row_weight)
    return total / num_crops


def multi_view_mse(student: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, temperature: float) -> Tensor:
    """Mean over pairs (g != v) and images of sum_k (p_k - q_k)^2 between softmaxes; a scalar.

    The consistency cost of Mean Teacher (Tarvainen & Valpola 2017), DINO table 7 row MSE. Arguments as
    `multi_view_cross_entropy`. Keeps the student's probabilities [V, B, K] for the backward pass.
    """
    logits = (student / temperature) @ weight.T
    logits = logits.to(weight.dtype) if bias is None else logits + bias
    student_probabilities = logits.softmax(-1)
    total = student_probabilities.new_zeros(())
    for g, probabilities in enumerate(target):
        distance = (student_probabilities - probabilities).square().sum((1, 2))
        total = total + distance.sum() - distance[g]
    return total / (len(target) * (len(student) - 1) * student.shape[1])


def max_chunk_logits(device: torch.device) -> int:
    """How many logits to hold at a time where they are formed in parts."""
    return MAX_CHUNK_LOGITS_GPU if device.type == "cuda" else MAX_CHUNK_LOGITS


class _SoftCrossEntropy(torch.autograd.Function):
    """sum_r c_r LSE_k(z_r . w_k / tau + b_k) - sum_t (a_t . m_t / tau + n_t p_t . b) with m_t = p_t W.

    The gradients are formed in the forward pass, while a chunk of rows' logits is at hand: no logits are kept for the
    backward pass, each is touched once, and both terms are added up in one gradient of W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        partners: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: float,
        counts: Tensor,
        partners_each: Tensor,
    ) -> Tensor:
        low = torch.get_autocast_dtype(z.device.type) if torch.is_autocast_enabled(z.device.type) else z.dtype
        with torch.autocast(z.device.type, enabled=False):
            scaled, weight_low, target_low = z / temperature, weight.to(low), target.to(low)
            expected = (target_low @ weight_low).to(weight.dtype) / -temperature
            total = (partners * expected).sum()
            dw = (target_low.T @ (partners / -temperature).to(low)).to(weight.dtype)
            db = None
            if bias is not None:
                db = -(partners_each @ target.to(weight.dtype))
                total += db @ bias
            dz = torch.empty_like(z)
            chunk = max(1, max_chunk_logits(z.device) // weight.shape[0])
            # One for all chunks. Logits lie as [K, r]: all three products then go through W as it lies in memory.
            buffer = z.new_empty(min(chunk, len(z)) * weight.shape[0], dtype=low)
            for start in range(0, len(z), chunk):
                part = slice(start, start + chunk)
                rows = scaled[part].to(low)
                place = buffer[: len(rows) * weight.shape[0]].view(-1, len(rows))
                logits = torch.mm(weight_low, rows.T, out=place).to(weight.dtype)
                if bias is not None:
                    logits += bias[:, None]
                top = logits.amax(0)
                soft = logits.sub_(top).exp_()  # divided by its sum below, in rows of D values instead of K
                mass = soft.sum(0)
                total += counts[part] @ (mass.log() + top)
                share = counts[part] / mass
                soft_low, rows = soft.to(low), (scaled[part] * share[:, None]).to(low)
                dz[part] = (soft_low.T @ weight_low).to(dz.dtype) * (share / temperature)[:, None]
                if low == dw.dtype:
                    dw.addmm_(soft, rows)
                else:
                    dw += soft_low @ rows
                if db is not None:
                    db += soft @ share
            ctx.save_for_backward(dz, expected, dw, db)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dz, da, dw, db = ctx.saved_tensors
        (grad,) = grads
        return dz * grad, da * grad, dw * grad, None if db is None else db * grad, None, None, None, None
