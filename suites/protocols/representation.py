"""Health of features without labels: RankMe, effective rank, uniformity and the spectrum.

Over n train images with features z_i, Z = [z_1 ... z_n]', singular values s_1 >= s_2 >= ... of Z [n, D]:

    rankme          exp(- sum_k p_k log p_k), p_k = s_k / sum_j s_j + 1e-7    (Garrido et al., ICML 2023, equation 1)
    effective_rank  the same without 1e-7 (Roy & Vetterli 2007), of Z - mean: an offset that all images share is one
                    large s_1 that says nothing about how they differ; 0 when they do not
    num_dimensions  D

Over m test images, x_i = z_i / ||z_i||:

    uniformity      log of the mean over pairs i < j of exp(-2 ||x_i - x_j||^2): 0 when all are one point, -4 when all
                    are orthogonal, lower is more uniform                         (Wang & Isola, ICML 2020, equation 2)

Alignment, the other half of that paper, needs two views of an image: suites.protocols.alignment.

RankMe grows with n until n is several times D: compare at equal n only. The paper takes the projector's output of up to
25,600 images; here it is the suite's feature. The interval of rankme is the infinitesimal jackknife over images (first
derivative with respect to each image's weight; resampling with replacement would lower the rank).
The table `spectrum` has per component the singular value, p, and the share of variance of the centred features.

Shapes: n train images, m test images, D features.
"""

from __future__ import annotations

import math

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split

NEEDS_LABELS = False
EPSILON = 1e-7
"""Of RankMe, for float32 features."""
NORMAL_QUANTILE = 1.959964
"""Of a 95 % interval."""
NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding errors of their squares."""
TINY = 1e-300
CHUNK_VALUES = 2**24
"""Distances held at a time."""


class Parameters(ProtocolParameters):
    """Numbers that define the scores."""

    num_images: int = Field(default=25600, ge=2)
    """Train images of RankMe; of a larger set, a seeded draw of so many."""
    num_pair_images: int = Field(default=10000, ge=2)
    """Test images of uniformity, the same way."""
    temperature: float = Field(default=2.0, gt=0)
    """Factor t of the Gaussian potential exp(-t d^2)."""


def run(train: Split, test: Split, parameters: Parameters, context: Context) -> Outcome:
    """Describe train features [N, D] by their spectrum and test features [M, D] by their spread on the sphere."""
    z = _draw(train.features, parameters.num_images, context)[0].to(context.device, torch.float64)
    singular, basis = spectrum(z)
    centred, _ = spectrum(z - z.mean(0))
    centred = torch.where(centred > NEGLIGIBLE * singular[0], centred, 0)
    rank = effective_rank(singular, EPSILON)
    queries, chosen = _draw(test.features, parameters.num_pair_images, context)
    x = nn.functional.normalize(queries.to(context.device, torch.float32), dim=1)
    potential = pair_potential(x, parameters.temperature)
    scores = {
        "rankme": rank,
        "effective_rank": effective_rank(centred, 0.0),
        "uniformity": math.log(potential.mean().item()),
        "num_dimensions": float(z.shape[1]),
    }
    samples = {"index": test.index[chosen].numpy(), "potential": potential.cpu().numpy()}
    if len(test.labels):
        samples["label"] = test.labels[chosen].numpy()
    spread = NORMAL_QUANTILE * standard_error(z, singular, basis)
    table = pd.DataFrame(
        {
            "component": range(1, len(singular) + 1),
            "singular_value": singular.cpu().numpy(),
            "p": (singular / singular.sum().clamp_min(TINY)).cpu().numpy(),
            "share_of_variance": (centred.square() / centred.square().sum().clamp_min(TINY)).cpu().numpy(),
        }
    )
    notes = [
        f"rankme and effective_rank over n={len(z)} train images, uniformity over {len(x)} test images: compare at "
        "equal n only",
        "alignment needs two views of an image: see the suites named alignment",
    ]
    interval = (rank - spread, rank + spread)
    return Outcome(scores, len(z), interval, pd.DataFrame(samples), {"spectrum": table}, notes)


def _draw(features: Tensor, number: int, context: Context) -> tuple[Tensor, Tensor]:
    """At most `number` rows of features [N, D] and their places, ascending."""
    chosen = torch.arange(len(features))
    if len(features) > number:
        generator = torch.Generator().manual_seed(context.seed)
        chosen = torch.randperm(len(features), generator=generator)[:number].sort().values
    return features[chosen], chosen


def spectrum(z: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [R], falling, and right singular vectors [D, R] of z [n, D] in float64, R = min(n, D)."""
    if len(z) < z.shape[1]:
        _, singular, transposed = torch.linalg.svd(z, full_matrices=False)
        return singular, transposed.T
    moment, basis = torch.linalg.eigh(z.T @ z)  # much less work than the decomposition of z for n >> D
    return moment.flip(0).clamp_min(0).sqrt(), basis.flip(1)


def effective_rank(singular: Tensor, epsilon: float) -> float:
    """exp of the entropy of p = s / sum(s) + epsilon for singular values s [R], falling; 0 when all are 0."""
    if singular[0] == 0:
        return 0.0
    return torch.special.entr(singular / singular.sum() + epsilon).sum().exp().item()


def standard_error(z: Tensor, singular: Tensor, basis: Tensor) -> float:
    """Of RankMe over images, by the infinitesimal jackknife, from z [n, D] and its spectrum.

    With weight w_i of image i in Z'Z, s_k^2 changes by (v_k z_i)^2, so d rankme / d w_i = sum_k g_k (v_k z_i)^2 with
    g_k = d rankme / d(s_k^2); the sum over images of its square is the variance.
    """
    kept = singular > NEGLIGIBLE * singular[0]
    if not kept.any():
        return 0.0
    moment = singular[kept].square().requires_grad_()
    s = moment.sqrt()
    rank = torch.special.entr(s / s.sum() + EPSILON).sum().exp()
    (slope,) = torch.autograd.grad(rank, moment)
    influence = (z @ basis[:, kept]).square() @ slope
    return (influence - influence.mean()).square().sum().sqrt().item()


def pair_potential(x: Tensor, temperature: float) -> Tensor:
    """Mean of exp(-t ||x_i - x_j||^2) over the other images j, for each row of x [m, D]: [m] float64."""
    square = x.square().sum(1)
    sums = []
    for block, own in zip(*(part.split(max(1, CHUNK_VALUES // len(x))) for part in (x, square)), strict=True):
        distance = (own[:, None] + square - 2 * block @ x.T).clamp_min(0)
        sums.append((-temperature * distance).double().exp().sum(1))
    return (torch.cat(sums) - 1) / (len(x) - 1)  # without the image itself
