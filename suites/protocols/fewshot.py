"""Few labelled images: a classifier on frozen features from 1, 2, 5 images per class, 1 % or 10 % of train.

The labelled images are seeded draws, `num_draws` of each size, or fixed lists in files (MSN's imagenet_subsets, the
1 % and 10 % of SimCLR), see suites.image_lists. All are scored on the whole test part. For a size named `shot1` or
`percent1`, the score of that name is the mean accuracy over its draws or lists and `shot1_sd` their standard deviation,
where there are several.

    nearest_mean  cosine similarity with the mean of a class's L2-normalised features (the nearest-centroid classifier
                  of SimpleShot, Wang et al. 2019; ties: lower label)
    logistic      MSN's (facebookresearch/msn `logistic_eval.py`): rows centred on their own mean, then L2-normalised;
                  multinomial, lambda = logistic_penalty / n, no intercept, so that C = 1 / logistic_penalty for any n
    ridge         least squares on one-hot labels, ||X W + b - Y||^2 + ridge_penalty ||W||^2, L2-normalised features;
                  the class of the largest output (scikit-learn's RidgeClassifier)

The interval is over test images, with the draws as they are. `correct` of a sample is its share of right draws at the
first size; `prediction` is its most frequent class there.

Shapes: N train images, n of them labelled, M test images, D features, C classes present in train, S draws or lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from pretrain.errors import DinobenchError
from suites.image_lists import list_digest, read_list
from suites.interval import mean_interval
from suites.multinomial import LogisticPath
from suites.protocols.logistic import prepare_rows
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split, sample_table

NEEDS_LABELS = True
LOGISTIC_TOLERANCE = 1e-4
"""Relative gradient norm at which a fit ends (cyanure, in MSN: relative duality gap 1e-3)."""


class Parameters(ProtocolParameters):
    """Numbers that define the score."""

    shots: tuple[int, ...] = (1, 5)
    """Labelled images per class, drawn."""
    num_draws: int = Field(default=50, ge=2)
    percents: tuple[float, ...] = ()
    """Labelled share of every class in percent (at least one image), drawn."""
    lists: dict[str, tuple[Path, ...]] = Field(default_factory=dict)
    """Name of a size (shot1, percent10) -> files with one image per line, scored instead of draws."""
    classifier: Literal["nearest_mean", "logistic", "ridge"] = "nearest_mean"
    logistic_penalty: float = Field(default=0.00025, gt=0)
    """MSN's `--lambd`: 0.00025 by default, 0.0025 in its README for five images per class."""
    ridge_penalty: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Parameters:
        names = [*(f"shot{shots}" for shots in self.shots), *map(percent_name, self.percents), *self.lists]
        if not names or len(set(names)) < len(names) or min([*self.shots, *self.percents, 1]) <= 0:
            raise ValueError(
                "expected positive sizes of different names in shots, percents or lists, found "
                f"shots={list(self.shots)}, percents={list(self.percents)}, lists={list(self.lists)}"
            )
        if any(not files for files in self.lists.values()):
            raise ValueError("every name in lists needs at least one file")
        for file in chain.from_iterable(self.lists.values()):
            list_digest(file)  # refuses a missing file here, where the definition is read
        return self

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Lists by their content. Fields that came after version 1 only where set: its fingerprints stay."""
        values = handler(self)
        values["lists"] = {name: [list_digest(file) for file in files] for name, files in self.lists.items()}
        added = {key: field for key, field in type(self).model_fields.items() if key not in ("shots", "num_draws")}
        for key, field in added.items():
            if getattr(self, key) == field.get_default(call_default_factory=True):
                del values[key]
        return values


def run(train: Split, test: Split, parameters: Parameters, context: Context) -> Outcome:
    """Score test features [M, D] with classifiers fitted on few train images."""
    classify = {"nearest_mean": nearest_mean, "logistic": logistic, "ridge": ridge}[parameters.classifier]
    features, queries = train.features.to(context.device), test.features.to(context.device)
    labels = train.labels.to(context.device)
    scores: dict[str, float] = {}
    shares, predictions = [], []
    for name, chosen in labelled_rows(train, parameters, context).items():
        subsets = [rows.to(context.device) for rows in chosen]
        predicted = classify(features, labels, subsets, queries, parameters).cpu()
        correct = (predicted == test.labels[:, None]).double()
        scores[name] = 100 * correct.mean().item()
        if len(chosen) > 1:
            scores[f"{name}_sd"] = 100 * correct.mean(0).std().item()
        shares.append(correct.mean(1))
        predictions.append(predicted.mode(1).values)
    interval = mean_interval(100 * shares[0].numpy(), seed=context.seed)
    samples = sample_table(test, predictions[0], shares[0])
    return Outcome(scores, len(test), interval, samples, notes=_notes(parameters))


def labelled_rows(train: Split, parameters: Parameters, context: Context) -> dict[str, list[Tensor]]:
    """For each size by name, the numbers [n] of the labelled train images of every draw or list.

    Raises:
        DinobenchError: too few images of a class, or a list that does not fit the data set.
    """
    present = train.labels.unique()
    counts = train.labels.bincount()[present]
    if parameters.shots and counts.min() < max(parameters.shots):
        label = int(present[counts.argmin()])
        name = context.classes[label] if label < len(context.classes) else str(label)
        raise DinobenchError(
            f"{max(parameters.shots)} labelled images per class are drawn, but class {name!r} has {int(counts.min())} "
            "train images; use fewer shots in a copy of the suite definition"
        )
    sizes: dict[str, list[Tensor]] = {}
    for shots in parameters.shots:
        sizes[f"shot{shots}"] = draw(train.labels, [shots] * len(present), parameters.num_draws, context.seed)
    for percent in parameters.percents:
        numbers = [max(1, round(percent / 100 * count)) for count in counts.tolist()]
        sizes[percent_name(percent)] = draw(train.labels, numbers, parameters.num_draws, context.seed)
    for name, files in parameters.lists.items():
        if train.path is None:
            raise DinobenchError("lists of images need a data set of image files, these features have no paths")
        sizes[name] = [read_list(file, train.path, train.labels, context.classes) for file in files]
    return sizes


def draw(labels: Tensor, numbers: Sequence[int], num_draws: int, seed: int) -> list[Tensor]:
    """Rows [n] of `num_draws` draws: of each class in labels [N], in label order, its number of different images."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label, number in zip(labels.unique(), numbers, strict=True):
        members = (labels == label).nonzero().flatten()
        keys = torch.rand(num_draws, len(members), generator=generator)
        drawn.append(members[keys.argsort(1)[:, :number]])
    return list(torch.cat(drawn, dim=1))


