"""iBOT's patch objective: only masked patches through the prototypes, against every patch (Zhou et al. 2022, eq. 2).

    plain          every patch of student and teacher becomes K logits; the cross-entropy of all of them is multiplied
                   by the mask, as the equation stands
    every patch    the same rows through our loss, which keeps no logits; unmasked rows weigh 0
    masked only    what is trained here: no logits of unmasked patches, the centre from the mean of z

Shapes: G = 2 masked views, B images, N patches, M masked patches of all crops, K prototypes.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from cost import compare, differences
from methods import PROTOTYPES, method_recipe
from pretrain.data.datasets import ImageSet
from pretrain.data.loader import Batch
from pretrain.data.masks import Masks
from pretrain.methods.ibot import Ibot
from pretrain.models.network import Outputs
from pretrain.objectives.losses import masked_cross_entropy
from report import Report
from session import Session
from step import OurTraining, Setting, settings

NUM_BATCHES = 20
"""Batches over which the share of masked patches is measured."""


class EveryPatch(Ibot):
    """iBOT with all patches through the prototypes."""

    def student_outputs(self, batch: Batch) -> Outputs:
        return self.forward_student(batch.views, batch.masks, "replace", "all")

    @torch.no_grad()
    def patch_targets(self, teacher: Outputs, masks: Masks, step: int) -> Tensor:
        """Teacher probabilities [G B N, K] of all patches."""
        assert teacher.patch_z is not None and teacher.patch_vectors is not None and self.health.patch is not None
        logits = self.patch_target.centred(teacher.patch_z @ teacher.patch_vectors.T, self.patch_temperature(step))
        target = logits.softmax(-1)
        self.health.patch.observe(target.index_select(0, masks.index), logits.index_select(0, masks.index))
        return target

    def patch_loss(self, student: Outputs, target: Tensor, masks: Masks) -> Tensor:
        assert student.patch_z is not None and student.patch_vectors is not None
        weight = masks.weight.new_zeros(len(target)).index_copy(0, masks.index, masks.weight)
        tau, num_crops = self.recipe.objective.student_temperature, masks.mask.shape[0] * masks.mask.shape[1]
        return masked_cross_entropy(student.patch_z, student.patch_vectors, None, target, tau, weight, num_crops)


class Plain(EveryPatch):
    """The equation as it stands: -p . log q of every patch, times the mask."""

    def patch_loss(self, student: Outputs, target: Tensor, masks: Masks) -> Tensor:
        assert student.patch_z is not None and student.patch_vectors is not None
        logits = student.patch_z @ student.patch_vectors.T / self.recipe.objective.student_temperature
        mask = masks.mask.flatten(0, 1)  # [G B, N]
        loss = -(target * logits.log_softmax(-1)).sum(-1).view(mask.shape)
        return ((loss * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()


FORMS: dict[str, type[Ibot]] = {"plain": Plain, "every patch": EveryPatch, "masked only": Ibot}


def run(session: Session) -> None:
    """iBOT with masked patches only against every patch."""
    for setting in settings(session, PROTOTYPES):
        measure(session.report, images=session.images, setting=setting, rounds=session.rounds, units=session.steps)


def measure(report: Report, *, images: ImageSet, setting: Setting, rounds: int, units: int) -> None:
    """One row: a step of iBOT in each form."""
    gate = check_equal(images, setting)
    builders = {name: partial(training, form, setting, images, drop_path=0.1) for name, form in FORMS.items()}
    described = {"patches": _num_patches(setting), "masked": f"{100 * masked_share(images, setting):.0f}%"}
    compare(report, "patch_head", builders, setting=setting, described=described, gate=gate, rounds=rounds, units=units)


def training(form: type[Ibot], setting: Setting, images: ImageSet, drop_path: float) -> OurTraining:
    """iBOT whose patch objective is computed in one of the forms."""
    ours = OurTraining(method_recipe("ibot", setting, drop_path), images)
    ours.trainer.method.__class__ = form  # the same state and networks, other arithmetic
    return ours


def check_equal(images: ImageSet, setting: Setting) -> dict[str, float]:
    """All forms have the loss and the gradients of the plain one.

    Raises:
        SystemExit: they do not.
    """
    exact = dataclasses.replace(setting, precision="fp64")
    found = {}
    for name in list(FORMS)[1:]:
        plain, other = (training(form, exact, images, drop_path=0.0) for form in (Plain, FORMS[name]))
        differing = differences(plain, other, (next(plain.batches), next(other.batches)))
        found |= {f"{name.replace(' ', '_')}_{key}": value for key, value in differing.items()}
    return found


def masked_share(images: ImageSet, setting: Setting) -> float:
    """Mean share of the global crops' patches that are masked, M / (G B N)."""
    batches = OurTraining(method_recipe("ibot", setting, drop_path=0.0), images).batches
    masks = [batch.masks for batch, _ in zip(batches, range(NUM_BATCHES), strict=False) if batch.masks is not None]
    return sum(len(mask.index) for mask in masks) / sum(mask.mask.numel() for mask in masks)


def _num_patches(setting: Setting) -> int:
    """Patches of all global crops of a step, G B N."""
    return 2 * setting.batch * (setting.global_size // setting.patch) ** 2
