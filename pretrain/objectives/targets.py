"""The teacher's targets: a softmax over K prototypes, centred so that no prototype can take every image.

Notation: z = untempered teacher logits <w_k, y>, l = z / tau_t + log C_p(||w_k|| / tau_t) (log C_p only with vMF
prototypes), c = centre, m = momentum, r = a row (image or patch), R rows over all ranks.

    logit             p = softmax((z - c) / tau_t + log C_p)   c <- m c + (1 - m) mean_r z       DINO eq. 4
    prob_logmean_ema  p = softmax(l - c)                       c <- m c + (1 - m) log mean_r softmax(l)     DINO-vMF
    prob_ema_log      p = softmax(l - c)                       c <- log( m e^c + (1 - m) mean_r softmax(l) )
    sinkhorn          p = softmax(l + log u)                   u of this batch alone: u_k v_r e^l_rk has row sums 1
                                                               and, before the last row step, column sums R / K
    softmax_batch     sinkhorn with one iteration              DINO table 15: softmax over the batch, then over k
    none              p = softmax(l)

The centre used at a step is the one before that step's batch. The mean probability is formed by log-sum-exp: with
K = 65536 a plain mean underflows for unused prototypes and log 0 would poison the average for ever.
Sinkhorn-Knopp keeps no centre: it finds one in the batch (DINOv2 `sinkhorn_knopp_teacher`, SwAV appendix).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pretrain.training import runtime

Centring = Literal["logit", "prob_logmean_ema", "prob_ema_log", "sinkhorn", "softmax_batch", "none"]


class TargetConfig(BaseModel):
    """How the teacher's output becomes a target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    centring: Centring = "logit"
    momentum: float = Field(default=0.9, ge=0, le=1)
    """m of the centre (DINO: 0.9, fixed in the code)."""
    iterations: int = Field(default=3, ge=1)
    """Of Sinkhorn-Knopp, the only rule that reads it (DINOv2: 3, fixed in the code)."""
    temperature: float = Field(default=0.04, gt=0)
    """tau_t after the warm-up; the released ViTs used 0.07."""
    warmup_temperature: float = Field(default=0.04, gt=0)
    """tau_t at step 0; has no effect while warmup_epochs is 0."""
    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs over which tau_t goes linearly from warmup_temperature to temperature."""
    warmup_unit: Literal["epoch", "step"] = "epoch"
    """How often tau_t changes during the warm-up: once an epoch (DINO, iBOT) or at every step (DINOv2)."""


class Target(nn.Module):
    """Centres teacher logits and turns them into probabilities; `update` then moves the centre, where one is kept.

    Every rank must make the same calls in the same order, with as many rows as it has, none included.
    """

    center: Tensor
    statistic: Tensor

    def __init__(self, config: TargetConfig, num_prototypes: int):
        super().__init__()
        self.centring, self.momentum = config.centring, config.momentum
        self.iterations = config.iterations if config.centring == "sinkhorn" else 1
        # The EMA of the mean probability starts at the uniform distribution.
        start = -math.log(num_prototypes) if config.centring == "prob_ema_log" else 0.0
        self.register_buffer("center", torch.full((num_prototypes,), start))
        # Sum over the rows seen since the last update (in the log domain for the prob_ forms), and their number.
        self.empty = -math.inf if config.centring.startswith("prob_") else 0.0
        self.register_buffer("statistic", torch.full((num_prototypes,), self.empty), persistent=False)
        self.num_rows = 0
        self._arriving: Callable[[], Tensor] | None = None
        self.register_state_dict_pre_hook(_settle)
        self.register_load_state_dict_pre_hook(_settle)

    @property
    def has_memory(self) -> bool:
        """Whether a centre is kept from one step to the next."""
        return self.centring in ("logit", "prob_logmean_ema", "prob_ema_log")

    @property
    def couples_rows(self) -> bool:
        """Whether the target of a row depends on the others of the batch, so that they cannot be made one by one."""
        return self.centring in ("sinkhorn", "softmax_batch")

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float, log_normaliser: Tensor | None = None) -> Tensor:
        """Untempered teacher logits [R, K] -> probabilities [R, K]; remembers what `update` needs."""
        return self.centred(logits, temperature, log_normaliser).softmax(-1)

    @torch.no_grad()
    def centred(
        self, logits: Tensor, temperature: float, log_normaliser: Tensor | None = None, *, remember: bool = True
    ) -> Tensor:
        """The argument of the softmax, [R, K]: tempered, normalised, centred.

        Remembers what `update` needs, unless `remember` is False: then the rows do not enter the centre (iBOT's
        masked patches, whose centre is fed by `remember_mean`). Sinkhorn-Knopp balances the rows of one call.
        """
        logits = logits.to(torch.promote_types(logits.dtype, self.center.dtype))
        tempered = _tempered(logits, temperature, log_normaliser)
        if remember:
            self._remember_rows(logits, tempered)
        if self.centring == "none":
            return tempered
        if self.couples_rows:
            return tempered.add_(sinkhorn_potentials(tempered, self.iterations))
        self.settle()
        return tempered.sub_(self.center / temperature if self.centring == "logit" else self.center)

    @torch.no_grad()
    def remember(self, logits: Tensor, temperature: float, log_normaliser: Tensor | None = None) -> None:
        """Let rows of untempered logits [R, K] enter the centre, where one is kept, without making targets of them."""
        logits = logits.to(torch.promote_types(logits.dtype, self.center.dtype))
        self._remember_rows(logits, _tempered(logits, temperature, log_normaliser))

    @torch.no_grad()
    def remember_mean(self, mean_logits: Tensor, num_rows: int) -> None:
        """Let `num_rows` rows with mean untempered logits [K] enter the centre without forming their logits.

        The mean of logits is the mean bottleneck output times the prototypes, so the centre over all patches (iBOT)
        costs one row. Nothing happens where no centre is kept.

        Raises:
            ValueError: with a prob_ centring, whose mean probability does not follow from the mean of the logits.
        """
        if self.centring.startswith("prob_"):
            raise ValueError(
                f"target.centring={self.centring} averages probabilities, which the mean of the logits does not give: "
                "pass the rows themselves to `centred`"
            )
        if self.has_memory:
            self._remember(mean_logits * num_rows if num_rows else torch.zeros_like(mean_logits), num_rows)

    @torch.no_grad()
    def update(self) -> None:
        """Move the centre by all rows seen since the last call, over all ranks; with no row anywhere it stays.

        What the ranks saw travels between them during the next step: the centre moves when it is next used or saved,
        or at `settle`. On one rank it moves at once.
        """
        if not self.has_memory:
            return
        self.settle()
        count = torch.full_like(self.statistic[:1], self.num_rows)
        if self.centring == "logit":
            self._arriving = runtime.begin_sum(torch.cat([self.statistic, count]))
        else:
            self._arriving = runtime.begin_logsumexp(torch.cat([self.statistic, count.log()]))
        self.statistic.fill_(self.empty)
        self.num_rows = 0
        if runtime.world_size() == 1:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Wait for what `update` sent to the other ranks, and move the centre. No rank waits for another's call."""
        if self._arriving is None:
            return
        total, m = self._arriving(), self.momentum
        self._arriving = None
        if self.centring == "logit":
            mean, seen = total[:-1] / total[-1], total[-1] > 0
            new = m * self.center + (1 - m) * mean
        else:
            log_mean, seen = total[:-1] - total[-1], total[-1] > -math.inf
            if self.centring == "prob_logmean_ema":
                new = m * self.center + (1 - m) * log_mean
            else:
                old = self.center + (math.log(m) if m > 0 else -math.inf)
                new = torch.logaddexp(old, log_mean + (math.log(1 - m) if m < 1 else -math.inf))
        self.center.copy_(torch.where(seen, new, self.center))

    def _remember_rows(self, logits: Tensor, tempered: Tensor) -> None:
        if self.centring == "logit":
            self._remember(logits.sum(0), len(logits))
        elif self.has_memory:
            self._remember(tempered.log_softmax(-1).logsumexp(0), len(logits))

    def _remember(self, statistic: Tensor, num_rows: int) -> None:
        if self.centring == "logit":
            self.statistic.add_(statistic)
        else:
            self.statistic.copy_(torch.logaddexp(self.statistic, statistic))
        self.num_rows += num_rows


