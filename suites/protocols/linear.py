"""Linear classification of frozen features (DINO, appendix F.2; eval_linear.py), on features extracted once.

Weight N(0, 0.01), bias 0; SGD, momentum 0.9, no weight decay; learning rates given for a batch of 256 and scaled by
batch / 256; cosine to 0, stepped per epoch. All learning rates of the sweep train at once, on the same batches and from
the same initial weights: they are one matrix [R * C, D], one product per step.

The rate is selected on a held-out part of train, stratified by class (highest accuracy, then lowest cross-entropy; mean
over `num_folds` disjoint parts where a set is small). Then the classifier is trained again, on all of train, with that
rate, and the test part is read once. (The official script reports the best epoch and rate on the evaluation set.)
With `standardise`, features are shifted and scaled per dimension by the statistics of the images trained on.

Shapes: N images, D features, C classes, R learning rates, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pretrain.errors import DinobenchError
from suites.interval import mean_interval
from suites.protocols.knn import rank_of
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split, sample_table

NEEDS_LABELS = True
DINO_RATES = tuple(mantissa * 10.0**exponent for exponent in range(-4, 1) for mantissa in (1, 2, 5))


class Parameters(ProtocolParameters):
    """Numbers that define the score."""

    learning_rates: tuple[float, ...] = Field(default=DINO_RATES, min_length=1)
    """For a batch of 256; used times batch_size / 256."""
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=1024, ge=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of train on which the learning rate is selected."""
    num_folds: int = Field(default=1, ge=1)
    """Disjoint held-out parts, one after the other, whose mean decides."""
    standardise: bool = False

    @model_validator(mode="after")
    def _check(self) -> Parameters:
        if self.num_folds * self.held_out > 1 + 1e-9:
            raise ValueError(f"num_folds={self.num_folds} parts of held_out={self.held_out} are more than all of train")
        return self


def run(train: Split, test: Split, parameters: Parameters, context: Context) -> Outcome:
    """Select the rate inside train, fit all of train, score test features [M, D]."""
    features, labels = train.features.to(context.device), train.labels.to(context.device)
    accuracy, loss, num_held = _validate(features, labels, parameters, context)
    best = select(accuracy, loss)
    if best is None:
        raise DinobenchError(
            "every learning rate of the linear sweep diverged (non-finite loss); use smaller learning_rates or "
            "standardise: true in a copy of the suite definition"
        )
    rate = parameters.learning_rates[best]
    final = fit_sweep(features, labels, torch.arange(len(labels)), [rate], parameters, context)
    score = final.logits(test.features.to(context.device))[:, 0].cpu()
    rank = rank_of(test.labels[:, None], score)
    correct = rank == 0
    scores = {
        "top1": 100 * correct.double().mean().item(),
        "top5": 100 * (rank < 5).double().mean().item(),
        "held_out_top1": 100 * accuracy[best].item(),
        "learning_rate": rate,
    }
    notes = [f"learning rate {rate:g} (per 256 images) selected among {len(accuracy)} on {num_held} images of train"]
    if len(accuracy) > 1 and best in (0, len(accuracy) - 1):
        notes.append("the selected learning rate is at the edge of the sweep")
    interval = mean_interval(100.0 * correct.numpy(), seed=context.seed)
    return Outcome(scores, len(correct), interval, sample_table(test, score.argmax(1), correct), notes=notes)


def _validate(features: Tensor, labels: Tensor, parameters: Parameters, context: Context) -> tuple[Tensor, Tensor, int]:
    """Accuracy [R] and loss [R] of every rate on the held-out parts of train, and the number of images in them."""
    accuracy, loss, num_held = torch.zeros(()), torch.zeros(()), 0
    for fold in range(parameters.num_folds):
        fit, held = held_out_split(labels.cpu(), parameters.held_out, context.seed, fold)
        classifiers = fit_sweep(features, labels, fit, parameters.learning_rates, parameters, context)
        hits, losses = _score_sweep(classifiers, features[held], labels[held])
        accuracy, loss, num_held = accuracy + hits, loss + losses, num_held + len(held)
    return accuracy / num_held, loss / num_held, num_held


class Standardiser:
    """Shift and scale per dimension, from the images trained on; nothing when it is off."""

    def __init__(self, fitted_on: Tensor | None):
        """`fitted_on` [N, D], or None for no change."""
        self.mean = self.scale = None
        if fitted_on is not None:
            self.mean = fitted_on.mean(0)
            self.scale = 1 / fitted_on.std(0, correction=0).clamp_min(1e-6)

    def __call__(self, features: Tensor) -> Tensor:
        return features if self.mean is None or self.scale is None else (features - self.mean) * self.scale


