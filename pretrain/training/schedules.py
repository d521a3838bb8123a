"""Schedules as arrays, one value per step (or per epoch), exactly as the official code computes them.

Source: facebookresearch/dino@7c446df `utils.cosine_scheduler` and `main_dino.DINOLoss`; facebookresearch/dinov2@b8931f7
`CosineScheduler`, which gives the same values. Three facts that surprise: the first warm-up value is exactly `start`
(a learning rate of 0 at step 0), the peak occurs twice, and the final value is never reached: DINOv2's scheduler gives
it for steps past the end, which no training here takes.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pretrain.errors import UsageError

if TYPE_CHECKING:
    from pretrain.objectives.targets import TargetConfig


class ScheduleConfig(BaseModel):
    """How long to train, in epochs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=100, ge=1)
    """DINO default (main_dino.py); the released ViT-S/16 used 800."""
    warmup_epochs: int = Field(default=10, ge=0)
    """Linear learning-rate warm-up."""
    steps_per_epoch: int = Field(default=0, ge=0)
    """0 = one pass over the training set; DINOv2 counts 1250 steps as an epoch whatever the data."""


def cosine(
    base: float, final: float, epochs: int, steps_per_epoch: int, warmup_epochs: int = 0, start: float = 0.0
) -> np.ndarray:
    """Linear warm-up from `start` to `base`, then half a cosine towards `final`: float64 [epochs * steps_per_epoch].

    Raises:
        UsageError: the warm-up is longer than the training.
    """
    total, warmup = epochs * steps_per_epoch, warmup_epochs * steps_per_epoch
    if warmup > total:
        raise UsageError(
            f"schedule.warmup_epochs={warmup_epochs} is longer than the training of {epochs} epochs: "
            "lower it or raise schedule.epochs"
        )
    steps = np.arange(total - warmup)
    decay = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / max(len(steps), 1)))
    return np.concatenate([np.linspace(start, base, warmup), decay])


def teacher_temperature(
    warmup: float, final: float, warmup_epochs: int, epochs: int, steps_per_epoch: int = 1
) -> np.ndarray:
    """Linear over the warm-up (both ends included), then constant: float64 [epochs * steps_per_epoch].

    DINO and iBOT have one temperature per epoch (`steps_per_epoch=1`), DINOv2 one per step.

    Raises:
        UsageError: the warm-up is longer than the training (the official DINO fails there with a negative size).
    """
    if warmup_epochs > epochs:
        raise UsageError(
            f"target.warmup_epochs={warmup_epochs} is longer than the training of {epochs} epochs: "
            "lower it or raise schedule.epochs"
        )
    rising = np.linspace(warmup, final, warmup_epochs * steps_per_epoch)
    return np.concatenate([rising, np.full((epochs - warmup_epochs) * steps_per_epoch, final)])


def teacher_temperatures(target: TargetConfig, plan: Plan, start_epoch: int = 0) -> np.ndarray:
    """tau_t of every step, float64 [total_steps]; for iBOT's patches the warm-up begins at `start_epoch`."""
    start_epoch = min(start_epoch, plan.epochs)
    per_step = target.warmup_unit == "step"
    rising = teacher_temperature(
        target.warmup_temperature,
        target.temperature,
        target.warmup_epochs,
        plan.epochs - start_epoch,
        plan.steps_per_epoch if per_step else 1,
    )
    waiting = np.full(start_epoch * plan.steps_per_epoch, target.warmup_temperature)
    return np.concatenate([waiting, rising if per_step else rising.repeat(plan.steps_per_epoch)])


@dataclasses.dataclass(frozen=True)
class Plan:
    """The length of a training in steps. `epoch(step)` is the epoch that step belongs to."""

    epochs: int
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch
