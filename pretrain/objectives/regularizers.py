"""Terms added to the loss: they spread features (KoLeo), prototypes (KoLeo-proto) or their use (me-max), or keep the
patch features of an earlier teacher (Gram anchoring).

    KoLeo        -(1/B) sum_i log min_{j != i} ||x_i - x_j||        x = f / ||f||                       DINOv2
    KoLeo-proto  -(1/K) sum_k log min_{j != k} ||mu_k - mu_j||      mu = w / ||w||          arXiv 2410.14060
    me-max       ln K - H(mean_r softmax(l_r))                                                             MSN
    Gram         mean_nm (<s_n, s_m> - <t_n, t_m>)^2                s, t = unit patch features          DINOv3

KoLeo is the Kozachenko-Leonenko estimate of the differential entropy: its nearest neighbours are found without a
gradient, the distances to them carry it.

Shapes: B images, D features, K prototypes, P bottleneck, N patches.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from pretrain.objectives.ranks import gather_rows, mean_over_ranks, rank

EPSILON = 1e-8
"""Added to every coordinate of a difference and to every distance (DINOv2 `KoLeoLoss`). Identical vectors in D
dimensions have distance sqrt(D) 1e-8, so a term of KoLeo is at most -log((sqrt(D) + 1) 1e-8), 15.6 at D = 256."""


class RegularizerConfig(BaseModel):
    """Weights of the terms beside the loss between student and teacher; 0 = not computed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    koleo: float = Field(default=0.0, ge=0)
    """On the student's class tokens before the head, summed over the global views (DINOv2: 0.1)."""
    koleo_scope: Literal["rank", "global"] = "rank"
    """Where nearest neighbours are looked for: in this rank's batch (DINOv2) or in the batch of all ranks."""
    koleo_proto: float = Field(default=0.0, ge=0)
    """On the student's prototypes; the published lambda is not known to us."""
    mean_entropy: float = Field(default=0.0, ge=0)
    """me-max on the student's predictions (MSN: 1.0)."""
    gram: float = Field(default=0.0, ge=0)
    """Gram anchoring of the patch features (DINOv3: up to 2.0)."""
    gram_start_epoch: int = Field(default=0, ge=0)
    """First epoch with the Gram term; the Gram teacher is copied from the teacher then."""
    gram_every_epochs: int = Field(default=0, ge=0)
    """Epochs between two copies of the teacher to the Gram teacher; 0 = never again."""


def koleo(features: Tensor, scope: Literal["rank", "global"] = "rank") -> Tensor:
    """KoLeo of one view's features [B, D]; a scalar, float32 (float64 for float64 features).

    With scope "global" a rank's rows look for neighbours among all ranks' rows; every rank needs the same B. A single
    row is its own neighbour, which gives a large constant without a gradient, as in the official code.
    """
    with torch.autocast(features.device.type, enabled=False):
        own = functional.normalize(_full(features), dim=1, eps=EPSILON)
        everyone = gather_rows(own) if scope == "global" else own
        start = rank() * len(own) if scope == "global" else 0
        nearest = _nearest(own.detach(), everyone.detach(), start)
        return -(functional.pairwise_distance(own, everyone[nearest], eps=EPSILON) + EPSILON).log().mean()


def koleo_prototypes(vectors: Tensor, chunk: int = 1024) -> Tensor:
    """KoLeo of the prototypes' directions, from vectors [K, P]; a scalar, float32 (float64 for float64 vectors).

    Nearest neighbours are found `chunk` rows at a time: memory chunk x K instead of K x K. The value is the same on
    every rank, as the prototypes are. Prototypes of norm 0 have no direction: they take no gradient.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors = _full(vectors)
        norms = vectors.norm(dim=1, keepdim=True)
        unit = vectors / norms.masked_fill(norms <= EPSILON, torch.inf)
        fixed = unit.detach()
        nearest = torch.cat([_nearest(fixed[i : i + chunk], fixed, i) for i in range(0, len(fixed), chunk)])
        return -(functional.pairwise_distance(unit, unit[nearest], eps=EPSILON) + EPSILON).log().mean()


def mean_entropy(logits: Tensor) -> Tensor:
    """me-max: ln K minus the entropy of the mean prediction, >= 0, 0 when all prototypes are used alike; a scalar.

    Args:
        logits: the student's tempered logits [R, K]; the mean is over the rows of all ranks, as many on each.
    """
    mean = mean_over_ranks(_full(logits).softmax(1).mean(0))
    # A prototype nobody uses may underflow to 0; its logarithm must stay finite for the gradient.
    entropy = -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum()
    return torch.log(mean.new_tensor(len(mean))) - entropy


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    per_image: bool = True,
    normalise: bool = True,
    negatives: Literal["keep", "zero", "zero_teacher"] = "keep",
) -> Tensor:
    """Mean squared difference of the patch-by-patch similarities of student and Gram teacher; a scalar.

    Args:
        student: patch features [B, N, D].
        teacher: patch features of the Gram teacher [B, N, D]; carry no gradient.
        per_image: similarities within an image [B, N, N]; else between all patches of the batch [B N, B N].
        normalise: cosine similarities; else inner products.
        negatives: "keep" (the 7B model of DINOv3), or set to 0 those of both ("zero", the default of its class), or
            the teacher's only ("zero_teacher").
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (_gram(_full(x), per_image, normalise) for x in (student, teacher.detach()))
        if negatives != "keep":
            theirs = theirs.clamp_min(0)
        if negatives == "zero":
            ours = ours.clamp_min(0)
        return functional.mse_loss(ours, theirs)


def _gram(patches: Tensor, per_image: bool, normalise: bool) -> Tensor:
    if not per_image:
        patches = patches.flatten(0, 1)
    if normalise:
        patches = functional.normalize(patches, dim=-1)
    return patches @ patches.mT


def _nearest(rows: Tensor, candidates: Tensor, start: int) -> Tensor:
    """Index of the candidate closest to each row, itself (candidate start + i of row i) excluded."""
    similarity = rows @ candidates.T
    similarity.diagonal(offset=start).fill_(-1)
    return similarity.argmax(1)


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