def _settle(target: Target, *_: object) -> None:
    """Before a state is read or replaced."""
    target.settle()


def _tempered(logits: Tensor, temperature: float, log_normaliser: Tensor | None) -> Tensor:
    """A new tensor l = z / tau + log C_p."""
    tempered = logits / temperature
    return tempered if log_normaliser is None else tempered.add_(log_normaliser)


@torch.no_grad()
def sinkhorn_potentials(logits: Tensor, iterations: int) -> Tensor:
    """log u [K] such that softmax(logits + log u) is Sinkhorn-Knopp's answer for the rows of all ranks.

    Args:
        logits: tempered logits [R, K] of this rank; R may differ between ranks and be 0.
        iterations: column step (each prototype 1/K of the mass) then row step (each sample sums to one), repeated.

    The matrix is scaled by vectors, Q_rk = u_k e^l_rk v_r, two products a step, instead of being rewritten. Constant
    factors (K, R) cancel in the softmax; so does the row maximum, taken out of the exponential so that no row
    underflows (the official code takes out nothing and overflows for l > 88). A prototype no sample comes near has a
    column sum of 0 (official: NaN); it is raised to the smallest normal number, and its targets stay close to 0.
    """
    # Autocast would round the products to bfloat16.
    with torch.autocast(logits.device.type, enabled=False):
        row_top = logits.amax(1)
        top = runtime.all_reduce_max(torch.cat([row_top, row_top.new_full((1,), -math.inf)]).amax(0))
        kernel = (logits - row_top[:, None]).exp_()
        tiny = torch.finfo(kernel.dtype).tiny

        def column_step(v: Tensor) -> Tensor:
            # The sum over v keeps the scale of u, which would otherwise drift by R / K at every step.
            sums = runtime.all_reduce_sum(torch.cat([v @ kernel, v.sum()[None]]))
            return (sums[:-1] / sums[-1].clamp_min(tiny)).clamp_min(tiny).reciprocal()

        u = column_step((row_top - top).exp_())
        for _ in range(iterations - 1):  # the last row step is the softmax
            u = column_step((kernel @ u).reciprocal())  # a row's largest entry is 1: its sum is never 0
    return u.log()
