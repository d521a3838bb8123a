"""Fine-tuning: backbone and a linear classifier are trained together, the only protocol that changes weights.

The recipe of DeiT (arXiv 2012.12877, Table 9), by which DINO fine-tunes (Table 6), with the layer-wise learning rates
of BEiT, by which iBOT fine-tunes (bytedance/ibot evaluation/classification_layer_decay): AdamW, linear warm-up and
cosine per step, drop path, RandAugment, mixup or cutmix, label smoothing, random erasing. The classifier reads the
pooled features (CLS). Rates and decay per layer: suites.trainable.

A batch is split into parts of micro_batch_size images, which share one draw of mixup or cutmix and one BatchNorm: the
images of one GPU in the official runs. The last epoch is scored, so nothing is selected; the official scripts report
the best epoch on the evaluation set itself.

Departures from DeiT: no moving average of the weights (which is not what it reports), the schedule moves every step.
The checkpoint's own network is copied and stays as it is. The same seed gives the same score, on a GPU up to the
rounding of sums without a fixed order.

Shapes: M test images, B images of a part, s side of a view, C classes.
"""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.random_bits import mix_words
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError
from pretrain.models.backbones import check_image_sizes
from pretrain.training.optim import OptimConfig, create_optimizer, set_rates
from pretrain.training.schedules import cosine
from suites.extractor import Extractor
from suites.features import extract
from suites.interval import mean_interval
from suites.labelled import LabelledData, open_labelled
from suites.passes import default_workers
from suites.protocols.knn import rank_of
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split, sample_table
from suites.suite import SuiteDataset
from suites.trainable import Classifier, copy_backbone, rate_groups
from suites.training_views import Order, RecipeViews, TrainingAugmentation, decoded_batches, seeded

NEEDS_LABELS = True
READS_IMAGES = True
DIVERGED = 10.0
"""A mean training loss of this many times that of guessing counts as diverged."""
_MIXING, _WEIGHTS = 1, 2
"""Words that keep the random numbers of different purposes apart."""


