"""Linear classification of frozen features of augmented images (DINO, appendix F.2; eval_linear.py).

Every epoch draws a RandomResizedCrop and a flip of each training image, and the frozen network looks at it again; test
images are resized and cropped at the centre. Features by the rule `dino`: CLS of the last 4 blocks for ViT-S, CLS and
mean patch token of the last block for ViT-B. Weight N(0, 0.01), bias 0; SGD, momentum 0.9, no weight decay; learning
rates given for a batch of 256 and scaled by batch / 256; cosine to 0, stepped per epoch. All rates train at once on the
same views (iBOT's eval_linear_multi.py), by the one product per step of protocol linear_sweep.

selection: held_out   a part of train, stratified by class, is held out. For every rate two classifiers train on the
                      same views: one without the held-out part, which chooses the rate (highest accuracy there after
                      the last epoch, then lowest cross-entropy), one with all of train. Of the latter, that of the
                      chosen rate reads the test part once, after the last epoch: as if trained again, at no further
                      pass through the network
           test       as in the official scripts: the best of all rates and epochs on the test part itself, an
                      optimistic number

Departures from the official code: the order of the feature's columns for ViT-B (a permutation), the random numbers.

Shapes: N images, D columns of the feature, C classes, R learning rates, B batch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError
from suites.extractor import Extractor
from suites.features import describe_feature, extract_with, resolve_feature
from suites.interval import mean_interval
from suites.labelled import LabelledData, open_labelled
from suites.passes import default_workers, describe
from suites.protocols import linear_sweep
from suites.protocols.knn import rank_of
from suites.protocols.linear import DINO_RATES, held_out_split, select
from suites.protocols.linear_sweep import Input, TrainedHeads, evaluate
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split, sample_table
from suites.suite import Feature, SuiteDataset
from suites.training_views import CropViews, Order, RandomCrop, crop_batches

NEEDS_LABELS = True
READS_IMAGES = True


class Parameters(ProtocolParameters):
    """Numbers that define the score; the defaults are the official ones, with a global batch of 8 GPUs."""

    transform: EvalTransform = EvalTransform.model_validate({})
    """Of the images that are scored; its mean and std hold for the training images too."""
    crop: RandomCrop = RandomCrop()
    """Of the training images."""
    feature: Feature = "dino"
    learning_rates: tuple[float, ...] = Field(default=DINO_RATES, min_length=1)
    """For a batch of 256; used times batch_size / 256."""
    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=1024, ge=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    selection: Literal["held_out", "test"] = "held_out"
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of train on which the rate is chosen; not used with selection: test."""


@dataclass(frozen=True)
class FeatureBatch:
    """What the classifiers see in one step."""

    epoch: int
    number: Tensor
    """int64 [B] on the CPU: the images in their set."""
    features: Tensor
    """[B, D] on the device."""


@dataclass
class _Found:
    """A rate and its answers on the test part."""

    rate: int
    epoch: int
    accuracy: float
    """On the images that selected it, in [0, 1]."""
    score: Tensor
    """Logits [M, C] on the CPU."""


def open_data(dataset: SuiteDataset, data: str | None, parameters: Parameters) -> LabelledData:
    """Train and test images of the suite."""
    return open_labelled(dataset, data)


def run(data: LabelledData, extractor: Extractor, parameters: Parameters, context: Context) -> Outcome:
    """Train the classifiers of all rates and score the test images with the selected one."""
    context = dataclasses.replace(context, num_classes=data.num_classes)
    assert data.train.labels is not None
    labels, fit, held = data.train.labels.cpu(), None, None
    if parameters.selection == "held_out":
        fit, held = held_out_split(labels, parameters.held_out, context.seed)
    test = _still(data, extractor, parameters)
    judge = test if held is None else _still(data, extractor, parameters, held)
    started, steps, epochs = time.monotonic(), math.ceil(len(labels) / parameters.batch_size), parameters.epochs
    trainer = Trainer(labels, fit, test.features.shape[1], parameters, context)
    best, rows = None, []
    for step, batch in enumerate(feature_batches(data, extractor, parameters, context.seed), start=1):
        trainer.step(batch)
        last_of_epoch, last = step % steps == 0, step == steps * epochs
        if extractor.progress is not None:
            done = len(labels) if last_of_epoch else step % steps * parameters.batch_size
            extractor.progress(
                f"linear classifiers on {data.name}, epoch {batch.epoch + 1} of {epochs}", done, len(labels)
            )
        if last or (last_of_epoch and parameters.selection == "test"):
            best, accuracy, loss = _judge(best, batch.epoch, trainer, judge, test, context)
            rows += _rows(batch.epoch, parameters, accuracy, loss)
    if best is None or not torch.isfinite(best.score).all():
        raise DinobenchError(
            "every learning rate of the linear classifiers diverged (non-finite loss); use smaller learning_rates in a "
            "copy of the suite definition"
        )
    extractor.log.append(
        {"from_cache": False, "device": extractor.device, "torch": torch.__version__, "views": "of training images"}
        | {"seconds": f"{time.monotonic() - started:.3f}"}
    )
    return _outcome(best, test, pd.DataFrame(rows), len(judge), extractor, parameters, context)


