"""MoCo v3: contrastive learning with a momentum encoder, for vision transformers.

Paper: Chen, Xie and He, ICCV 2021, arXiv 2104.02057
Objective: cross-entropy of the teacher's key of the other view among the keys of the batch (InfoNCE)

Student with predictor and teacher as in BYOL. With q_v the student's queries of view v and k_g the teacher's keys of
view g, both of unit length, and all W B images of all ranks as candidates (algorithm 1):

    L = sum_{g <= G} mean_{v != g} ctr(q_v, k_g)
    ctr(q, k) = -2 tau mean_i log softmax_j(<q_i, k_j> / tau)[i]

The patch embedding of a ViT is frozen as it was drawn, which removes the dips of an unstable training (section 4.2).
Not as in the official code: the position embedding is learned, there it is the fixed sine-cosine one; BatchNorm in the
head normalises over the rows of all views, there over those of one view.

Shapes: V views (globals first), G = 2 global ones, B images of this rank, W ranks, P bottleneck.
The recipe holds tau (objective.student_temperature), the projector (head, without prototypes) and teacher.momentum.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pretrain.methods.byol import Byol
from pretrain.objectives.contrastive import info_nce
from pretrain.training.recipe import Recipe
from pretrain.training.schedules import Plan


class Parameters(BaseModel):
    """What only MoCo v3 has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    freeze_patch_embed: bool = True
    """Do not train the patch projection of a ViT; other backbones have none."""


class MocoV3(Byol):
    """MoCo v3."""

    Parameters = Parameters

    def __init__(self, recipe: Recipe, plan: Plan):
        super().__init__(recipe, plan)
        patch_embed = getattr(self.student.backbone, "patch_embed", None)
        if Parameters(**recipe.method.parameters).freeze_patch_embed and patch_embed is not None:
            patch_embed.proj.requires_grad_(False)

    def pair_loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return info_nce(predictions, targets, self.recipe.objective.student_temperature)


METHOD = MocoV3
