"""The teacher: an exponential moving average (EMA) of the student's parameters (DINO section 3.1)."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn


class TeacherConfig(BaseModel):
    """Momentum of the EMA, a cosine from `momentum` to `momentum_end` over the training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    momentum: float = Field(default=0.996, ge=0, le=1)
    """0.996 for batch 1024; the official help advises 0.9995 for batch 256."""
    momentum_end: float = Field(default=1.0, ge=0, le=1)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameters only (buffers are the teacher's own)."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)


def freeze(teacher: nn.Module) -> None:
    """No gradient reaches the teacher. It stays in train mode: BatchNorm in the head uses batch statistics."""
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
