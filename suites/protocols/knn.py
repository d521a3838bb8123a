"""Weighted k-nearest-neighbour classification of frozen features (DINO, appendix F.1; eval_knn.py).

The features are L2-normalised; each of the k nearest train images, by cosine similarity s, votes for its class:

    dino      weight exp(s / T)
    dinov2    weight softmax(s / T) over the largest k of the sweep, so that class scores are probabilities

Both give the same top-1. All k come from one search. Nothing is selected: every k of the definition is reported, and
`top1` is the pinned `headline_k`. Ties: neighbours as in suites.neighbours; among classes of equal score the lower
label comes first. Top-5 counts the best min(5, k) classes for "dino", as the official code.

Shapes: N train images, M test images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from suites.interval import mean_interval
from suites.neighbours import Backend, Neighbours, find_neighbours
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split, sample_table

Weighting = Literal["dino", "dinov2"]
NEEDS_LABELS = True


class Parameters(ProtocolParameters):
    """Numbers that define the score."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    headline_k: int = 20
    temperature: float = Field(default=0.07, gt=0)
    weighting: Weighting = "dino"

    @model_validator(mode="after")
    def _check(self) -> Parameters:
        if min(self.k) < 1 or self.headline_k not in self.k:
            raise ValueError(f"k={list(self.k)} must be positive and hold headline_k={self.headline_k}")
        return self


def run(train: Split, test: Split, parameters: Parameters, context: Context) -> Outcome:
    """Score test features [M, D] against train features [N, D]."""
    ranks, predictions = classify(
        train.features,
        train.labels,
        test.features,
        test.labels,
        k=parameters.k,
        num_classes=context.num_classes,
        temperature=parameters.temperature,
        weighting=parameters.weighting,
        backend=context.backend,
        device=context.device,
    )
    scores = {}
    for k in (parameters.headline_k, *parameters.k):
        suffix = f"_k{k}" if len(scores) >= 2 else ""
        best = min(5, k) if parameters.weighting == "dino" else 5
        scores[f"top1{suffix}"] = 100 * (ranks[k] == 0).double().mean().item()
        scores[f"top5{suffix}"] = 100 * (ranks[k] < best).double().mean().item()
    correct = ranks[parameters.headline_k] == 0
    samples = sample_table(test, predictions[parameters.headline_k], correct)
    interval = mean_interval(100.0 * correct.numpy(), seed=context.seed)
    return Outcome(scores, n=len(correct), interval=interval, samples=samples)


def classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int],
    num_classes: int,
    temperature: float = 0.07,
    weighting: Weighting = "dino",
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Rank of the true class [M] (0 = predicted) and predicted class [M] for each k, on the CPU."""
    neighbours = find_neighbours(train_features, test_features, max(k), backend=backend, device=device)
    votes = class_scores(neighbours, train_labels, k, num_classes, temperature=temperature, weighting=weighting)
    ranks: dict[int, list[Tensor]] = {size: [] for size in k}
    predictions: dict[int, list[Tensor]] = {size: [] for size in k}
    start = 0
    for chunk in votes:
        stop = start + len(chunk[k[0]])
        label = test_labels[start:stop].to(neighbours.indices.device)[:, None]
        for size, score in chunk.items():
            ranks[size].append(rank_of(label, score).cpu())
            predictions[size].append(score.argmax(1).cpu())  # argmax gives the first, so the lower label
        start = stop
    return {s: torch.cat(r) for s, r in ranks.items()}, {s: torch.cat(p) for s, p in predictions.items()}


def class_scores(
    neighbours: Neighbours,
    train_labels: Tensor,
    k: Sequence[int],
    num_classes: int,
    *,
    temperature: float,
    weighting: Weighting,
    chunk: int = 4096,
) -> Iterator[dict[int, Tensor]]:
    """Class scores [B, C] for each k, for `chunk` queries at a time.

    The votes of a larger k are those of the smaller one plus the rest: each neighbour is added once, with scatter_add
    and no k x C one-hot. Sums in float64, so that their order does not matter for any float32 similarity.
    """
    labels = train_labels.to(neighbours.indices.device)[neighbours.indices]
    weights = neighbours.similarity.double() / temperature
    weights = weights.softmax(1) if weighting == "dinov2" else weights.exp()
    for label, weight in zip(labels.split(chunk), weights.split(chunk), strict=True):
        score = weight.new_zeros(len(label), num_classes)
        result: dict[int, Tensor] = {}
        start = 0
        for size in sorted(set(k)):
            score = score.scatter_add(1, label[:, start:size], weight[:, start:size])
            result[size], start = score, size
        yield {size: result[size] for size in k}


def rank_of(label: Tensor, score: Tensor) -> Tensor:
    """Place of the true class label [B, 1] in the order of score [B, C] (ties: lower label first): [B]."""
    own = score.gather(1, label)
    lower = torch.arange(score.shape[1], device=score.device) < label
    return ((score > own) | ((score == own) & lower)).sum(1)


def draw_per_class(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of `per_class` images of each class, drawn as DINOv2's few-shot kNN does.

    Its draw for a try is one torch.manual_seed(try), then a randperm per class in label order.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        parts.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(parts)
