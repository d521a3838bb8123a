"""DINO: self-distillation with no labels.

Paper: Caron et al., ICCV 2021, arXiv 2104.14294
Objective: cross-entropy of the teacher's prototype assignment of one view and the student's of every other view

A student sees all V crops of an image, a teacher (EMA of the student) only the G = 2 global ones. Both map a crop to a
softmax over K prototypes; the student's is trained to match the teacher's of every *other* crop (eq. 3):

    min  sum_{g <= G} sum_{v != g}  -p_g . log q_v       q_v = softmax(s_v / tau_s)   p_g = softmax((t_g - c) / tau_t)

Shapes: V views (globals first), B images, D features, P bottleneck, K prototypes.
The switches of the recipe (head.prototypes, head.normaliser, target.centring, teacher.kind, objective.*, regularizer.*)
span the family around DINO; dino_vmf, dino_free, dino_sk, dino_koleo, dino_koleo_proto and mean_teacher are points of
that grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.errors import UsageError
from pretrain.methods.siamese import NUM_TEACHER_VIEWS, Siamese
from pretrain.models.network import Outputs
from pretrain.objectives.chunks import num_rows, sum_over_chunks
from pretrain.objectives.losses import LIVE_LOGITS, multi_view_cross_entropy, multi_view_mse
from pretrain.objectives.regularizers import koleo, koleo_prototypes, mean_entropy
from pretrain.objectives.targets import Target
from pretrain.training.health import Health
from pretrain.training.recipe import Recipe
from pretrain.training.schedules import Plan, teacher_temperatures


class Dino(Siamese):
    """DINO and its prototype variants."""

    def __init__(self, recipe: Recipe, plan: Plan):
        if recipe.head.num_prototypes == 0:
            raise UsageError(f"{recipe.method.name} compares prototypes: set head.num_prototypes to at least 2")
        if recipe.teacher.kind == "none" and recipe.objective.predictor:
            raise UsageError(
                "objective.predictor makes student and teacher differ, teacher.kind=none makes them one: "
                "use teacher.kind=student_copy"
            )
        super().__init__(recipe, plan)
        self.target = Target(recipe.target, recipe.head.num_prototypes)
        self.health = self._create_health()
        self._temperatures = teacher_temperatures(recipe.target, plan)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the parts of the objective; for DINO the one part of equation 3."""
        if self.recipe.teacher.kind == "none":
            student = self.student_outputs(batch)
            teacher = _global_views(student)
        else:
            with torch.no_grad():
                teacher = self.teacher_outputs(batch)
            student = self.student_outputs(batch)
        parts = self.parts(student, teacher, batch, step)
        weights = self.weights()
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return total, parts

    def student_outputs(self, batch: Batch) -> Outputs:
        """The student on all views."""
        return self.forward_student(batch.views)

    def teacher_outputs(self, batch: Batch) -> Outputs:
        """The teacher on the global views."""
        return self.teacher(batch.views[:NUM_TEACHER_VIEWS])

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, step: int) -> dict[str, Tensor]:
        """The terms of the objective by metric name, unweighted."""
        config = self.recipe.regularizer
        parts = {"loss/image": self.image_term(student, teacher, step)}
        if config.koleo:
            views = student.features[:NUM_TEACHER_VIEWS]
            # each global view alone: the two crops of an image are meant to be neighbours
            parts["loss/koleo"] = torch.stack([koleo(view, config.koleo_scope) for view in views]).sum()
        if config.mean_entropy:
            parts["loss/mean_entropy"] = mean_entropy(self.student_logits(student).flatten(0, 1))
        if config.koleo_proto:
            heads = [student.vectors, student.patch_vectors]
            # shared prototypes come back twice as the same tensor
            different = {id(vectors): vectors for vectors in heads if vectors is not None}.values()
            parts["loss/koleo_proto"] = torch.stack([koleo_prototypes(vectors) for vectors in different]).sum()
        return parts

    def weights(self) -> dict[str, float]:
        """The weight of each part that `parts` gives."""
        config = self.recipe.regularizer
        names = ("koleo", "mean_entropy", "koleo_proto")
        chosen = {f"loss/{name}": getattr(config, name) for name in names if getattr(config, name)}
        return {"loss/image": self.recipe.objective.image_weight, **chosen}

    def image_term(self, student: Outputs, teacher: Outputs, step: int) -> Tensor:
        """`image_loss` of `image_targets`, a scalar; with runtime.max_logits_bytes of some images at a time."""
        batch, rows = student.z.shape[1], self._images_at_a_time(student, teacher)
        if rows >= batch:
            return self.image_loss(student, self.image_targets(teacher, step))

        def term(z: Tensor, vectors: Tensor, images: slice) -> Tensor:
            ours = student._replace(features=student.features[:, images], z=z, vectors=vectors)
            theirs = teacher._replace(features=teacher.features[:, images], z=teacher.z[:, images])
            return self.image_loss(ours, self.image_targets(theirs, step)) * (z.shape[1] / batch)

        assert student.vectors is not None
        total = sum_over_chunks(term, student.z, student.vectors, rows)
        self.health.observe_features(teacher.features.flatten(0, 1))  # of the batch, not of its last images
        return total

    def _images_at_a_time(self, student: Outputs, teacher: Outputs) -> int:
        """Images whose logits fit in runtime.max_logits_bytes; all of them where targets couple the images."""
        limit, batch = self.recipe.runtime.max_logits_bytes, student.z.shape[1]
        if limit is None or self.target.couples_rows:
            return batch
        assert student.vectors is not None
        num_logits = (len(student.z) + len(teacher.z)) * len(student.vectors)
        return num_rows(limit, LIVE_LOGITS[self.recipe.objective.loss] * num_logits * student.vectors.element_size())

    def image_loss(self, student: Outputs, target: Tensor) -> Tensor:
        """Mean over (teacher view, other student view) pairs and images: targets [G, B, K] -> scalar."""
        tau = self.recipe.objective.student_temperature
        assert student.vectors is not None
        bias = self.student.head.log_normaliser(tau, student.vectors)
        loss = multi_view_mse if self.recipe.objective.loss == "mse" else multi_view_cross_entropy
        return loss(student.z, student.vectors, bias, target, tau)

    def student_logits(self, student: Outputs) -> Tensor:
        """[V, B, K]: tempered, with the normaliser where there is one. For what needs every logit at once."""
        tau = self.recipe.objective.student_temperature
        assert student.vectors is not None
        logits = student.z @ student.vectors.T / tau
        bias = self.student.head.log_normaliser(tau, student.vectors)
        return logits if bias is None else logits + bias

    @torch.no_grad()
    def image_targets(self, teacher: Outputs, step: int) -> Tensor:
        """Teacher probabilities [G, B, K] of the global views."""
        tau = self.teacher_temperature(step)
        assert teacher.vectors is not None
        normaliser = self.teacher.head.log_normaliser(tau, teacher.vectors)
        logits = self.target.centred(teacher.z.flatten(0, 1) @ teacher.vectors.T, tau, normaliser)
        target = logits.softmax(-1)
        self.health.observe(target, logits, teacher.features.flatten(0, 1))
        return target.unflatten(0, teacher.z.shape[:2])

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.target.update()

    def values(self, step: int) -> dict[str, float]:
        return {**super().values(step), "optim/teacher_temperature": self.teacher_temperature(step)}

    def teacher_temperature(self, step: int) -> float:
        return float(self._temperatures[min(step, self.plan.total_steps - 1)])

    def _create_health(self) -> Health:
        names = tuple(self.weights())
        patch = self.student.patch_config
        return Health(
            self.recipe.head.num_prototypes,
            patch_prototypes=patch.num_prototypes if patch is not None else 0,
            metrics=names if len(names) > 1 else (),
            cross_entropy=self.recipe.objective.loss == "cross_entropy",
        )


def _global_views(student: Outputs) -> Outputs:
    """The student's own outputs of the global views, as a teacher's."""
    assert student.vectors is not None
    first = slice(NUM_TEACHER_VIEWS)
    return Outputs(student.features[first].detach(), student.z[first].detach(), student.vectors.detach())


METHOD = Dino
