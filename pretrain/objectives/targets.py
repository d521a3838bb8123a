"""The teacher's targets: a softmax over K prototypes, centred so that no prototype can take every image.

Notation: z = untempered teacher logits <w_k, y>, l = z / tau_t + log C_p(||w_k|| / tau_t) (log C_p only with vMF
prototypes), c = centre, m = momentum.

    logit             p = softmax((z - c) / tau_t + log C_p)   c <- m c + (1 - m) mean_b z       DINO eq. 4
    prob_logmean_ema  p = softmax(l - c)                       c <- m c + (1 - m) log mean_b softmax(l)     DINO-vMF
    prob_ema_log      p = softmax(l - c)                       c <- log( m e^c + (1 - m) mean_b softmax(l) )
    none              p = softmax(l)

The centre used at a step is the one before that step's batch. The mean probability is formed by log-sum-exp: with
K = 65536 a plain mean underflows for unused prototypes and log 0 would poison the average for ever.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pretrain.training import runtime


class TargetConfig(BaseModel):
    """How the teacher's output becomes a target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    centring: Literal["logit", "prob_logmean_ema", "prob_ema_log", "none"] = "logit"
    momentum: float = Field(default=0.9, ge=0, le=1)
    """m of the centre (DINO: 0.9, fixed in the code)."""
    temperature: float = Field(default=0.04, gt=0)
    """tau_t after the warm-up; the released ViTs used 0.07."""
    warmup_temperature: float = Field(default=0.04, gt=0)
    """tau_t at step 0; has no effect while warmup_epochs is 0."""
    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs over which tau_t goes linearly from warmup_temperature to temperature."""


class Target(nn.Module):
    """Centres teacher logits and turns them into probabilities; `update` then moves the centre."""

    center: Tensor
    statistic: Tensor

    def __init__(self, config: TargetConfig, num_prototypes: int):
        super().__init__()
        self.centring, self.momentum = config.centring, config.momentum
        # The EMA of the mean probability starts at the uniform distribution.
        start = -math.log(num_prototypes) if config.centring == "prob_ema_log" else 0.0
        self.register_buffer("center", torch.full((num_prototypes,), start))
        # Sum over the rows seen since the last update (in the log domain for the prob_ forms), and their number.
        self.register_buffer("statistic", torch.zeros(num_prototypes), persistent=False)
        self.num_rows = 0

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float, log_normaliser: Tensor | None = None) -> Tensor:
        """Untempered teacher logits [R, K] -> probabilities [R, K]; remembers what `update` needs."""
        return self.centred(logits, temperature, log_normaliser).softmax(-1)

    @torch.no_grad()
    def centred(self, logits: Tensor, temperature: float, log_normaliser: Tensor | None = None) -> Tensor:
        """The argument of the softmax, [R, K]: tempered, normalised, centred; remembers what `update` needs."""
        logits = logits.to(self.center.dtype)
        tempered = logits / temperature if log_normaliser is None else logits / temperature + log_normaliser
        if self.centring == "none":
            return tempered
        if self.centring == "logit":
            self._remember(logits.sum(0), len(logits))
            return tempered.sub_(self.center / temperature)
        self._remember(torch.log_softmax(tempered, dim=-1).logsumexp(0), len(logits))
        return tempered.sub_(self.center)

    @torch.no_grad()
    def update(self) -> None:
        """Move the centre by all rows seen since the last call, over all ranks."""
        if self.num_rows == 0:
            return
        rows = self.num_rows * runtime.world_size()
        m = self.momentum
        if self.centring == "logit":
            mean = runtime.all_reduce_sum(self.statistic) / rows
            self.center.mul_(m).add_(mean, alpha=1 - m)
        else:
            log_mean = runtime.all_reduce_logsumexp(self.statistic) - math.log(rows)
            if self.centring == "prob_logmean_ema":
                self.center.mul_(m).add_(log_mean, alpha=1 - m)
            else:
                old = self.center + (math.log(m) if m > 0 else -math.inf)
                new = log_mean + (math.log(1 - m) if m < 1 else -math.inf)
                self.center.copy_(torch.logaddexp(old, new))
        self.num_rows = 0

    def _remember(self, statistic: Tensor, num_rows: int) -> None:
        if self.num_rows == 0:
            self.statistic.copy_(statistic)
        elif self.centring == "logit":
            self.statistic.add_(statistic)
        else:
            self.statistic.copy_(torch.logaddexp(self.statistic, statistic))
        self.num_rows += num_rows
