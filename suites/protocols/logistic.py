"""Multinomial logistic regression on frozen features, its L2 penalty chosen on a held-out part of train (DINOv2).

Source: facebookresearch/dinov2 `dinov2/eval/log_regression.py`: features as they are, in float64, C on the grid
10^linspace(-6, 5, 45). Each C is fitted on nine tenths of train and the one of highest accuracy on the rest is taken
(ties: lower cross-entropy, then lower C); then the classifier is fitted on all of train, and the test part is read
once. The penalties are one path of warm starts, see suites.multinomial.

Options for the other protocols of this kind: rows scaled to length 1, without intercept (iBOT: C = 1 / (lambda n) for
its lambda of 0.01, 0.1, 1); rows centred on their own mean before (MSN: C = 1 / lambd for its `--lambd`).

Departures from the official code: the held-out part is stratified by class and drawn with torch's CPU generator; a fit
ends at a relative gradient norm of `tolerance` instead of cuML's criterion at 1e-12 (with at most 1000 iterations).

Shapes: N train images, M test images, D features, C classes, P penalties.
"""

from __future__ import annotations

import pandas as pd
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from suites.interval import mean_interval
from suites.multinomial import MAX_EVALUATIONS, TOLERANCE, LogisticFit, LogisticPath
from suites.protocols.knn import rank_of
from suites.protocols.linear import held_out_split, select
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split, sample_table

NEEDS_LABELS = True


class Parameters(ProtocolParameters):
    """Numbers that define the score."""

    first_exponent: float = -6
    last_exponent: float = 5
    num_penalties: int = Field(default=45, ge=1)
    """C = 10^e, e evenly spaced from the first exponent to the last."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of train on which C is chosen."""
    intercept: bool = True
    centre_rows: bool = False
    normalise_rows: bool = False
    tolerance: float = Field(default=TOLERANCE, gt=0)
    """Gradient norm at which a fit ends, relative to that at zero weights."""
    max_evaluations: int = Field(default=MAX_EVALUATIONS, ge=1)
    """Passes over the data after which a fit ends anyway."""

    @model_validator(mode="after")
    def _check(self) -> Parameters:
        if self.last_exponent < self.first_exponent:
            raise ValueError(f"last_exponent={self.last_exponent} lies below first_exponent={self.first_exponent}")
        return self

    @property
    def penalties(self) -> list[float]:
        """C in rising order."""
        step = (self.last_exponent - self.first_exponent) / max(self.num_penalties - 1, 1)
        return [10 ** (self.first_exponent + i * step) for i in range(self.num_penalties)]


def run(train: Split, test: Split, parameters: Parameters, context: Context) -> Outcome:
    """Choose C inside train, fit all of train, score test features [M, D]."""
    features, queries = (
        prepare_rows(split.features.to(context.device), centre=parameters.centre_rows, scale=parameters.normalise_rows)
        for split in (train, test)
    )
    labels = train.labels.to(context.device)
    table, num_held = _validate(features, labels, parameters, context)
    accuracy = table["held_out_top1"].tolist()
    best = select(torch.tensor(accuracy), torch.tensor(table["held_out_loss"].tolist()))
    assert best is not None, "a convex problem has finite solutions"
    c = parameters.penalties[best]
    final = _path(features, labels, parameters).fit(c)
    score = class_scores(final, queries, context.num_classes)
    rank = rank_of(test.labels[:, None], score)
    correct = rank == 0
    scores = {
        "top1": 100 * correct.double().mean().item(),
        "top5": 100 * (rank < 5).double().mean().item(),
        "held_out_top1": accuracy[best],
        "C": c,
    }
    interval = mean_interval(100.0 * correct.numpy(), seed=context.seed)
    samples = sample_table(test, score.argmax(1), correct)
    return Outcome(scores, len(test), interval, samples, {"path": table}, _notes(table, best, num_held, final))


def _validate(features: Tensor, labels: Tensor, parameters: Parameters, context: Context) -> tuple[pd.DataFrame, int]:
    """One row per C: accuracy in percent and cross-entropy on the held-out part; and the number of its images."""
    fit, held = (part.to(features.device) for part in held_out_split(labels.cpu(), parameters.held_out, context.seed))
    path = _path(features[fit], labels[fit], parameters)
    queries, target = features[held], labels[held].cpu()
    rows = []
    for c in parameters.penalties:
        found = path.fit(c)
        score = class_scores(found, queries, context.num_classes)
        accuracy = 100 * (score.argmax(1) == target).double().mean().item()
        # A held-out class that the fit part lacks would have probability 0; held_out_split leaves none such.
        loss = nn.functional.cross_entropy(score, target).item()
        rows.append((c, accuracy, loss, found.evaluations, found.gradient_norm, found.converged))
    columns = ["C", "held_out_top1", "held_out_loss", "evaluations", "gradient_norm", "converged"]
    return pd.DataFrame(rows, columns=columns), len(held)


def _path(features: Tensor, labels: Tensor, parameters: Parameters) -> LogisticPath:
    return LogisticPath(
        features,
        labels,
        intercept=parameters.intercept,
        tolerance=parameters.tolerance,
        max_evaluations=parameters.max_evaluations,
    )


def _notes(table: pd.DataFrame, best: int, num_held: int, final: LogisticFit) -> list[str]:
    notes = [
        f"C={table['C'][best]:.3g} chosen among {len(table)} on {num_held} images of train; the path took "
        f"{table['evaluations'].sum()} passes over its features, the last fit from zero weights {final.evaluations}"
    ]
    if len(table) > 1 and best in (0, len(table) - 1):
        notes.append("the chosen C is at the edge of the grid")
    unfinished = [*table["converged"], final.converged].count(False)
    if unfinished:
        notes.append(f"{unfinished} of {len(table) + 1} fits ended above the tolerance")
    return notes


def prepare_rows(features: Tensor, *, centre: bool, scale: bool) -> Tensor:
    """Each row of features [N, D] in float64, shifted by its own mean and then scaled to length 1 where asked for."""
    x = features.double()
    if centre:
        x = x - x.mean(1, keepdim=True)
    return nn.functional.normalize(x, dim=1) if scale else x


def class_scores(fit: LogisticFit, features: Tensor, num_classes: int) -> Tensor:
    """Logits [N, C] on the CPU for features [N, D]; a class that was not trained on has -inf."""
    parts = []
    for block in features.split(4096):
        score = torch.full((len(block), num_classes), -torch.inf, dtype=torch.float64)
        score[:, fit.labels.cpu()] = fit.logits(block).cpu()
        parts.append(score)
    return torch.cat(parts)
