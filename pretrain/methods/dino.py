"""DINO: self-distillation with no labels (Caron et al., ICCV 2021, arXiv 2104.14294).

A student sees all V crops of an image, a teacher (EMA of the student) only the G = 2 global ones. Both map a crop to a
softmax over K prototypes; the student's is trained to match the teacher's of every *other* crop (eq. 3):

    min  sum_{g <= G} sum_{v != g}  -p_g . log q_v       q_v = softmax(s_v / tau_s)   p_g = softmax((t_g - c) / tau_t)

Shapes: V views (globals first), B images, D features, P bottleneck, K prototypes.
The switches of the recipe (head.prototypes, head.normaliser, target.centring) span the family around DINO; the
methods dino_vmf and dino_free are points of that grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.methods.method import Method
from pretrain.models.network import Network
from pretrain.models.prototypes import Prototypes
from pretrain.objectives.losses import multi_view_cross_entropy
from pretrain.objectives.targets import Target
from pretrain.training.health import Health
from pretrain.training.recipe import Recipe
from pretrain.training.schedules import Plan, cosine, teacher_temperature
from pretrain.training.teacher import freeze, update_teacher

NUM_TEACHER_VIEWS = 2


class Dino(Method):
    """DINO and its prototype variants."""

    student: Network
    teacher: Network

    def __init__(self, recipe: Recipe, plan: Plan):
        super().__init__(recipe, plan)
        self.student = Network(recipe.model, recipe.head, drop_path=recipe.model.drop_path)
        self.teacher = Network(recipe.model, recipe.head, drop_path=0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        freeze(self.teacher)
        self.target = Target(recipe.target, recipe.head.num_prototypes)
        self.health = Health(recipe.head.num_prototypes)
        target = recipe.target
        self._temperatures = teacher_temperature(
            target.warmup_temperature, target.temperature, target.warmup_epochs, plan.epochs
        )
        self._momenta = cosine(recipe.teacher.momentum, recipe.teacher.momentum_end, plan.epochs, plan.steps_per_epoch)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of all (teacher view, other student view) pairs, equation 3."""
        targets = self._targets(batch.views[:NUM_TEACHER_VIEWS], step)
        _, z, vectors = self.forward_student(batch.views)  # [V, B, P], [K, P]
        tau = self.recipe.objective.student_temperature
        bias = self.student.head.log_normaliser(tau, vectors)
        return multi_view_cross_entropy(z, vectors, bias, targets, tau), {}

    @torch.no_grad()
    def _targets(self, views: list[Tensor], step: int) -> Tensor:
        """Teacher probabilities [G, B, K] of the global views."""
        features, z, vectors = self.teacher(views)
        tau = self.teacher_temperature(step)
        normaliser = self.teacher.head.log_normaliser(tau, vectors)
        logits = self.target.centred(z.flatten(0, 1) @ vectors.T, tau, normaliser)
        target = logits.softmax(-1)
        self.health.observe(target, logits, features.flatten(0, 1))
        return target.unflatten(0, z.shape[:2])

    def before_update(self, step: int) -> None:
        """The prototypes stay frozen at first; without a gradient the optimiser leaves decay and moments alone too."""
        if self.plan.epoch(step) < self.recipe.optim.freeze_last_layer_epochs:
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None

    def after_step(self, step: int) -> None:
        update_teacher(self.teacher, self.student, self._momenta[step])
        self.target.update()

    def values(self, step: int) -> dict[str, float]:
        return {
            "optim/teacher_momentum": float(self._momenta[step]),
            "optim/teacher_temperature": self.teacher_temperature(step),
        }

    def prototypes(self) -> Prototypes:
        return self.teacher.head.last_layer

    def teacher_temperature(self, step: int) -> float:
        return float(self._temperatures[min(self.plan.epoch(step), self.plan.epochs - 1)])


METHOD = Dino
