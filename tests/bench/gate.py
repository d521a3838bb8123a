"""No gate, no number: before anything is timed, a contestant has done the same step as another one.

Both start from the same weights, without stochastic depth, and take one step on the same crops. The loss, the gradient
of each tensor and the teacher must then agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from pretrain.data.loader import Batch

LOSS_TOLERANCE = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}
"""Relative."""
SMALLEST_COSINE = 0.999
"""Of any tensor. In bf16 those of a ViT-S are 0.9999 or more."""
TEACHER_TOLERANCE = 1e-6


class Contestant(Protocol):
    """Something that trains: parameters of student and teacher have the same names everywhere."""

    @property
    def student(self) -> nn.Module: ...
    @property
    def teacher(self) -> nn.Module: ...
    def step(self, batch: Batch) -> None:
        """One optimiser step."""

    def first_loss(self) -> float:
        """The loss of the first step; waits for the device."""
        ...


class Unequal(SystemExit):
    """The steps are not the same: no time is worth printing."""


@dataclasses.dataclass
class Expected:
    """What one step of a trusted contestant did: where it started and what came out."""

    batch: Batch
    weights: tuple[dict[str, Tensor], dict[str, Tensor]]
    loss: float
    gradients: dict[str, Tensor]
    teacher: dict[str, Tensor]

    @classmethod
    def of(cls, contestant: Contestant, batch: Batch) -> Expected:
        """Take the step."""
        weights = _copy(contestant.student.state_dict()), _copy(contestant.teacher.state_dict())
        with exact_products():
            contestant.step(batch)
        teacher = _copy(dict(contestant.teacher.named_parameters()))
        return cls(batch, weights, contestant.first_loss(), gradients(contestant.student), teacher)

    def check(self, found: Contestant, precision: str) -> dict[str, float]:
        """How far `found` is from it after one step from the same weights.

        Raises:
            Unequal: further than the tolerances of the precision allow.
        """
        for network, weights in zip((found.student, found.teacher), self.weights, strict=True):
            load(network, weights)
        with exact_products():
            found.step(self.batch)
        ours = gradients(found.student)
        if ours.keys() != self.gradients.keys():
            raise Unequal(
                f"gradients on one side only, nothing was timed: {sorted(ours.keys() ^ self.gradients.keys())}"
            )
        cosines = [_cosine(self.gradients[name], gradient) for name, gradient in ours.items()]
        teacher = dict(found.teacher.named_parameters())
        moved = [(teacher[name] - value).abs().max().item() for name, value in self.teacher.items()]
        differing = {
            "loss_difference": abs(found.first_loss() - self.loss) / abs(self.loss),
            "gradient_cosine": torch.tensor(cosines).min().item(),
            "teacher_difference": torch.tensor(moved).max().item(),
        }
        # Written so that a NaN fails too; torch's min and max keep it.
        equal = (
            differing["loss_difference"] <= LOSS_TOLERANCE[precision]
            and differing["gradient_cosine"] >= SMALLEST_COSINE
            and differing["teacher_difference"] <= TEACHER_TOLERANCE
        )
        if not equal:
            raise Unequal(f"not the same step in {precision}, nothing was timed: {differing}")
        return differing


def load(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put weights into a network of the same parameters; magnitudes that it does not keep are 1 everywhere.

    Raises:
        Unequal: the names are not the same.
    """
    result = network.load_state_dict(weights, strict=False)
    missing = [name for name in result.missing_keys if "weight_g" not in name]
    if missing or result.unexpected_keys:
        raise Unequal(f"weights do not map: missing {missing}, unexpected {result.unexpected_keys}")


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient there is."""
    return {name: p.grad.detach().clone() for name, p in network.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in float32: TF32 would show as a difference."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _cosine(a: Tensor, b: Tensor) -> float:
    """Between two tensors, each seen as one vector, in float64 (clipping scales them alike)."""
    return nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()
