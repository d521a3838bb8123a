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
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import DinobenchError
from pretrain.objectives import prototype_usage

PATIENCE = 3
"""Intervals in a row that must look collapsed before a verdict."""
MIN_FEATURE_STD = 0.03
"""Standard deviation of L2-normalised features, times sqrt(D): 1 for isotropic features, 0 when all are equal. On
digits trainings that learn stay above 0.09; a teacher that copies the student ends near 0.01 (results/collapse)."""


class TargetStatistics(nn.Module):
    """Sums over the targets [R, K] of one head in a logging interval."""

    sum_target: Tensor
    sum_entropy: Tensor
    usage: Tensor
    rows: Tensor

    def __init__(self, num_prototypes: int):
        super().__init__()
        self.num_prototypes = num_prototypes
        for name, shape in {
            "sum_target": num_prototypes,
            "usage": num_prototypes,
            "sum_entropy": (),
            "rows": (),
        }.items():
            self.register_buffer(name, torch.zeros(shape))

    @torch.no_grad()
    def observe(self, target: Tensor, logits: Tensor) -> None:
        """Add one micro-batch: targets [R, K] and the logits they are the softmax of.

        The entropy is formed from both, H = LSE(l) - p . l: a logarithm of every p would be the slowest thing here.
        """
        best = target.argmax(1, keepdim=True)
        log_sum = logits.gather(1, best) - target.gather(1, best).log()
        self.sum_entropy += log_sum.sum() - (target * logits).sum()
        self.sum_target += target.sum(0)
        self.usage.scatter_add_(0, best.squeeze(1), torch.ones_like(self.usage[:1]).expand(len(target)))
        self.rows += len(target)

    def read(self, health: str, prototypes: str) -> dict[str, Tensor]:
        """The metrics of the interval, named `<health>/...` and `<prototypes>/...`, still on the device."""
        rows = self.rows.clamp_min(1)  # before the first masks there are no patch targets
        entropy, mean_entropy = self.sum_entropy / rows, torch.special.entr(self.sum_target / rows).sum()
        return {
            f"{health}/target_entropy": entropy,
            f"{health}/mean_target_entropy": mean_entropy,
            f"{health}/information": mean_entropy - entropy,
            f"{prototypes}/usage_entropy": prototype_usage.usage_entropy(self.usage),
            f"{prototypes}/used": (self.usage > 0).sum(),
            f"{prototypes}/rows": self.rows.clone(),
        }


class Health(nn.Module):
    """Sums over one logging interval; its buffers are saved with a checkpoint so that a resumed log is the same.

    Args:
        num_prototypes: K of the image head; 0 for a method without prototypes.
        patch_prototypes: K' of the patch head; 0 for a method without patch loss.
        metrics: names of the scalars that the method's `loss` returns beside the loss.
        cross_entropy: the loss (or its part `loss/image`) is a cross-entropy, so that minus the entropy it is a KL.
    """

    sum_loss: Tensor
    sum_metrics: Tensor
    steps: Tensor
    first_bad_step: Tensor

    def __init__(
        self,
        num_prototypes: int = 0,
        *,
        patch_prototypes: int = 0,
        metrics: tuple[str, ...] = (),
        cross_entropy: bool = True,
    ):
        super().__init__()
        self.num_prototypes, self.metrics, self.cross_entropy = num_prototypes, metrics, cross_entropy
        self.image = TargetStatistics(num_prototypes) if num_prototypes else None
        self.patch = TargetStatistics(patch_prototypes) if patch_prototypes else None
        self.suspicious: dict[str, int] = {}
        self.register_buffer("sum_metrics", torch.zeros(len(metrics)))
        for name in ("sum_loss", "steps"):
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
        """Add one micro-batch: image targets [R, K], the logits they are the softmax of, and features [R, D]."""
        assert self.image is not None
        self.image.observe(target, logits)
        self.observe_features(features)

    def observe_features(self, features: Tensor) -> None:
        """Remember the last features [R, D]; their spread is read once per interval."""
        self.features = features.detach()

    @torch.no_grad()
    def observe_metrics(self, metrics: dict[str, Tensor], share: float) -> None:
        """Add what `loss` returned for a micro-batch that is `share` of the step.

        Raises:
            KeyError: the method did not return exactly the metrics it declared.
        """
        if self.metrics:
            self.sum_metrics += (
                torch.stack([metrics[name].detach().to(self.sum_metrics) for name in self.metrics]) * share
            )

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
        values = {"loss/total": self.sum_loss / self.steps}
        values |= dict(zip(self.metrics, (self.sum_metrics / self.steps).unbind(), strict=True))
        if self.image is not None:
            image = self.image.read("health", "prototypes")
            if self.cross_entropy:
                loss = values.get("loss/image", values["loss/total"])
                values["loss/over_lnK"] = loss / math.log(self.num_prototypes)
                values["loss/kl"] = loss - image["health/target_entropy"]
            values |= image
        if self.patch is not None:
            values |= self.patch.read("patch", "patch_prototypes")
        values["health/feature_std"], values["health/effective_rank"] = feature_spread(self.features)
        # One transfer for all of them.
        metrics = dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))
        for name, buffer in self.named_buffers():
            if name != "first_bad_step":
                buffer.zero_()
        return metrics

    def verdict(self, metrics: dict[str, float]) -> str | None:
        """The name of a collapse seen on PATIENCE intervals in a row, or None. Call only after the warm-up."""
        states = collapse_states(metrics, self.num_prototypes)
        self.suspicious = {state: self.suspicious.get(state, 0) + 1 for state in states}
        return next((state for state, count in self.suspicious.items() if count >= PATIENCE), None)


@torch.no_grad()
def refuse_non_finite(state: dict[str, Any], step: int) -> None:
    """Refuse weights and moments that hold a NaN or an infinity, before they can reach a checkpoint.

    The gradients of a step whose loss is finite may not be, and that shows in the loss of the next step only.

    Raises:
        DinobenchError: names the tensors.
    """
    named = list(_floats("", state))
    bad = [name for name, tensor in named if not tensor.isfinite().all()]
    if bad:
        raise DinobenchError(
            f"{len(bad)} of {len(named)} tensors of the weights and the optimiser are not finite after step {step}, "
            f"the first is {bad[0]}; the loss was, so it is the gradients that were not. The last good checkpoint is "
            "kept. Try a lower optim.lr, a smaller optim.clip or runtime.precision=fp32"
        )


def _floats(place: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors below a state, by their place in it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _floats(f"{place}.{key}" if place else str(key), item)
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield place, value


def collapse_states(metrics: dict[str, float], num_prototypes: int) -> list[str]:
    """The collapse states that one interval's metrics look like; without prototypes only that of the features."""
    states = []
    if num_prototypes:
        log_k = math.log(num_prototypes)
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
