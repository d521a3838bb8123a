"""What a training shows of itself: metrics every logging interval, progress after every step, a verdict on collapse."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from pretrain.errors import CheckFailed, DinobenchError
from pretrain.objectives.prototype_usage import UNIQUE_THRESHOLD, unique_counts
from pretrain.training.recipe import Recipe
from pretrain.training.runtime import all_reduce_max
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer
from pretrain.training.waits import BatchWaits

_HEADS: dict[Literal["image", "patch"], str] = {"image": "prototypes", "patch": "patch_prototypes"}
FEW_PROTOTYPES = 4096
"""Up to so many, the unique ones are counted at every logging interval."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a training stands; loss is that of the last logging interval."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    learning_rate: float
    images_per_second: float
    eta_seconds: float
    note: str = ""
    data_wait: float = 0.0
    """Share of the time that the steps of the last logging interval spent waiting for their batches."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    status: Literal["finished", "interrupted"]
    step: int
    seconds: float
    images_per_second: float
    checkpoints: list[Path]
    note: str = ""
    limited_by: str = ""
    """The stage that limited its speed, in a sentence; empty where no interval was logged."""


class Meter:
    """Reads the metrics once per logging interval, and judges them."""

    def __init__(
        self,
        trainer: Trainer,
        plan: Plan,
        recipe: Recipe,
        waits: BatchWaits,
        log: Callable[[dict[str, float], int], None],
        progress: Callable[[Progress], None],
    ):
        self.trainer, self.plan, self.recipe = trainer, plan, recipe
        self._waits, self._log, self._progress = waits, log, progress
        self.started = self.interval_started = time.monotonic()
        self.steps = self.interval_steps = 0
        self.loss, self.rate, self.note, self.data_wait = float("nan"), 0.0, "", 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def mean_rate(self) -> float:
        """Images per second since the start."""
        return self.steps * self.recipe.optim.batch_size / self.seconds

    def outcome(self, status: Literal["finished", "interrupted"], step: int, kept: list[Path], note: str) -> Outcome:
        return Outcome(status, step, self.seconds, self.mean_rate, kept, note, self._waits.limit())

    def tick(self, step: int) -> None:
        """Count a finished step and show where we are; reads nothing from the device."""
        self.steps += 1
        self.interval_steps += 1
        rate = self.rate or self.mean_rate
        images_left = (self.plan.total_steps - step - 1) * self.recipe.optim.batch_size
        self._progress(
            Progress(
                step=step + 1,
                total_steps=self.plan.total_steps,
                epoch=self.plan.epoch(step),
                loss=self.loss,
                learning_rate=float(self.trainer.learning_rates[step]),
                images_per_second=rate,
                eta_seconds=images_left / rate,
                note=self.note,
                data_wait=self.data_wait,
            )
        )

    def log(self, step: int) -> None:
        """Read the device (the only wait in the loop), log, and judge."""
        self.refuse_non_finite()
        health = self.trainer.method.health
        metrics = {**health.read(), **self._norms(step), **self.trainer.values(step)}
        if self._few_prototypes():
            metrics |= self.unique_prototypes()
        now = time.monotonic()
        self.rate = self.interval_steps * self.recipe.optim.batch_size / (now - self.interval_started)
        self.interval_started, self.interval_steps = now, 0
        self.loss = metrics["loss/total"]
        metrics["speed/images_per_second"] = self.rate
        metrics |= self._data_waits()
        collapse = health.verdict(metrics) if self._warm(step) else None
        metrics["health/collapsed"] = float(collapse is not None)
        self._log(metrics, step + 1)
        self.note = f"collapse: {collapse}" if collapse else ""
        if collapse and self.recipe.runtime.stop_on_collapse:
            shown = ("health/target_entropy", "health/information", "health/feature_std")
            found = ", ".join(f"{name.split('/')[1]} {metrics[name]:.3f}" for name in shown if name in metrics)
            raise CheckFailed(
                f"the training collapsed ({collapse}) at step {step + 1}: {found}. Try a lower target.temperature, a "
                "longer warm-up or head.batch_norm=true"
            )

    def _data_waits(self) -> dict[str, float]:
        shares = self._waits.read()
        self.data_wait = shares.waiting
        return {"speed/data_wait_fraction": shares.waiting, "speed/decode_wait_fraction": shares.decoding}

    def refuse_non_finite(self) -> None:
        """Stop on a loss that is not finite, before it can reach a checkpoint."""
        first = int(all_reduce_max(self.trainer.method.health.first_bad_step))  # -1 on a rank that saw none
        if first >= 0:
            raise DinobenchError(
                f"loss/total is not finite since step {first + 1} (learning rate "
                f"{self.trainer.learning_rates[first]:.2e}). The last good checkpoint is kept. Try a "
                "lower optim.lr, a longer schedule.warmup_epochs, a smaller optim.clip or runtime.precision=fp32"
            )

    def unique_prototypes(self) -> dict[str, float]:
        """Different prototypes of each head over a sweep of cosine distances, and K over their number.

        It costs K^2 products: counted at checkpoints, and at every logging interval where K is small.
        """
        metrics = {}
        for head, name in _HEADS.items():
            prototypes = self.trainer.method.prototypes(head)
            if prototypes is None:
                continue
            counts = unique_counts(prototypes.vectors())
            metrics |= {f"{name}/unique_at_{distance:g}": float(count) for distance, count in counts.items()}
            metrics[f"{name}/unique"] = float(counts[UNIQUE_THRESHOLD])
            metrics[f"{name}/redundancy"] = prototypes.num / max(counts[UNIQUE_THRESHOLD], 1)
        return metrics

    def _few_prototypes(self) -> bool:
        heads = [self.trainer.method.prototypes(head) for head in _HEADS]
        return all(prototypes is None or prototypes.num <= FEW_PROTOTYPES for prototypes in heads)

    def _warm(self, step: int) -> bool:
        """Whether a verdict may be given: after the learning-rate warm-up and a fifth of the training."""
        warmup = max(self.recipe.schedule.warmup_epochs / self.plan.epochs, 0.2)
        return step + 1 > warmup * self.plan.total_steps

    def _norms(self, step: int) -> dict[str, float]:
        """Quantiles of the prototype norms of each head, and of their precisions kappa at the teacher's temperature."""
        temperature = self.trainer.method.teacher_temperature(step)
        metrics = {}
        for head, name in _HEADS.items():
            prototypes = self.trainer.method.prototypes(head)
            if prototypes is None or temperature is None:
                continue
            with torch.no_grad():
                norms = prototypes.norms().float()
                low, median, high = norms.quantile(torch.tensor([0.05, 0.5, 0.95], device=norms.device)).tolist()
            metrics |= {f"{name}/norm_q05": low, f"{name}/norm_q50": median, f"{name}/norm_q95": high}
            metrics[f"{name}/kappa_q50"] = median / temperature
        return metrics
