"""Schedules as arrays, one value per step (or per epoch), exactly as the official code computes them.

Source: facebookresearch/dino@7c446df `utils.cosine_scheduler` and `main_dino.DINOLoss`. Three facts that surprise:
the first warm-up value is exactly `start` (a learning rate of 0 at step 0), the peak occurs twice, and the final
value is never reached.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pretrain.errors import UsageError


class ScheduleConfig(BaseModel):
    """How long to train, in epochs of the training set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=100, ge=1)
    """DINO default (main_dino.py); the released ViT-S/16 used 800."""
    warmup_epochs: int = Field(default=10, ge=0)
    """Linear learning-rate warm-up."""


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


def teacher_temperature(warmup: float, final: float, warmup_epochs: int, epochs: int) -> np.ndarray:
    """One temperature per epoch: linear over `warmup_epochs` (both ends included), then constant: float64 [epochs].

    Raises:
        UsageError: the warm-up is longer than the training (the official code fails there with a negative size).
    """
    if warmup_epochs > epochs:
        raise UsageError(
            f"target.warmup_epochs={warmup_epochs} is longer than the training of {epochs} epochs: "
            "lower it or raise schedule.epochs"
        )
    return np.concatenate([np.linspace(warmup, final, warmup_epochs), np.full(epochs - warmup_epochs, final)])


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
