"""Linear classification over DINOv2's grid: learning rates x last blocks x mean patch token, trained all at once.

Source: facebookresearch/dinov2 `dinov2/eval/linear.py`. 13 learning rates (for a batch of 256, used times batch / 256),
the CLS tokens of the last 1 or 4 blocks, without or with the mean patch token of the last block: 52 linear heads.
Weight N(0, 0.01), bias 0; SGD, momentum 0.9, no weight decay; cosine to 0, stepped per iteration.

One extraction serves all: the suite's feature {last: 4, avgpool: true} is [CLS of 4 blocks, oldest first; mean patch],
in which the input of every head is a run of neighbouring columns. The heads of one input are one matrix [R * C, D],
one product per step. All heads see the same batches and start from the columns of one initial matrix, so that a head
does not depend on which others are trained beside it.

selection: held_out   the head is chosen on a part of train, stratified by class (highest accuracy, then lowest
                      cross-entropy), trained again on all of train, and the test part is read once
           test       as in the official script: the best of all heads on the test part itself (ties: the first, in the
                      order of blocks, mean patch, rate), an optimistic number

Departures from the official code: features are extracted once, without its crops and flips; the heads of a
configuration that its five-decimal names would merge (a global batch of 64 or 128, as on one GPU) stay apart.

Shapes: N images, W columns of the feature, D columns of one input, C classes, R learning rates, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.errors import DinobenchError, UsageError
from pretrain.models.backbones import feature_dim
from suites.interval import mean_interval
from suites.protocols.knn import rank_of
from suites.protocols.linear import Classifiers, Standardiser, held_out_split, select
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split, sample_table

NEEDS_LABELS = True
STREAMS = True
DINOV2_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


class Parameters(ProtocolParameters):
    """Numbers that define the score; the defaults are the official ones, with a global batch of 8 GPUs."""

    learning_rates: tuple[float, ...] = Field(default=DINOV2_RATES, min_length=1)
    """For a batch of 256; used times batch_size / 256."""
    num_blocks: tuple[int, ...] = Field(default=(1, 4), min_length=1)
    avgpool: tuple[bool, ...] = Field(default=(False, True), min_length=1)
    epochs: int = Field(default=10, ge=1)
    epoch_length: int | None = Field(default=1250, ge=1)
    """Iterations per epoch; None = one pass over the images trained on."""
    batch_size: int = Field(default=1024, ge=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    selection: Literal["held_out", "test"] = "held_out"
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of train on which the head is chosen; not used with selection: test."""


@dataclass(frozen=True)
class Input:
    """What a head reads: columns [start, stop) of the feature."""

    num_blocks: int
    avgpool: bool
    start: int
    stop: int

    def of(self, features: Tensor) -> Tensor:
        """features [N, W] -> [N, D]."""
        return features[:, self.start : self.stop]


@dataclass(frozen=True)
class Head:
    """One configuration of the grid."""

    source: Input
    learning_rate: float


class TrainedHeads:
    """H linear heads on one feature."""

    def __init__(self, groups: list[tuple[Input, Classifiers]]):
        """`groups`: per input, the classifiers that read it."""
        self.groups = groups

    def logits(self, features: Tensor) -> Tensor:
        """features [N, W] -> logits [N, H, C], heads in the order they were given."""
        return torch.cat([classifiers.logits(source.of(features)) for source, classifiers in self.groups], dim=1)


