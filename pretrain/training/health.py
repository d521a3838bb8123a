"""Live health of a training: is the teacher saying something, and not the same thing to every image?

Per batch of teacher targets p [R, K] (R rows, K prototypes), in nats:
    H   mean entropy of the targets           Hm  entropy of the mean target        I = Hm - H
A target is informative when H is low and Hm is high. Collapse is
    uniform    H > .99 ln K and I < .01 ln K          every target is flat
    constant   I < .01 ln K with a lower H            every image gets the same target
    features   feature standard deviation near 0      every image gets the same feature
and is called only after the warm-up and on several intervals in a row: loss = ln K at step 0 is normal.
Sums stay on the device; the host reads them once per logging interval.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pretrain.objectives import prototype_usage

PATIENCE = 3
"""Intervals in a row that must look collapsed before a verdict."""
MIN_FEATURE_STD = 0.01
"""Standard deviation of L2-normalised features, times sqrt(D): 1 for isotropic features, 0 when all are equal."""


class Health(nn.Module):
    """Sums over one logging interval; its buffers are saved with a checkpoint so that a resumed log is the same."""

    sum_target: Tensor
    sum_entropy: Tensor
    sum_loss: Tensor
    usage: Tensor
    rows: Tensor
    steps: Tensor
    first_bad_step: Tensor

    def __init__(self, num_prototypes: int):
        super().__init__()
        self.num_prototypes = num_prototypes
        self.suspicious: dict[str, int] = {}
        for name, shape in {"sum_target": num_prototypes, "usage": num_prototypes}.items():
            self.register_buffer(name, torch.zeros(shape))
        for name in ("sum_entropy", "sum_loss", "rows", "steps"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("first_bad_step", torch.full((), -1.0))
        self.features = torch.zeros(0)

    def get_extra_state(self) -> dict[str, int]:
        """The count of suspicious intervals: a resumed run reaches its verdict when the uninterrupted one does."""
        return dict(self.suspicious)

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore what `get_extra_state` gave."""
        self.suspicious = dict(state)

    @torch.no_grad()
    def observe(self, target: Tensor, logits: Tensor, features: Tensor) -> None:
        """Add one micro-batch: targets [R, K], the logits they are the softmax of, and the teacher's features [R, D].

        The entropy is formed from both, H = LSE(l) - p . l: a logarithm of every p would be the slowest thing here.
        """
        best = target.argmax(1, keepdim=True)
        log_sum = logits.gather(1, best) - target.gather(1, best).log()
        self.sum_entropy += log_sum.sum() - (target * logits).sum()
        self.sum_target += target.sum(0)
        self.usage.scatter_add_(0, best.squeeze(1), torch.ones_like(self.usage[:1]).expand(len(target)))
        self.rows += len(target)
        self.features = features.detach()

    @torch.no_grad()
    def observe_loss(self, loss: Tensor, step: int) -> None:
        """Add the loss of a step and note, on the device, the first step at which it was not finite."""
        bad = ~torch.isfinite(loss) & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(bad, float(step))
        self.sum_loss += loss.detach()
        self.steps += 1

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """The interval's metrics as floats; waits for the device and starts a new interval."""
        log_k = math.log(self.num_prototypes)
        mean_target = self.sum_target / self.rows
        entropy, mean_entropy = self.sum_entropy / self.rows, torch.special.entr(mean_target).sum()
        loss = self.sum_loss / self.steps
        std, rank = feature_spread(self.features)
        values = {
            "loss/total": loss,
            "loss/over_lnK": loss / log_k,
            "loss/kl": loss - entropy,
            "health/target_entropy": entropy,
            "health/mean_target_entropy": mean_entropy,
            "health/information": mean_entropy - entropy,
            "health/feature_std": std,
            "health/effective_rank": rank,
            "prototypes/usage_entropy": prototype_usage.usage_entropy(self.usage),
            "prototypes/used": (self.usage > 0).sum(),
            "prototypes/rows": self.rows,
        }
        # One transfer for all of them.
        metrics = dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))
        for buffer in (self.sum_target, self.usage, self.sum_entropy, self.sum_loss, self.rows, self.steps):
            buffer.zero_()
        return metrics

    def verdict(self, metrics: dict[str, float]) -> str | None:
        """The name of a collapse seen on PATIENCE intervals in a row, or None. Call only after the warm-up."""
        states = collapse_states(metrics, self.num_prototypes)
        self.suspicious = {state: self.suspicious.get(state, 0) + 1 for state in states}
        return next((state for state, count in self.suspicious.items() if count >= PATIENCE), None)


def collapse_states(metrics: dict[str, float], num_prototypes: int) -> list[str]:
    """The collapse states that one interval's metrics look like (DESIGN: uniform, constant, features)."""
    log_k = math.log(num_prototypes)
    states = []
    if metrics["health/information"] < 0.01 * log_k:
        states.append("uniform" if metrics["health/target_entropy"] > 0.99 * log_k else "constant")
    if metrics["health/feature_std"] < MIN_FEATURE_STD:
        states.append("features")
    return states


def feature_spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """Spread of features [R, D]: mean standard deviation of the L2-normalised features times sqrt(D), and the
    effective rank exp(entropy of the normalised singular values) of the centred features (Roy & Vetterli 2007).
    """
    features = features.float().nan_to_num()  # a NaN is reported by the loss, not by the decomposition
    unit = nn.functional.normalize(features, dim=1)
    std = unit.std(0).mean() * features.shape[1] ** 0.5
    singular = torch.linalg.svdvals(features - features.mean(0))
    share = singular / singular.sum().clamp_min(1e-12)
    return std, torch.special.entr(share).sum().exp()
