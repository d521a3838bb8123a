"""SimCLR: contrastive learning of two views, with the rest of the batch as negatives.

Paper: Chen et al., ICML 2020, arXiv 2002.05709
Objective: cross-entropy of the other view of the image among all other views of the batch (NT-Xent)

One network sees both views. With z of unit length and s_ij = <z_i, z_j> / tau over the 2 W B views of all ranks,
equation 1 is

    L = mean_i  -log ( e^{s_ip} / sum_{j != i} e^{s_ij} )       p: the other view of i's image

Alignment and uniformity (Wang & Isola, ICML 2020), the two properties the loss trades, are logged for each rank.

Shapes: G = 2 views, B images of this rank, W ranks, P bottleneck.
The recipe holds tau (objective.student_temperature), the projector (head, without prototypes) and the augmentation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.errors import UsageError
from pretrain.methods.siamese import Siamese
from pretrain.objectives.contrastive import alignment, nt_xent, uniformity
from pretrain.training.health import Health
from pretrain.training.recipe import Recipe
from pretrain.training.schedules import Plan

SPREAD = ("contrast/alignment", "contrast/uniformity")
"""What `spread` gives."""


class Simclr(Siamese):
    """SimCLR: no teacher, no predictor, no prototypes."""

    def __init__(self, recipe: Recipe, plan: Plan):
        refuse_prototypes(recipe)
        if recipe.teacher.kind != "none" or recipe.objective.predictor:
            raise UsageError(
                f"{recipe.method.name} trains one network against itself: set teacher.kind=none and "
                "objective.predictor=false, or use byol or moco_v3"
            )
        if recipe.views.local:
            raise UsageError(
                f"{recipe.method.name} compares two views, found {recipe.views.local} local ones: set views.local=0"
            )
        super().__init__(recipe, plan)
        self.health = Health(metrics=SPREAD)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent of the two views."""
        outputs = self.forward_student(batch.views)
        self.health.observe_features(outputs.features.flatten(0, 1))
        loss = nt_xent(outputs.z[0], outputs.z[1], self.recipe.objective.student_temperature)
        return loss, spread(outputs.z)


@torch.no_grad()
def spread(z: Tensor) -> dict[str, Tensor]:
    """Alignment of the two views and uniformity, mean over them, of projections z [2, B, P] of this rank."""
    values = alignment(z[0], z[1]), torch.stack([uniformity(view) for view in z]).mean()
    return dict(zip(SPREAD, values, strict=True))


def refuse_prototypes(recipe: Recipe) -> None:
    """For methods that compare images with images.

    Raises:
        UsageError: the head has prototypes.
    """
    if recipe.head.num_prototypes:
        raise UsageError(
            f"{recipe.method.name} compares images, not prototypes, found head.num_prototypes="
            f"{recipe.head.num_prototypes}: set it to 0"
        )


METHOD = Simclr
