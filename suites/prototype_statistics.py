"""What the prototypes of a head are, from their weights alone, and how tokens use them.

From the weights W [K, P]: how many point in different directions (partial prototype collapse, swept over cosine
distances), how close each one's nearest neighbour is, and quantiles of the precision kappa_k = ||w_k|| / tau
(DINO-vMF, section 3). From an assignment of tokens (images, or patches): utilisation and the entropies of MSN's logs.

Shapes: N tokens, K prototypes, P dimensions of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from pretrain.objectives import prototype_usage as usage

QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
NEAREST_SAMPLE = 8192
"""Prototypes at most whose nearest neighbour is looked up: with 131,072 of them all pairs would take minutes."""


def unique_directions(
    vectors: Tensor, thresholds: Sequence[float], main: float
) -> tuple[dict[str, float], pd.DataFrame]:
    """Scores `unique` (at the cosine distance `main`) and `nearest_cosine` of W [K, P], and the sweep as a table."""
    swept = usage.unique_counts(vectors, tuple(sorted({*thresholds, main})))
    table = pd.DataFrame({"cosine_distance": list(swept), "unique": list(swept.values())})
    table["share"] = table["unique"] / len(vectors)
    return {"unique": float(swept[main]), "nearest_cosine": nearest_cosine(vectors)}, table


def nearest_cosine(vectors: Tensor, sample: int = NEAREST_SAMPLE) -> float:
    """Mean cosine of a prototype to its nearest other one; over `sample` of them, always the same, where K is larger.

    1 when every prototype has a copy; prototypes of norm 0 have no direction and count as far from all.
    """
    directions = nn.functional.normalize(vectors.detach().float(), dim=1)
    chosen = torch.arange(len(vectors))
    if len(vectors) > sample:
        chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:sample]
    nearest = []
    for rows in chosen.to(directions.device).split(1024):
        cosine = directions[rows] @ directions.T
        cosine[torch.arange(len(rows)), rows] = -1
        nearest.append(cosine.amax(1))
    return torch.cat(nearest).double().mean().item()


def precision(norms: Tensor, temperature: float) -> dict[str, float]:
    """Quantiles of kappa over the prototypes, from ||w_k|| [K]."""
    found = usage.kappa_quantiles(norms, temperature, tuple(QUANTILES.values())).tolist()
    return {f"kappa_{name}": value for name, value in zip(QUANTILES, found, strict=True)}


def utilisation(counts: Tensor, entropy: Tensor) -> dict[str, float]:
    """Scores from the number of tokens of each prototype [K] and the entropy of each token's posterior [N]."""
    used = int(usage.num_used(counts))
    return {
        "perplexity": usage.perplexity(counts).item(),
        "usage_entropy": usage.usage_entropy(counts).item(),
        "assignment_entropy": entropy.double().mean().item(),
        "num_prototypes": float(len(counts)),
        "used": float(used),
        "dead": float(len(counts) - used),
    }


@torch.inference_mode()
def assign(head: nn.Module, tokens: Tensor, temperature: float, device: str) -> tuple[Tensor, Tensor]:
    """Prototype [N] of each token and entropy [N] of its posterior, from tokens [N, D], on the CPU."""
    assigned, entropies = [], []
    for block in tokens.split(512):
        z = head.project(block.to(device).float())  # type: ignore[operator]
        log_posterior = head.logits(z, temperature).float().log_softmax(1)  # type: ignore[operator]
        assigned.append(log_posterior.argmax(1).cpu())
        entropies.append(-(log_posterior.exp() * log_posterior).sum(1).cpu())
    return torch.cat(assigned), torch.cat(entropies)