def feature_batches(
    data: LabelledData, extractor: Extractor, parameters: Parameters, seed: int
) -> Iterator[FeatureBatch]:
    """Features of the augmented training images, batch by batch, for all epochs.

    Raises:
        UsageError: the backbone lacks the feature, or does not take images of this size.
    """
    images, transform = data.train, parameters.transform
    wanted = resolve_feature(parameters.feature, extractor.model.backbone)
    if wanted is not None:
        blocks: Any = extractor.model.backbone.blocks
        wanted = wanted.model_copy(update={"last": min(wanted.last, len(blocks))})
    look = partial(describe, blocks=wanted)
    views = CropViews(parameters.crop, transform.mean, transform.std, seed)
    order = Order(len(images), parameters.batch_size, parameters.epochs, seed)
    workers = default_workers(len(images)) if extractor.workers is None else extractor.workers
    for batch in crop_batches(images, views, order, extractor.device, workers):
        parts = [extractor.apply(look, part).float() for part in batch.views.split(extractor.batch_size)]
        yield FeatureBatch(batch.epoch, batch.number, torch.cat(parts))


class Trainer:
    """Classifiers of all rates on one stream of features: `final` learns from every image, `trial` from `fit` alone."""

    def __init__(self, labels: Tensor, fit: Tensor | None, width: int, parameters: Parameters, context: Context):
        """Labels [N]; `fit`: numbers of the images that `trial` may learn from, None for no trial."""
        self.labels, self.epochs = labels, parameters.epochs
        self.final = self._heads(width, parameters, context)
        self.trial = None if fit is None else self._heads(width, parameters, context)
        self._in_fit = torch.zeros(len(labels), dtype=torch.bool)
        if fit is not None:
            self._in_fit[fit] = True

    @staticmethod
    def _heads(width: int, parameters: Parameters, context: Context) -> linear_sweep.HeadGroup:
        initial = 0.01 * torch.randn(context.num_classes, width, generator=torch.Generator().manual_seed(context.seed))
        sgd = linear_sweep.Parameters(batch_size=parameters.batch_size, momentum=parameters.momentum)
        columns, rates = Input(1, False, 0, width), parameters.learning_rates
        return linear_sweep.HeadGroup(columns, rates, initial, torch.float32, sgd, context)

    def step(self, batch: FeatureBatch) -> None:
        """One step of SGD of all classifiers, at the rates of the batch's epoch."""
        decay = 0.5 + 0.5 * math.cos(math.pi * batch.epoch / self.epochs)
        device = batch.features.device
        labels = self.labels[batch.number].to(device)
        self.final.step(batch.features, labels, decay)
        if self.trial is not None:
            chosen = self._in_fit[batch.number].nonzero().flatten().to(device)
            if len(chosen):
                self.trial.step(batch.features[chosen], labels[chosen], decay)


def _still(data: LabelledData, extractor: Extractor, parameters: Parameters, held: Tensor | None = None) -> Split:
    """Features of the test images, or of the training images `held`, without augmentation."""
    images = data.test if held is None else data.train.subset(held)
    return extract_with(extractor, images, parameters.transform, parameters.feature).split()


def _judge(
    best: _Found | None, epoch: int, trainer: Trainer, judge: Split, test: Split, context: Context
) -> tuple[_Found | None, Tensor, Tensor]:
    """The best so far, and accuracy [R] and loss [R] of all rates on the images that select."""
    final = TrainedHeads([(trainer.final.source, trainer.final.classifiers)])
    trial = final if trainer.trial is None else TrainedHeads([(trainer.trial.source, trainer.trial.classifiers)])
    accuracy, loss = evaluate(trial, judge, torch.arange(len(judge)), context)
    # The official rule knows no loss: the first of the best.
    rate = select(accuracy, 0 * loss if trainer.trial is None else loss)
    if rate is not None and (best is None or accuracy[rate].item() > best.accuracy):
        parts = [final.logits(x.to(context.device))[:, rate].cpu() for x in test.features.split(512)]
        best = _Found(rate, epoch, accuracy[rate].item(), torch.cat(parts))
    return best, accuracy, loss


def _rows(epoch: int, parameters: Parameters, accuracy: Tensor, loss: Tensor) -> list[dict[str, float]]:
    name = parameters.selection
    return [
        {"epoch": epoch + 1, "learning_rate": rate, f"{name}_top1": 100 * hits, f"{name}_loss": one}
        for rate, hits, one in zip(parameters.learning_rates, accuracy.tolist(), loss.tolist(), strict=True)
    ]


def _outcome(
    best: _Found,
    test: Split,
    table: pd.DataFrame,
    num_judged: int,
    extractor: Extractor,
    parameters: Parameters,
    context: Context,
) -> Outcome:
    rates, rank = parameters.learning_rates, rank_of(test.labels[:, None], best.score)
    rate, correct = rates[best.rate], rank == 0
    scores = {
        "top1": 100 * correct.double().mean().item(),
        "top5": 100 * (rank < 5).double().mean().item(),
        "learning_rate": rate,
    }
    if parameters.selection == "held_out":
        scores["held_out_top1"] = 100 * best.accuracy
        how = f"chosen among {len(rates)} on {num_judged} images of train, trained on all of train, last epoch"
    else:
        scores["epoch"] = float(best.epoch + 1)
        how = (
            f"and epoch {best.epoch + 1} the best of {len(rates)} x {parameters.epochs} on the {num_judged} test "
            "images themselves, as in the official script: optimistic"
        )
    notes = [f"learning rate {rate:g} (per 256 images) {how}"]
    notes.append(f"feature: {describe_feature(resolve_feature(parameters.feature, extractor.model.backbone))}")
    if len(rates) > 1 and rate in (min(rates), max(rates)):
        notes.append("the selected learning rate is at the edge of the sweep")
    samples = sample_table(test, best.score.argmax(1), correct)
    interval = mean_interval(100.0 * correct.numpy(), seed=context.seed)
    return Outcome(scores, len(test), interval, samples, {"learning_rates": table}, notes)