class Parameters(ProtocolParameters):
    """Numbers that define the score; the defaults are iBOT's for ViT-S/16 on ImageNet-1k (its README and run.sh)."""

    augmentation: TrainingAugmentation = TrainingAugmentation()
    """Of the training images."""
    repeats: int = Field(default=1, ge=1)
    """Views of an image per batch, of as many fewer images per epoch (DeiT: 3)."""
    mixup: float = Field(default=0.8, ge=0)
    """Alpha of mixup; 0 = none."""
    cutmix: float = Field(default=1.0, ge=0)
    """Alpha of cutmix, which takes turns with mixup; 0 = none."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    transform: EvalTransform = EvalTransform.model_validate({})
    """Of the test images."""
    epochs: int = Field(default=200, ge=1)
    warmup_epochs: int = Field(default=20, ge=0)
    batch_size: int = Field(default=1024, ge=1)
    micro_batch_size: int = Field(default=128, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak, for this batch size."""
    warmup_learning_rate: float = Field(default=0.0, ge=0)
    """At the first step."""
    min_learning_rate: float = Field(default=1e-6, ge=0)
    """At the end of the cosine."""
    layer_decay: float = Field(default=0.75, gt=0, le=1)
    weight_decay: float = Field(default=0.05, ge=0)
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Rising linearly from 0 over the blocks."""
    head_init_scale: float = Field(default=0.001, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Parameters:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size={self.batch_size} is no multiple of micro_batch_size={self.micro_batch_size}")
        if self.mixes and self.micro_batch_size % 2:
            raise ValueError(f"mixup and cutmix pair images: micro_batch_size={self.micro_batch_size} must be even")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} are more than epochs={self.epochs}")
        return self

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


def open_data(dataset: SuiteDataset, data: str | None, parameters: Parameters) -> LabelledData:
    """Train and test images of the suite."""
    return open_labelled(dataset, data)


def run(data: LabelledData, extractor: Extractor, parameters: Parameters, context: Context) -> Outcome:
    """Train a copy of the network on the training images and score the test images with it.

    Raises:
        DinobenchError: fewer training images than a batch, or the training diverged.
        UsageError: the backbone takes no images of this size, or has no stochastic depth for the suite's drop_path.
    """
    context = dataclasses.replace(context, num_classes=data.num_classes)
    if len(data.train) < parameters.batch_size:
        raise DinobenchError(
            f"{data.name} {data.train.split} has {len(data.train)} images, fewer than the batch of "
            f"{parameters.batch_size}: lower batch_size in a copy of the suite definition"
        )
    started = time.monotonic()
    device = torch.device(extractor.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(mix_words(context.seed, _WEIGHTS) >> 1)
        backbone = copy_backbone(extractor.model, parameters.drop_path)
        check_image_sizes(backbone, [parameters.augmentation.size, *filter(None, [parameters.transform.crop])])
        classifier = Classifier(backbone, context.num_classes, parameters.head_init_scale).to(device)
        epochs = train(classifier, data, extractor, parameters, context)
    test = predict(classifier, data, extractor, parameters)
    seconds = f"{time.monotonic() - started:.3f}"
    made = {"from_cache": False, "device": extractor.device, "torch": torch.__version__, "seconds": seconds}
    extractor.log.append(made)
    rank = rank_of(test.labels[:, None], test.features)
    correct = rank == 0
    scores = {
        "top1": 100 * correct.double().mean().item(),
        "top5": 100 * (rank < 5).double().mean().item(),
        "train_loss": float(epochs["loss"].iloc[-1]),
    }
    interval = mean_interval(100.0 * correct.numpy(), seed=context.seed)
    samples = sample_table(test, test.features.argmax(1), correct)
    notes = [f"all weights trained for {parameters.epochs} epochs; scored after the last one"]
    return Outcome(scores, len(test), interval, samples, {"epochs": epochs}, notes)


def train(
    classifier: Classifier, data: LabelledData, extractor: Extractor, parameters: Parameters, context: Context
) -> pd.DataFrame:
    """Train in place; the mean loss of every epoch.

    Raises:
        DinobenchError: the loss is not finite, or far above that of guessing.
    """
    images, batch_size = data.train, parameters.batch_size
    order = Order(len(images), batch_size, parameters.epochs, context.seed, parameters.repeats, drop_last=True)
    rates = cosine(
        parameters.learning_rate,
        parameters.min_learning_rate,
        parameters.epochs,
        order.steps_per_epoch,
        parameters.warmup_epochs,
        parameters.warmup_learning_rate,
    )
    optimizer = create_optimizer(OptimConfig(), rate_groups(classifier, parameters.layer_decay))
    views = RecipeViews(parameters.augmentation, context.seed)
    workers = default_workers(len(images)) if extractor.workers is None else extractor.workers
    assert images.labels is not None
    labels, mix = images.labels.cpu(), _Mixing(parameters, context)
    parts = batch_size // parameters.micro_batch_size
    # Every parts-th image, as ranks share a batch: the repeats of an image go to different parts.
    keys = (keys[part::parts] for keys in order.batches() for part in range(parts))
    batches = decoded_batches(images, views.one, keys, extractor.device, workers)
    classifier.train()
    total, rows = torch.zeros((), device=extractor.device), []
    for step, rate in enumerate(rates.tolist()):
        set_rates(optimizer, rate, parameters.weight_decay, freeze_last_layer=False)
        optimizer.zero_grad(set_to_none=True)
        for draw in range(step * parts, (step + 1) * parts):
            batch = next(batches)
            x, target = mix(batch.views, labels[batch.number].to(extractor.device), draw)
            with _autocast(extractor):
                loss = F.cross_entropy(classifier(x), target) / parts
            loss.backward()
            total += loss.detach()
        optimizer.step()
        epoch, before = divmod(step, order.steps_per_epoch)
        if extractor.progress is not None:
            what = f"fine-tuning on {data.name}, epoch {epoch + 1} of {parameters.epochs}"
            extractor.progress(what, (before + 1) * batch_size, order.steps_per_epoch * batch_size)
        if before + 1 == order.steps_per_epoch:
            mean = total.item() / order.steps_per_epoch  # the only read of an epoch: the host waits for the device here
            _check(mean, epoch, parameters, context)
            rows.append({"epoch": epoch + 1, "loss": mean, "learning_rate": rate})
            total.zero_()
    return pd.DataFrame(rows)


class _Mixing:
    """Mixup or cutmix, and smoothed targets."""

    def __init__(self, parameters: Parameters, context: Context):
        # Imported here: timm takes seconds to import and reading a suite does not need it.
        from timm.data.mixup import Mixup, mixup_target

        self.seed, self.num_classes, self.smoothing = context.seed, context.num_classes, parameters.label_smoothing
        self._target = mixup_target
        self._mixup = None
        if parameters.mixes:
            self._mixup = Mixup(
                parameters.mixup,
                parameters.cutmix,
                label_smoothing=parameters.label_smoothing,
                num_classes=context.num_classes,
            )

    def __call__(self, x: Tensor, labels: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """Images [B, 3, s, s], labels [B] -> mixed images and targets [B, C]; the `draw`-th of the training."""
        if self._mixup is None:
            return x, self._target(labels, self.num_classes, smoothing=self.smoothing)
        with seeded(self.seed, _MIXING, draw):
            return self._mixup(x, labels)


def _autocast(extractor: Extractor) -> Any:
    if extractor.precision == "bf16":
        return torch.autocast(torch.device(extractor.device).type, torch.bfloat16)
    return nullcontext()


def _check(loss: float, epoch: int, parameters: Parameters, context: Context) -> None:
    guessing = math.log(context.num_classes)
    if not math.isfinite(loss) or loss > DIVERGED * guessing:
        raise DinobenchError(
            f"fine-tuning diverged: the training loss of epoch {epoch + 1} is {loss:.3g} (guessing: {guessing:.3g}); "
            f"use a learning_rate below {parameters.learning_rate:g} or more warmup_epochs in a copy of the suite "
            "definition, or precision fp32"
        )


def predict(classifier: Classifier, data: LabelledData, extractor: Extractor, parameters: Parameters) -> Split:
    """Logits [M, C] of the test images, with their labels."""
    trained = dataclasses.replace(extractor.model, backbone=classifier.backbone)
    found = extract(
        trained,
        data.test,
        parameters.transform,
        device=extractor.device,
        precision=extractor.precision,
        batch_size=extractor.batch_size,
        workers=extractor.workers,
        progress=extractor.progress,
    ).split()
    with torch.inference_mode():
        score = classifier.head(found.features.to(extractor.device)).cpu().clone()
    return dataclasses.replace(found, features=score)