def run(train: Split, test: Split, parameters: Parameters, context: Context) -> Outcome:
    """Choose one head of the grid and score test features [M, W] with it."""
    inputs = find_inputs(train.features.shape[1], parameters, context)
    grid = [Head(source, rate) for source in inputs for rate in parameters.learning_rates]
    everything = torch.arange(len(train))
    if parameters.selection == "test":
        trained = fit_heads(train, everything, grid, parameters, context)
        accuracy, loss = evaluate(trained, test, torch.arange(len(test)), context)
        number = _number(select(accuracy, 0 * loss))  # the official rule knows no loss: the first of the best
        how = f"best of {len(grid)} on the {len(test)} test images themselves, as in the official script: optimistic"
    else:
        fit, held = held_out_split(train.labels, parameters.held_out, context.seed)
        accuracy, loss = evaluate(fit_heads(train, fit, grid, parameters, context), train, held, context)
        number = _number(select(accuracy, loss))
        trained = fit_heads(train, everything, [grid[number]], parameters, context)
        how = f"chosen among {len(grid)} on {len(held)} images of train, trained again on all of train"
    place = number if parameters.selection == "test" else 0
    blocks = torch.arange(len(test)).split(512)
    score = torch.cat([trained.logits(test.take(rows, context.device))[:, place].cpu() for rows in blocks])
    rank = rank_of(test.labels[:, None], score)
    correct = rank == 0
    chosen = grid[number]
    scores = {
        "top1": 100 * correct.double().mean().item(),
        "top5": 100 * (rank < 5).double().mean().item(),
        "learning_rate": chosen.learning_rate,
        "num_blocks": float(chosen.source.num_blocks),
        "avgpool": float(chosen.source.avgpool),
    }
    if parameters.selection == "held_out":
        scores["held_out_top1"] = 100 * accuracy[number].item()
    samples = sample_table(test, score.argmax(1), correct)
    tables = {"heads": _table(grid, accuracy, loss, parameters.selection)}
    interval = mean_interval(100.0 * correct.numpy(), seed=context.seed)
    return Outcome(scores, len(test), interval, samples, tables, _notes(chosen, how, parameters, inputs))


def find_inputs(width: int, parameters: Parameters, context: Context) -> list[Input]:
    """The inputs of the grid in a feature of `width` columns; all of it for pixels, which have no blocks.

    Raises:
        UsageError: the suite's feature is not the CLS of the last blocks with or without the mean patch token.
    """
    if context.model is None:
        return [Input(1, False, 0, width)]
    pooled = any(parameters.avgpool)
    dim = feature_dim(context.model.backbone)
    # A backbone with fewer blocks than asked for gives all it has.
    num_cls = width // dim - pooled
    if width % dim or not 1 <= num_cls <= max(parameters.num_blocks):
        expected = f"{{last: {max(parameters.num_blocks)}, avgpool: {str(pooled).lower()}}}"
        raise UsageError(
            f"linear_sweep with num_blocks={list(parameters.num_blocks)}, avgpool={list(parameters.avgpool)} needs the "
            f"suite's feature {expected}, found {width} columns of a backbone with {dim}"
        )
    found = {}
    for blocks in (min(number, num_cls) for number in parameters.num_blocks):
        for pool in parameters.avgpool:
            found[blocks, pool] = Input(blocks, pool, (num_cls - blocks) * dim, (num_cls + pool) * dim)
    return list(found.values())


def fit_heads(
    split: Split, rows: Tensor, heads: Sequence[Head], parameters: Parameters, context: Context
) -> TrainedHeads:
    """Train `heads`, those of one input next to each other, on the images `rows` of the split."""
    generator = torch.Generator().manual_seed(context.seed)
    initial = 0.01 * torch.randn(context.num_classes, split.features.shape[1], generator=generator)
    groups = [
        HeadGroup(
            source, [head.learning_rate for head in members], initial, split.take(slice(0)).dtype, parameters, context
        )
        for source, members in groupby(heads, key=lambda head: head.source)
    ]
    length = parameters.epoch_length or max(1, round(len(rows) / parameters.batch_size))
    total = parameters.epochs * length
    batches = islice(_stream(rows, parameters.batch_size, generator), total)
    for iteration, chosen in enumerate(batches):
        # Gathered where the features lie, then moved: they need not fit on the device.
        x, y = split.take(chosen, context.device), split.labels[chosen].to(context.device)
        decay = 0.5 + 0.5 * math.cos(math.pi * iteration / total)
        for group in groups:
            group.step(x, y, decay)
    return TrainedHeads([(group.source, group.classifiers) for group in groups])


