"""BYOL: bootstrap your own latent.

Paper: Grill et al., NeurIPS 2020, arXiv 2006.07733
Objective: squared distance between the student's prediction of one view and the teacher's projection of the other

The student has a predictor that the teacher (EMA of the student) lacks; there are no negatives and no prototypes. With
q_v the student's prediction of view v and z_g the teacher's projection of view g, both of unit length (eq. 2):

    L = sum_{g <= G} mean_{v != g} ||q_v - z_g||^2  =  sum_g mean_{v != g} (2 - 2 <q_v, z_g>)

With two views this is the paper's L + L~. Local views, which the paper has not, are further views of the student.
BatchNorm in the head normalises over the rows of all views, the official code over those of one view.

Shapes: V views (globals first), G = 2 global ones, B images, P bottleneck.
The recipe holds the projector (head, without prototypes; the predictor has its hidden size), teacher.momentum and the
augmentation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.errors import UsageError
from pretrain.methods.siamese import NUM_TEACHER_VIEWS, Siamese
from pretrain.methods.simclr import SPREAD, refuse_prototypes, spread
from pretrain.objectives.contrastive import byol_regression
from pretrain.training.health import Health
from pretrain.training.recipe import Recipe
from pretrain.training.schedules import Plan


class Byol(Siamese):
    """BYOL, and what shares its two networks with another loss for a pair of views."""

    def __init__(self, recipe: Recipe, plan: Plan):
        refuse_prototypes(recipe)
        if recipe.teacher.kind == "none":
            raise UsageError(
                f"{recipe.method.name} has a predictor in the student only, teacher.kind=none makes both one network: "
                "use teacher.kind=student_copy for a teacher without momentum"
            )
        super().__init__(recipe, plan)
        self.health = Health(metrics=SPREAD)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The symmetrised loss; alignment and uniformity are those of the teacher's projections."""
        with torch.no_grad():
            teacher = self.teacher(batch.views[:NUM_TEACHER_VIEWS])
        student = self.forward_student(batch.views)
        self.health.observe_features(teacher.features.flatten(0, 1))
        return self.symmetric_loss(student.z, teacher.z), spread(teacher.z)

    def symmetric_loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Sum over teacher views of the mean over other student views: [V, B, P], [G, B, P] -> scalar."""
        losses = [
            self.pair_loss(prediction, target)
            for g, target in enumerate(targets)
            for v, prediction in enumerate(predictions)
            if v != g
        ]
        return torch.stack(losses).sum() / (len(predictions) - 1)

    def pair_loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """One direction of one pair of views: [B, P], [B, P] -> scalar."""
        return byol_regression(predictions, targets)


METHOD = Byol
