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
from typing import Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from pretrain.errors import DinobenchError
from suites.interval import mean_interval
from suites.neighbours import Backend, Neighbours, find_neighbours
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split, sample_table

Weighting = Literal["dino", "dinov2"]
NEEDS_LABELS = True
STREAMS = True


class Parameters(ProtocolParameters):
    """Numbers that define the score."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    headline_k: int = 20
    temperature: float = Field(default=0.07, gt=0)
    weighting: Weighting = "dino"
    per_class: tuple[int, ...] = ()
    """Train images per class of the few-shot scores, beside those of all of train."""
    num_tries: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Parameters:
        if min(self.k) < 1 or self.headline_k not in self.k:
            raise ValueError(f"k={list(self.k)} must be positive and hold headline_k={self.headline_k}")
        if min(self.per_class, default=1) < 1 or len(set(self.per_class)) < len(self.per_class):
            raise ValueError(f"per_class={list(self.per_class)} must be positive numbers, each once")
        return self

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without few-shot its fields are left out: definitions older than them keep their fingerprints."""
        values = handler(self)
        if not self.per_class:
            del values["per_class"], values["num_tries"]
        return values


def run(train: Split, test: Split, parameters: Parameters, context: Context) -> Outcome:
    """Score test features [M, D] against train features [N, D]."""
    ranks, predictions = _classify(train, test, parameters.k, parameters, context)
    scores = {}
    for k in (parameters.headline_k, *parameters.k):
        suffix = f"_k{k}" if len(scores) >= 2 else ""
        scores |= {f"{name}{suffix}": value for name, value in _accuracies(ranks[k], k, parameters).items()}
    scores |= few_shot(train, test, parameters, context)
    correct = ranks[parameters.headline_k] == 0
    samples = sample_table(test, predictions[parameters.headline_k], correct)
    interval = mean_interval(100.0 * correct.numpy(), seed=context.seed)
    notes = []
    if parameters.per_class:
        notes.append(
            f"few-shot: mean over {parameters.num_tries} draws of {list(parameters.per_class)} train images per class, "
            "those of the official code where train is in its order"
        )
    return Outcome(scores, n=len(correct), interval=interval, samples=samples, notes=notes)


def few_shot(train: Split, test: Split, parameters: Parameters, context: Context) -> dict[str, float]:
    """Mean accuracies in percent over the tries for each n of `per_class` and each k up to n, and their deviation.

    Raises:
        DinobenchError: a class has fewer than n train images.
    """
    scores: dict[str, float] = {}
    for number in parameters.per_class:
        _check_classes(train.labels, number, context)
        ks = sorted({k for k in parameters.k if k < number} | {number})
        tries: dict[str, list[float]] = {}
        for seed in range(parameters.num_tries):
            chosen = draw_per_class(train.labels, number, seed)
            drawn = Split(train.features[chosen], train.labels[chosen], train.index[chosen])
            ranks, _ = _classify(drawn, test, ks, parameters, context)
            for k in ks:
                for name, value in _accuracies(ranks[k], k, parameters).items():
                    tries.setdefault(f"{name}_shot{number}_k{k}", []).append(value)
        for name, values in tries.items():
            scores[name] = sum(values) / len(values)
            if len(values) > 1:
                scores[f"{name}_sd"] = torch.tensor(values, dtype=torch.float64).std().item()
    return scores


def _classify(
    train: Split, test: Split, k: Sequence[int], parameters: Parameters, context: Context
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    return classify(
        train.features,
        train.labels,
        test.features,
        test.labels,
        k=k,
        num_classes=context.num_classes,
        temperature=parameters.temperature,
        weighting=parameters.weighting,
        backend=context.backend,
        device=context.device,
    )


def _accuracies(rank: Tensor, k: int, parameters: Parameters) -> dict[str, float]:
    """Top-1 and top-5 in percent from the ranks [M] of the true classes."""
    best = min(5, k) if parameters.weighting == "dino" else 5
    return {
        "top1": 100 * (rank == 0).double().mean().item(),
        "top5": 100 * (rank < best).double().mean().item(),
    }


def _check_classes(labels: Tensor, number: int, context: Context) -> None:
    present, counts = labels.unique(return_counts=True)
    if counts.min() < number:
        label = int(present[counts.argmin()])
        name = context.classes[label] if label < len(context.classes) else str(label)
        raise DinobenchError(
            f"{number} train images per class are drawn, but class {name!r} has {int(counts.min())}: use smaller "
            "numbers in per_class in a copy of the suite definition"
        )


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
