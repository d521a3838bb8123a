"""Few labelled images per class: nearest class mean on frozen features, averaged over random draws.

Features are L2-normalised; a class is the mean of the features of its few train images; a test image gets the class of
highest cosine similarity (the nearest-centroid classifier of SimpleShot, Wang et al. 2019; ties: lower label). For each
number of shots, `num_draws` draws of labelled images are taken from train, all scored on the whole test part:
`shot1` is the mean accuracy over the draws of one image per class, `shot1_sd` the standard deviation over the draws.
The interval is over test images, with the draws as they are. `correct` of a sample is its share of right draws at the
first number of shots; `prediction` is its most frequent class there.

Shapes: N train images, M test images, D features, C classes, S draws.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.errors import DinobenchError
from suites.interval import mean_interval
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split, sample_table

NEEDS_LABELS = True


class Parameters(ProtocolParameters):
    """Numbers that define the score."""

    shots: tuple[int, ...] = Field(default=(1, 5), min_length=1)
    """Labelled images per class; the first one is the headline."""
    num_draws: int = Field(default=50, ge=2)


def run(train: Split, test: Split, parameters: Parameters, context: Context) -> Outcome:
    """Score test features [M, D] against class means of few train images."""
    present = train.labels.unique()
    counts = train.labels.bincount()[present]
    if counts.min() < max(parameters.shots):
        label = int(present[counts.argmin()])
        name = context.classes[label] if label < len(context.classes) else str(label)
        raise DinobenchError(
            f"{max(parameters.shots)} labelled images per class are drawn, but class {name!r} has {int(counts.min())} "
            "train images; use fewer shots in a copy of the suite definition"
        )
    features = nn.functional.normalize(train.features.to(context.device), dim=1)
    queries = nn.functional.normalize(test.features.to(context.device), dim=1)
    scores: dict[str, float] = {}
    shares, predictions = [], []
    for shots in parameters.shots:
        chosen = draw(train.labels, present, shots, parameters.num_draws, context.seed)
        predicted = classify(features, chosen.to(context.device), queries, present.to(context.device)).cpu()
        correct = (predicted == test.labels[:, None]).double()
        scores[f"shot{shots}"] = 100 * correct.mean().item()
        scores[f"shot{shots}_sd"] = 100 * correct.mean(0).std().item()
        shares.append(correct.mean(1))
        predictions.append(predicted.mode(1).values)
    interval = mean_interval(100 * shares[0].numpy(), seed=context.seed)
    samples = sample_table(test, predictions[0], shares[0])
    notes = [f"mean over {parameters.num_draws} draws of {list(parameters.shots)} train images per class"]
    return Outcome(scores, len(test), interval, samples, notes=notes)


def draw(labels: Tensor, present: Tensor, shots: int, num_draws: int, seed: int) -> Tensor:
    """Train indices [S, C, shots]: for each draw and each class of `present`, `shots` different images."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in present:
        members = (labels == label).nonzero().flatten()
        keys = torch.rand(num_draws, len(members), generator=generator)
        drawn.append(members[keys.argsort(1)[:, :shots]])
    return torch.stack(drawn, dim=1)


def classify(features: Tensor, chosen: Tensor, queries: Tensor, present: Tensor) -> Tensor:
    """Predicted labels [M, S] of queries [M, D] from features [N, D] chosen [S, C, shots]."""
    means = nn.functional.normalize(features[chosen].mean(2), dim=-1)
    num_draws, num_classes, dim = means.shape
    parts = [
        present[(block @ means.view(-1, dim).T).view(-1, num_draws, num_classes).argmax(2)]
        for block in queries.split(max(1, 2**24 // (num_draws * num_classes)))
    ]
    return torch.cat(parts)
