"""What the methods share: a student, a teacher that follows it, and the steps in which it does. No method itself."""

from __future__ import annotations

from typing import Literal

from pretrain.methods.method import Method
from pretrain.models.network import Network
from pretrain.models.prototypes import Prototypes
from pretrain.training.recipe import Recipe
from pretrain.training.schedules import Plan, cosine
from pretrain.training.teacher import copy_student, start_teacher, update_teacher

NUM_TEACHER_VIEWS = 2


class Siamese(Method):
    """Student and teacher of one architecture. With teacher.kind=none they are the same network."""

    student: Network
    teacher: Network

    def __init__(self, recipe: Recipe, plan: Plan):
        super().__init__(recipe, plan)
        self.student = Network(
            recipe.model,
            recipe.head,
            recipe.patch,
            predictor=recipe.objective.predictor,
            mask_token=recipe.patch.weight > 0,
            drop_path=recipe.model.drop_path,
        )
        if recipe.teacher.kind == "none":
            self.teacher = self.student
        else:
            self.teacher = Network(recipe.model, recipe.head, recipe.patch)
            start_teacher(self.teacher, self.student)
        self._momenta = cosine(recipe.teacher.momentum, recipe.teacher.momentum_end, plan.epochs, plan.steps_per_epoch)

    def before_update(self, step: int) -> None:
        """The prototypes stay frozen at first; without a gradient the optimiser leaves decay and moments alone too."""
        config = self.recipe.optim
        if config.freeze_last_layer_by == "gradient" and self.plan.epoch(step) < config.freeze_last_layer_epochs:
            for prototypes in self._last_layers():
                for parameter in prototypes.parameters():
                    parameter.grad = None
        if self.recipe.teacher.kind == "previous_iteration":
            copy_student(self.teacher, self.student)

    def after_step(self, step: int) -> None:
        kind = self.recipe.teacher.kind
        if kind == "ema":
            update_teacher(self.teacher, self.student, self._momenta[step])
        elif kind == "student_copy" or (kind == "previous_epoch" and (step + 1) % self.plan.steps_per_epoch == 0):
            copy_student(self.teacher, self.student)

    def values(self, step: int) -> dict[str, float]:
        return {"optim/teacher_momentum": float(self._momenta[step])} if self.recipe.teacher.kind == "ema" else {}

    def prototypes(self, head: Literal["image", "patch"] = "image") -> Prototypes | None:
        if head == "image":
            return self.teacher.head.last_layer
        own = self.teacher.patch_head is not None or self.teacher.patch_last_layer is not None
        return self.teacher.patch_prototypes if own else None

    def _last_layers(self) -> list[Prototypes]:
        layers = [self.student.head.last_layer]
        if self.student.patch_config is not None and self.student.patch_prototypes is not layers[0]:
            layers.append(self.student.patch_prototypes)
        return [layer for layer in layers if layer is not None]