class HeadGroup:
    """The heads of one input, R learning rates, with their momentum."""

    def __init__(
        self,
        source: Input,
        rates: Sequence[float],
        initial: Tensor,
        dtype: torch.dtype,
        parameters: Parameters,
        context: Context,
    ):
        self.source, self.momentum = source, parameters.momentum
        weight = source.of(initial).to(context.device, dtype).repeat(len(rates), 1)
        bias = weight.new_zeros(len(weight))
        self.classifiers = Classifiers(weight, bias, len(rates), Standardiser(None))
        self.steps = torch.zeros_like(weight), torch.zeros_like(bias)
        peak = torch.tensor(rates, device=weight.device, dtype=dtype) * parameters.batch_size / 256
        self.peak = peak.repeat_interleave(context.num_classes)

    def step(self, features: Tensor, labels: Tensor, decay: float) -> None:
        """One step of SGD on features [B, W] and labels [B], at `decay` times the peak rates."""
        x, heads = self.source.of(features), self.classifiers
        # Gradient of the mean cross-entropy with respect to the logits, in closed form: (softmax - one-hot) / B.
        error = heads.logits(x).softmax(2)
        place = labels[:, None, None].expand(-1, heads.num_rates, 1)
        error.scatter_add_(2, place, error.new_full((), -1).expand_as(error))
        error = error.div_(len(x)).flatten(1)
        weight_step, bias_step = self.steps
        weight_step.mul_(self.momentum).addmm_(error.T, x)
        bias_step.mul_(self.momentum).add_(error.sum(0))
        rate = decay * self.peak
        heads.weight.addcmul_(rate[:, None], weight_step, value=-1)
        heads.bias.addcmul_(rate, bias_step, value=-1)


def _stream(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of `size` indices without end: one permutation of `rows` after the other, cut without gaps."""
    left = rows[:0]
    while True:
        while len(left) < size:
            left = torch.cat([left, rows[torch.randperm(len(rows), generator=generator)]])
        yield left[:size]
        left = left[size:]


def evaluate(heads: TrainedHeads, split: Split, rows: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Accuracy [H] and mean cross-entropy [H] of every head on the images `rows` of the split."""
    hits, losses = [], []
    for chosen in rows.split(512):
        logits = heads.logits(split.take(chosen, context.device))
        label = split.labels[chosen].to(context.device)[:, None].expand(-1, logits.shape[1])
        hits.append((logits.argmax(2) == label).double().sum(0))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
        losses.append(loss.view_as(label).double().sum(0))
    return torch.stack(hits).sum(0).cpu() / len(rows), torch.stack(losses).sum(0).cpu() / len(rows)


def _number(chosen: int | None) -> int:
    if chosen is None:
        raise DinobenchError(
            "every head of the linear sweep diverged (non-finite loss); use smaller learning_rates in a copy of the "
            "suite definition"
        )
    return chosen


def _table(grid: Sequence[Head], accuracy: Tensor, loss: Tensor, selection: str) -> pd.DataFrame:
    columns = {
        "num_blocks": [head.source.num_blocks for head in grid],
        "avgpool": [head.source.avgpool for head in grid],
        "learning_rate": [head.learning_rate for head in grid],
        f"{selection}_top1": (100 * accuracy).tolist(),
        f"{selection}_loss": loss.tolist(),
    }
    return pd.DataFrame(columns)


def _notes(chosen: Head, how: str, parameters: Parameters, inputs: Sequence[Input]) -> list[str]:
    source = chosen.source
    tokens = f"CLS of the last {source.num_blocks} blocks" + (" and mean patch token" if source.avgpool else "")
    notes = [f"head ({tokens}, learning rate {chosen.learning_rate:g} per 256 images) {how}"]
    rates = parameters.learning_rates
    if len(rates) > 1 and chosen.learning_rate in (min(rates), max(rates)):
        notes.append("the chosen learning rate is at the edge of the sweep")
    wanted = len(set(parameters.num_blocks)) * len(set(parameters.avgpool))
    if len(inputs) < wanted or max(source.num_blocks for source in inputs) < max(parameters.num_blocks):
        most = max(source.num_blocks for source in inputs)
        notes.append(f"the features have {most} block(s), the grid asks for {list(parameters.num_blocks)}")
    return notes
