"""Losses between the two views of an image without prototypes: what the papers of the family compare with.

    InfoNCE     -2 tau mean_i log softmax_j(<q_i, k_j> / tau)[i]                          MoCo v3, algorithm 1
    NT-Xent     -mean_i log softmax_{j != i}(<z_i, z_j> / tau)[the other view of i]       SimCLR, eq. 1
    regression  mean_i ||p_i - z_i||^2 = 2 - 2 cos(p_i, z_i)                              BYOL, eq. 2

and the two properties such losses trade (Wang & Isola, ICML 2020, eqs. 8 and 9):

    alignment   mean_i ||x_i - y_i||^alpha            uniformity  log mean_{i < j} exp(-t ||x_i - x_j||^2)

All vectors are L2-normalised here. Each function gives one direction of a pair of views: the caller symmetrises the
asymmetric ones. Shapes: B images of this rank, W ranks, P bottleneck. Every rank needs the same B.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.objectives.ranks import gather_rows, rank


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each query among the keys of all ranks, scaled by 2 tau as in MoCo v3; a scalar.

    Args:
        queries: the student's predictions of one view [B, P].
        keys: the teacher's projections of the other view, this rank's [B, P]; gathered here, carry no gradient.
        temperature: tau.
    """
    everyone = gather_rows(_unit(keys.detach()))
    labels = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    logits = _products(_unit(queries), everyone) / temperature
    return 2 * temperature * functional.cross_entropy(logits, labels)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each view's partner among the 2 W B - 1 other views of all ranks; a scalar.

    Args:
        z1, z2: projections of the two views [B, P]. The other ranks' rows carry a gradient too.
        temperature: tau.
    """
    own = _unit(torch.cat([z1, z2]))
    start = rank() * len(own)
    logits = _products(own, gather_rows(own)) / temperature
    itself = torch.zeros_like(logits, dtype=torch.bool)
    itself.diagonal(offset=start).fill_(True)
    partner = torch.arange(len(own), device=own.device).roll(len(z1)) + start
    return functional.cross_entropy(logits.masked_fill(itself, -torch.inf), partner)


def byol_regression(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared distance between unit vectors, mean over images; a scalar in [0, 4].

    Args:
        predictions: the student's predictions of one view [B, P].
        targets: the teacher's projections of the other view [B, P]; carry no gradient.
    """
    return 2 - 2 * (_unit(predictions) * _unit(targets.detach())).sum(1).mean()


def alignment(z1: Tensor, z2: Tensor, alpha: float = 2) -> Tensor:
    """Mean distance between the two views of an image [B, P], to the power alpha; a scalar, 0 at best."""
    return (_unit(z1) - _unit(z2)).norm(dim=1).pow(alpha).mean()


def uniformity(z: Tensor, t: float = 2) -> Tensor:
    """Log of the mean Gaussian potential over pairs of images [B, P], B >= 2; a scalar, lower is more uniform."""
    return torch.pdist(_unit(z)).square().mul(-t).exp().mean().log()


def _unit(x: Tensor) -> Tensor:
    return functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def _products(rows: Tensor, others: Tensor) -> Tensor:
    # Autocast would round a cosine to bfloat16, which a small temperature then magnifies.
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ others.T
