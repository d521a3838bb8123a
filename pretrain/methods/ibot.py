"""iBOT: image BERT pre-training with an online tokenizer.

Paper: Zhou et al., ICLR 2022, arXiv 2111.07832
Objective: DINO between views, plus cross-entropy of teacher and student on the student's masked patches of one view

The student sees its global views with blocks of patches replaced by a learned token, the teacher sees them whole. The
loss of DINO compares the [CLS] tokens across views; the patch loss compares each masked patch with the teacher's token
at that place of the *same* view (eq. 2; official iBOTLoss):

    L = lambda_1 L_cls + lambda_2 L_patch
    L_patch = mean_{g, b} (1 / max(1, |M_gb|)) sum_{i in M_gb} -p_i . log q_i       M_gb: masked patches of a crop

Both have their own centre and teacher temperature. The centre of the patches is the mean over all patches, masked or
not. Only masked patches go through the student's prototypes, and through the teacher's for targets; with logit centring
not for the centre either, because the mean of the logits is the mean of z times W.

Shapes: G = 2 masked views, B images, N patches, M masked patches of all G x B crops, K' patch prototypes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.data.masks import Masks
from pretrain.errors import UsageError
from pretrain.methods.dino import Dino
from pretrain.methods.siamese import NUM_TEACHER_VIEWS
from pretrain.models.backbones import create_backbone, masked_tokens
from pretrain.models.network import Outputs
from pretrain.objectives.chunks import num_rows, sum_over_chunks
from pretrain.objectives.losses import LIVE_LOGITS, masked_cross_entropy, max_chunk_logits
from pretrain.objectives.regularizers import gram_loss
from pretrain.objectives.targets import Target
from pretrain.training.recipe import Recipe
from pretrain.training.schedules import Plan, teacher_temperatures


class Ibot(Dino):
    """iBOT and its variants: shared or separate heads, any prototypes, any centring per head."""

    def __init__(self, recipe: Recipe, plan: Plan):
        name = recipe.method.name
        if recipe.patch.weight == 0 or recipe.masks.kind == "none":
            raise UsageError(
                f"{name} has a patch objective: set patch.weight above 0 and masks.kind to block, random or dinov2 "
                "(without one the method is dino)"
            )
        if recipe.teacher.kind == "none":
            raise UsageError(f"{name} needs a teacher that sees whole views: teacher.kind=none has none")
        super().__init__(recipe, plan)
        config = recipe.patch.target_config(recipe.target)
        assert self.student.patch_config is not None
        self.patch_target = Target(config, self.student.patch_config.num_prototypes)
        self._patch_temperatures = teacher_temperatures(config, plan, recipe.masks.start_epoch)
        self.gram_teacher = create_backbone(recipe.model).requires_grad_(False) if recipe.regularizer.gram else None

    def student_outputs(self, batch: Batch) -> Outputs:
        """The student: global views masked, local ones whole."""
        return self.forward_student(batch.views, batch.masks, "replace")

    def teacher_outputs(self, batch: Batch) -> Outputs:
        """The teacher on the whole global views."""
        patches = self.recipe.patch.center_tokens
        return self.teacher(batch.views[:NUM_TEACHER_VIEWS], batch.masks, patches=patches)

    def parts(self, student: Outputs, teacher: Outputs, batch: Batch, step: int) -> dict[str, Tensor]:
        parts = super().parts(student, teacher, batch, step)
        assert batch.masks is not None
        parts["loss/patch"] = self.patch_term(student, teacher, batch.masks, step)
        if self.gram_teacher is not None:
            parts["loss/gram"] = self.gram_term(student, batch, step)
        return parts

    def weights(self) -> dict[str, float]:
        gram = self.recipe.regularizer.gram
        weights = {**super().weights(), "loss/patch": self.recipe.patch.weight}
        return weights | ({"loss/gram": gram} if gram else {})

    def gram_term(self, student: Outputs, batch: Batch, step: int) -> Tensor:
        """Gram anchoring (DINOv3): patch similarities as an earlier teacher saw them; a scalar, 0 before its start."""
        assert student.patches is not None and self.gram_teacher is not None
        patches = student.patches.flatten(0, 1)  # [G B, N, D]
        if self.plan.epoch(step) < self.recipe.regularizer.gram_start_epoch:
            return 0.0 * patches.sum()
        with torch.no_grad():
            views = torch.cat(batch.views[:NUM_TEACHER_VIEWS])
            anchor = masked_tokens(self.gram_teacher, views, None, None)[:, -patches.shape[1] :]
        return gram_loss(patches, anchor)

    def patch_loss(self, student: Outputs, target: Tensor, masks: Masks) -> Tensor:
        """Targets [M, K'] -> scalar: mean over crops of the mean over their masked patches."""
        tau = self.recipe.objective.student_temperature
        assert student.patch_z is not None and student.patch_vectors is not None
        bias = self.student.patch_log_normaliser(tau, student.patch_vectors)
        num_crops = masks.mask.shape[0] * masks.mask.shape[1]
        return masked_cross_entropy(student.patch_z, student.patch_vectors, bias, target, tau, masks.weight, num_crops)

    def patch_term(self, student: Outputs, teacher: Outputs, masks: Masks, step: int) -> Tensor:
        """`patch_loss` of `patch_targets`, a scalar; with runtime.max_logits_bytes of some patches at a time."""
        rows = self._patches_at_a_time(len(masks.index))
        if rows >= len(masks.index) or self.patch_target.couples_rows:
            return self.patch_loss(student, self.patch_targets(teacher, masks, step), masks)
        assert student.patch_z is not None and student.patch_vectors is not None
        normaliser = self._patch_normaliser(teacher, step)
        z = self._masked_rows(teacher, masks, normaliser, step)

        def term(patch_z: Tensor, vectors: Tensor, patches: slice) -> Tensor:
            ours = student._replace(patch_z=patch_z, patch_vectors=vectors)
            target = self._targets_of(z[patches], teacher, normaliser, step)
            some = dataclasses.replace(masks, index=masks.index[patches], weight=masks.weight[patches])
            return self.patch_loss(ours, target, some)

        return sum_over_chunks(term, student.patch_z, student.patch_vectors, rows)

    @torch.no_grad()
    def patch_targets(self, teacher: Outputs, masks: Masks, step: int) -> Tensor:
        """Teacher probabilities [M, K'] of the masked patches."""
        normaliser = self._patch_normaliser(teacher, step)
        return self._targets_of(self._masked_rows(teacher, masks, normaliser, step), teacher, normaliser, step)

    @torch.no_grad()
    def _masked_rows(self, teacher: Outputs, masks: Masks, normaliser: Tensor | None, step: int) -> Tensor:
        """The teacher's z [M, P'] of the masked patches; where every patch moves the centre, they enter it here."""
        z, vectors = teacher.patch_z, teacher.patch_vectors
        assert z is not None and vectors is not None
        if self.recipe.patch.center_tokens == "masked":
            return z
        self._center_on(z, vectors, self.patch_temperature(step), normaliser)
        return z.index_select(0, masks.index)

    @torch.no_grad()
    def _targets_of(self, z: Tensor, teacher: Outputs, normaliser: Tensor | None, step: int) -> Tensor:
        """Teacher probabilities of masked patches z [m, P'], some or all."""
        assert teacher.patch_vectors is not None and self.health.patch is not None
        remember = self.recipe.patch.center_tokens == "masked"
        tau = self.patch_temperature(step)
        logits = self.patch_target.centred(z @ teacher.patch_vectors.T, tau, normaliser, remember=remember)
        target = logits.softmax(-1)
        self.health.patch.observe(target, logits)
        return target

    @torch.no_grad()
    def _patch_normaliser(self, teacher: Outputs, step: int) -> Tensor | None:
        assert teacher.patch_vectors is not None
        return self.teacher.patch_log_normaliser(self.patch_temperature(step), teacher.patch_vectors)

    def _center_on(self, z: Tensor, vectors: Tensor, tau: float, normaliser: Tensor | None) -> None:
        """Let every patch [G B N, P'] enter the centre; their logits, where they are needed, a part at a time."""
        if self.patch_target.centring == "logit":  # the mean logit is linear in z
            return self.patch_target.remember_mean(z.mean(0) @ vectors.T, len(z))
        rows = max(1, max_chunk_logits(z.device) // len(vectors))
        for part in z.split(min(rows, self._patches_at_a_time(rows))):
            self.patch_target.remember(part @ vectors.T, tau, normaliser)

    def _patches_at_a_time(self, otherwise: int) -> int:
        """Patches whose logits, the teacher's and the student's, fit in runtime.max_logits_bytes, if that is set."""
        limit, prototypes = self.recipe.runtime.max_logits_bytes, self.student.patch_prototypes
        if limit is None:
            return otherwise
        itemsize = next(prototypes.parameters()).element_size()
        return num_rows(limit, 2 * LIVE_LOGITS["cross_entropy"] * prototypes.num * itemsize)

    def before_step(self, step: int) -> None:
        """Copy the teacher to the Gram teacher at the epochs set for it."""
        config = self.recipe.regularizer
        epoch, place = divmod(step, self.plan.steps_per_epoch)
        since = epoch - config.gram_start_epoch
        due = since == 0 or (since > 0 and config.gram_every_epochs and since % config.gram_every_epochs == 0)
        if self.gram_teacher is not None and place == 0 and due:
            self.gram_teacher.load_state_dict(self.teacher.backbone.state_dict())

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.patch_target.update()

    def values(self, step: int) -> dict[str, float]:
        return {**super().values(step), "optim/patch_temperature": self.patch_temperature(step)}

    def patch_temperature(self, step: int) -> float:
        """tau_t of the patches at a step."""
        return float(self._patch_temperatures[min(step, self.plan.total_steps - 1)])


METHOD = Ibot