class Classifiers:
    """R linear classifiers: weight [R * C, D], bias [R * C]."""

    def __init__(self, weight: Tensor, bias: Tensor, num_rates: int, standardise: Standardiser):
        self.weight, self.bias, self.num_rates, self.standardise = weight, bias, num_rates, standardise

    def logits(self, features: Tensor) -> Tensor:
        """features [N, D] -> logits [N, R, C]."""
        return self.of_standardised(self.standardise(features))

    def of_standardised(self, x: Tensor) -> Tensor:
        """x [N, D], standardised already -> logits [N, R, C]."""
        return torch.addmm(self.bias, x, self.weight.T).unflatten(1, (self.num_rates, -1))


def fit_sweep(
    features: Tensor, labels: Tensor, rows: Tensor, rates: Sequence[float], parameters: Parameters, context: Context
) -> Classifiers:
    """Train one classifier per rate on the images `rows` of features [N, D] and labels [N].

    Nothing of the size of the features is copied unless they are standardised.
    """
    device, num_classes = features.device, context.num_classes
    generator = torch.Generator().manual_seed(context.seed)
    initial = 0.01 * torch.randn(num_classes, features.shape[1], generator=generator)
    weight = initial.to(device).repeat(len(rates), 1)
    bias = weight.new_zeros(len(weight))
    weight_step, bias_step = torch.zeros_like(weight), torch.zeros_like(bias)
    standardise = Standardiser(features[rows.to(device)] if parameters.standardise else None)
    classifiers = Classifiers(weight, bias, len(rates), standardise)
    peak = torch.tensor(rates, device=device).repeat_interleave(num_classes) * parameters.batch_size / 256
    for epoch in range(parameters.epochs):
        rate = peak * (0.5 + 0.5 * math.cos(math.pi * epoch / parameters.epochs))
        order = rows[torch.randperm(len(rows), generator=generator)].to(device)
        for chosen in order.split(parameters.batch_size):
            x, y = standardise(features[chosen]), labels[chosen]
            # Gradient of the mean cross-entropy with respect to the logits, in closed form: (softmax - one-hot) / B.
            error = classifiers.of_standardised(x).softmax(2)
            error.scatter_add_(2, y[:, None, None].expand(-1, len(rates), 1), error.new_full((), -1).expand_as(error))
            error = error.div_(len(chosen)).flatten(1)
            weight_step.mul_(parameters.momentum).addmm_(error.T, x)
            bias_step.mul_(parameters.momentum).add_(error.sum(0))
            weight.addcmul_(rate[:, None], weight_step, value=-1)
            bias.addcmul_(rate, bias_step, value=-1)
    return classifiers


def held_out_split(labels: Tensor, share: float, seed: int, fold: int = 0) -> tuple[Tensor, Tensor]:
    """Indices (fit, held out) of a stratified split: part `fold` of each class, at least one image in all.

    A class of one image stays in the fit part.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        start, stop = (round(share * part * len(members)) for part in (fold, fold + 1))
        held[members[start : min(stop, start + len(members) - 1)]] = True
    if not held.any():
        counts = labels.bincount()
        if counts.max() < 2:
            raise DinobenchError("a part of train is held out, which needs a class with two train images: give more")
        held[(labels == counts.argmax()).nonzero().flatten()[0]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _score_sweep(classifiers: Classifiers, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number of hits [R] and summed cross-entropy [R] on features [N, D], in chunks."""
    hits, losses = [], []
    for x, y in zip(features.split(4096), labels.split(4096), strict=True):
        logits = classifiers.logits(x)
        hits.append((logits.argmax(2) == y[:, None]).double().sum(0))
        target = y[:, None].expand(-1, logits.shape[1])
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none"))
    loss = torch.cat([part.unflatten(0, (-1, classifiers.num_rates)) for part in losses]).double().sum(0)
    return torch.stack(hits).sum(0).cpu(), loss.cpu()


def select(accuracy: Tensor, loss: Tensor) -> int | None:
    """Index of the best rate: highest accuracy, then lowest loss, then lowest index; None when all diverged."""
    usable = [i for i in range(len(loss)) if torch.isfinite(loss[i])]
    return max(usable, key=lambda i: (accuracy[i].item(), -loss[i].item(), -i), default=None)
