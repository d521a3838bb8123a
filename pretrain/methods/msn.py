"""MSN: masked siamese networks.

Paper: Assran et al., ECCV 2022, arXiv 2204.07141
Objective: cross-entropy of the teacher's assignment of a whole view and the student's of views without some patches

The teacher (EMA of the student) sees one global view, the target; the student sees the anchors: the other global view
without a random share of its patches, and the local ("focal") views. Both use the student's prototypes, which are
trained with it (eq. 1; official `init_msn_loss`):

    L = mean_{anchors a} -p . log q_a  +  lambda (ln K - H(mean_a q_a))
    q_a = softmax(z_a W^T / tau_s)      p = Sinkhorn(softmax(z W^T / tau_t))

The paper sharpens: p_k^{1/T} / sum_j p_j^{1/T} of a softmax at tau_s. That is a softmax at tau_t = tau_s T. Sinkhorn
starts from these probabilities. The second term (me-max) is over the anchors of all ranks.
Not as in the official code: every image loses patches of its own, there a batch loses the same ones; BatchNorm in the
head normalises over all anchors, there over those of one size.

Shapes: A = V - 1 anchors, B images, P bottleneck, K prototypes W [K, P] of unit length.
The recipe holds tau_t (target.temperature), tau_s (objective.student_temperature), lambda (regularizer.mean_entropy),
whether there is Sinkhorn (target.centring: sinkhorn or none) and the share of patches (masks.ratio).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.errors import UsageError
from pretrain.methods.dino import Dino
from pretrain.models.backbones import has_patch_tokens
from pretrain.models.network import Outputs
from pretrain.objectives.losses import multi_view_cross_entropy
from pretrain.training.recipe import Recipe
from pretrain.training.schedules import Plan
from pretrain.training.teacher import copy_student


class Msn(Dino):
    """MSN; the parts of the loss are those of DINO with other pairs of views, and me-max."""

    def __init__(self, recipe: Recipe, plan: Plan):
        _check(recipe)
        super().__init__(recipe, plan)
        if not has_patch_tokens(self.student.backbone):
            raise UsageError(
                f"{recipe.method.name} leaves out patches, which {recipe.model.name} does not have: set model.name to "
                "a ViT such as vit_small_patch16_224"
            )

    def student_outputs(self, batch: Batch) -> Outputs:
        """The student on the anchors: the second global view without the masked patches, and the local views."""
        assert batch.masks is not None
        return self.forward_student(batch.views[1:], batch.masks.of_view(1), "drop")

    def teacher_outputs(self, batch: Batch) -> Outputs:
        """The teacher on the target, the whole first global view."""
        return self.teacher(batch.views[:1])

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, step: int) -> dict[str, Tensor]:
        assert student.vectors is not None
        return super().parts(student, teacher._replace(vectors=student.vectors.detach()), batch, step)

    def image_loss(self, student: Outputs, target: Tensor) -> Tensor:
        """Mean over anchors and images: target [1, B, K] -> scalar."""
        assert student.vectors is not None
        tau = self.recipe.objective.student_temperature
        every = target.new_ones(1, len(student.z))  # no anchor is the target's view
        return multi_view_cross_entropy(student.z, student.vectors, None, target, tau, every)

    @torch.no_grad()
    def image_targets(self, teacher: Outputs, step: int) -> Tensor:
        """Sharpened and balanced probabilities [1, B, K] of the target."""
        assert teacher.vectors is not None
        tempered = teacher.z.flatten(0, 1) @ teacher.vectors.T / self.teacher_temperature(step)
        # Sinkhorn's first step sums over rows: of probabilities here, of e^logits in SwAV.
        logits = self.target.centred(tempered.log_softmax(-1), 1.0)
        target = logits.softmax(-1)
        self.health.observe(target, logits, teacher.features.flatten(0, 1))
        return target.unflatten(0, teacher.z.shape[:2])

    def after_step(self, step: int) -> None:
        super().after_step(step)
        # The teacher is what a checkpoint is evaluated by: it holds the prototypes that it used.
        copy_student(self.teacher.head.last_layer, self.student.head.last_layer)


def _check(recipe: Recipe) -> None:
    """Refuse what the recipe may ask of DINO but not of MSN."""
    name, masks = recipe.method.name, recipe.masks
    if masks.kind != "fixed" or masks.views != (1,):
        raise UsageError(
            f"{name} drops the same number of patches from every second global view, found masks.kind={masks.kind} "
            f"and masks.views={list(masks.views)}: set masks.kind=fixed and masks.views=[1]"
        )
    needed = {
        "teacher.kind=ema, or another with a second network": recipe.teacher.kind != "none",
        "target.centring=sinkhorn or none": recipe.target.centring in ("sinkhorn", "none"),
        "head.normaliser=none": recipe.head.normaliser == "none",
        "objective.loss=cross_entropy": recipe.objective.loss == "cross_entropy",
        "regularizer.koleo=0 (its own term is regularizer.mean_entropy)": recipe.regularizer.koleo == 0,
    }
    for setting, holds in needed.items():
        if not holds:
            raise UsageError(f"{name} needs {setting}")


METHOD = Msn