def nearest_mean(
    features: Tensor, labels: Tensor, subsets: Sequence[Tensor], queries: Tensor, parameters: Parameters
) -> Tensor:
    """Predicted labels [M, S] of queries [M, D] from features [N, D] and labels [N] at each of the subsets [n]."""
    features, queries = nn.functional.normalize(features, dim=1), nn.functional.normalize(queries, dim=1)
    present = labels.unique()
    means = torch.stack([class_means(features[rows], labels[rows], present) for rows in subsets])
    num_draws, num_classes, dim = means.shape
    parts = [
        present[(block @ means.view(-1, dim).T).view(-1, num_draws, num_classes).argmax(2)]
        for block in queries.split(max(1, 2**24 // (num_draws * num_classes)))
    ]
    return torch.cat(parts)


def class_means(features: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """Direction [C, D] of the mean of each class from features [n, D] and labels [n]."""
    means = torch.stack([features[labels == label].mean(0) for label in present])
    return nn.functional.normalize(means, dim=1)


def logistic(
    features: Tensor, labels: Tensor, subsets: Sequence[Tensor], queries: Tensor, parameters: Parameters
) -> Tensor:
    """As `nearest_mean`, by MSN's logistic regression."""
    features, queries = (prepare_rows(x, centre=True, scale=True) for x in (features, queries))
    predicted = []
    for rows in subsets:
        path = LogisticPath(features[rows], labels[rows], intercept=False, tolerance=LOGISTIC_TOLERANCE)
        fit = path.fit(1 / parameters.logistic_penalty)
        predicted.append(torch.cat([fit.labels[fit.logits(block).argmax(1)] for block in queries.split(4096)]))
    return torch.stack(predicted, dim=1)


def ridge(
    features: Tensor, labels: Tensor, subsets: Sequence[Tensor], queries: Tensor, parameters: Parameters
) -> Tensor:
    """As `nearest_mean`, by ridge regression."""
    features, queries = (prepare_rows(x, centre=False, scale=True) for x in (features, queries))
    predicted = []
    for rows in subsets:
        present, target = labels[rows].unique(return_inverse=True)
        one_hot = nn.functional.one_hot(target).double()
        weight, bias = ridge_fit(features[rows], one_hot, parameters.ridge_penalty)
        scores = (torch.addmm(bias, block, weight) for block in queries.split(4096))
        predicted.append(torch.cat([present[score.argmax(1)] for score in scores]))
    return torch.stack(predicted, dim=1)


def ridge_fit(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight [D, C] and bias [C] for x [n, D] and targets y [n, C], by the smaller of the two normal equations."""
    shift, level = x.mean(0), y.mean(0)
    x, y = x - shift, y - level
    if len(x) < x.shape[1]:
        gram = x @ x.T
        weight = x.T @ torch.linalg.solve(gram + penalty * torch.eye(len(x)).to(gram), y)
    else:
        moment = x.T @ x
        weight = torch.linalg.solve(moment + penalty * torch.eye(x.shape[1]).to(moment), x.T @ y)
    return weight, level - shift @ weight


def percent_name(percent: float) -> str:
    """Name of the score for a labelled share in percent: percent1, percent0_5."""
    return f"percent{percent:g}".replace(".", "_")


def _notes(parameters: Parameters) -> list[str]:
    notes = []
    if parameters.shots:
        notes.append(f"mean over {parameters.num_draws} draws of {list(parameters.shots)} train images per class")
    if parameters.percents:
        notes.append(f"mean over {parameters.num_draws} draws of {list(parameters.percents)} % of train, by class")
    for name, files in parameters.lists.items():
        notes.append(f"{name}: mean over the lists {', '.join(file.name for file in files)}")
    return notes
