"""The teacher: a network that follows the student's parameters (DINO section 3.1 and Figure 6).

ema                 theta_t <- m theta_t + (1 - m) theta_s after every step      DINO
previous_iteration  the student as it was one step ago
previous_epoch      the student as it was at the end of the last epoch
student_copy        the student as it is now, in a network of its own ("no momentum")
none                no second network: the student makes the targets, without gradient (SwAV)
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pretrain.training.sharding import local_part


class TeacherConfig(BaseModel):
    """How the teacher follows; the momentum of `ema` is a cosine from `momentum` to `momentum_end`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ema", "previous_iteration", "previous_epoch", "student_copy", "none"] = "ema"
    momentum: float = Field(default=0.996, ge=0, le=1)
    """0.996 for batch 1024; the official help advises 0.9995 for batch 256."""
    momentum_end: float = Field(default=1.0, ge=0, le=1)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, parameters only (buffers are the teacher's own).

    What only the student has (predictor, mask token) is left out.
    """
    torch._foreach_lerp_(*_pairs(teacher, student), 1.0 - momentum)


@torch.no_grad()
def copy_student(teacher: nn.Module, student: nn.Module) -> None:
    """teacher <- student, parameters only, bit by bit."""
    torch._foreach_copy_(*_pairs(teacher, student))


def start_teacher(teacher: nn.Module, student: nn.Module) -> None:
    """The teacher starts as the student, buffers included, and no gradient reaches it.

    It stays in train mode: BatchNorm in the head uses batch statistics.
    """
    own = teacher.state_dict().keys()
    teacher.load_state_dict({name: value for name, value in student.state_dict().items() if name in own})
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)


def _pairs(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    followed = dict(student.named_parameters())
    names, parameters = zip(*teacher.named_parameters(), strict=True)
    return [local_part(parameter) for parameter in parameters], [local_part(followed[name]) for name in names]
