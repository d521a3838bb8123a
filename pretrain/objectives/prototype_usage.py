"""How many prototypes a head really has, how evenly they are used, and how precise they are.

Partial prototype collapse (Govindarajan et al., BMVC 2024): prototypes are unique when their directions are more than
a cosine distance epsilon = 1 - cos apart; the published main value is 0.025. The paper's counting algorithm is not
published, and it changes the count. The rule used here is the greedy cover:

    go through the prototypes in index order; one is unique when it is farther than epsilon from every prototype
    kept so far, and is then kept itself

so the kept prototypes are pairwise more than epsilon apart and cover all others. Prototypes of norm 0 have no
direction and are never counted.

Shapes: W [K, p] prototypes, counts [K] how many images chose each prototype, norms [K] = ||w_k||.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

UNIQUE_THRESHOLD = 0.025
"""Cosine distance above which two prototypes are different (main value of the papers on prototype collapse)."""
THRESHOLDS = (0.001, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4)
"""The sweep: larger is stricter."""
COUNTING_RULE = "greedy cover in index order, cosine distance > threshold, prototypes of norm 0 not counted"


@torch.no_grad()
def unique_counts(
    prototypes: Tensor, thresholds: Sequence[float] = THRESHOLDS, *, chunk: int = 512
) -> dict[float, int]:
    """Number of unique prototypes of W [K, p] at each threshold, by the greedy cover (see the module).

    `chunk` prototypes at a time are compared with all earlier ones, so memory is chunk x K values, not K x K, and the
    products are shared by the thresholds. Waits for the device: call it at a checkpoint, not in the step.
    """
    directions = prototypes.detach().float()
    directions = nn.functional.normalize(directions[directions.norm(dim=1) > 0], dim=1)
    kept = {threshold: torch.empty(0, dtype=torch.long, device=directions.device) for threshold in thresholds}
    for start in range(0, len(directions), chunk):
        block = directions[start : start + chunk]
        gram = block @ block.T
        cosine = block @ directions[:start].T
        nearest = cosine.amax(1) if start else cosine.new_full((len(block),), -2.0)
        for threshold, indices in kept.items():
            near = 1 - threshold
            # Only rows near some earlier prototype can be covered by a kept one: few when healthy, and when
            # many are near, few are kept. Either way the product below is small.
            rows = (nearest >= near).nonzero().squeeze(1)
            covered = torch.zeros(len(block), dtype=torch.bool, device=block.device)
            if len(rows):
                covered[rows] = cosine[rows][:, indices].amax(1) >= near
            fresh = _greedy(gram >= near, covered).to(block.device)
            kept[threshold] = torch.cat([indices, start + fresh])
    return {threshold: len(indices) for threshold, indices in kept.items()}


def unique_count(prototypes: Tensor, threshold: float = UNIQUE_THRESHOLD, *, chunk: int = 512) -> int:
    """Number of unique prototypes of W [K, p] at one threshold."""
    return unique_counts(prototypes, (threshold,), chunk=chunk)[threshold]


def _greedy(near: Tensor, covered: Tensor) -> Tensor:
    """Greedy cover inside a block: near [B, B] and covered [B] -> indices of the rows that are kept, on the CPU.

    The walk is sequential by definition; on plain byte rows it costs about a microsecond per kept prototype.
    """
    rows = near.cpu().numpy()
    done = covered.cpu().numpy().copy()
    fresh = []
    for index in range(len(done)):
        if not done[index]:
            fresh.append(index)
            done |= rows[index]
    return torch.tensor(fresh, dtype=torch.long)


def usage_counts(assignment: Tensor, num_prototypes: int) -> Tensor:
    """How many images chose each prototype: assignment [N] -> counts [K]."""
    return torch.bincount(assignment.flatten(), minlength=num_prototypes)


def usage_entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of the shares counts / sum(counts), as a scalar tensor; ln K when all K are used equally."""
    counts = counts.double() if counts.device.type != "mps" else counts.float()
    return torch.special.entr(counts / counts.sum().clamp_min(1)).sum().float()


def perplexity(counts: Tensor) -> Tensor:
    """exp of the usage entropy: the number of equally used prototypes that would be as diverse."""
    return usage_entropy(counts).exp()


def num_used(counts: Tensor) -> Tensor:
    """Number of prototypes chosen at least once, as a scalar tensor; the others are dead on these images."""
    return (counts > 0).sum()


def kappa(norms: Tensor, temperature: float) -> Tensor:
    """Precision of the vMF components: kappa_k = ||w_k|| / tau (DINO-vMF: mu_k = w_k / ||w_k||)."""
    return norms.float() / temperature


def kappa_quantiles(
    norms: Tensor, temperature: float, quantiles: Sequence[float] = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
) -> Tensor:
    """Quantiles of the precision over the prototypes: norms [K] -> [len(quantiles)]."""
    values = kappa(norms, temperature)
    return torch.quantile(values, torch.tensor(quantiles, dtype=values.dtype, device=values.device))
