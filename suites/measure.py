"""A suite on a checkpoint: open the data, extract or read features, run the protocol, add baselines and the receipt."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pretrain.data.datasets import ImageSet, open_dataset
from pretrain.errors import DinobenchError, UsageError
from pretrain.models.checkpoint import LoadedModel
from pretrain.packages import installed_versions
from suites.baselines import Setting, measure_baselines
from suites.cache import FeatureCache
from suites.features import Features, Precision, Progress, describe_feature, extract, resolve_feature
from suites.neighbours import Backend
from suites.protocols.protocol import Context, Outcome
from suites.suite import Suite, protocol_module

PACKAGES = ("dinobench", "torch", "torchvision", "timm", "numpy", "pandas", "scikit-learn", "faiss-gpu", "faiss-cpu")


@dataclass
class Measurement:
    """What a suite found on a checkpoint."""

    suite: str
    """name@version."""
    protocol: str
    dataset: str
    headline: str
    """Name of the score to compare."""
    scores: dict[str, float]
    """Accuracies, purity and NMI in percent."""
    n: int
    """Images behind the headline."""
    interval: tuple[float, float]
    """95 % bootstrap interval of the headline over images."""
    baselines: dict[str, dict[str, float]]
    samples: pd.DataFrame
    """Per test image: index, label, prediction, correct (what the protocol gives of them); may be empty."""
    tables: dict[str, pd.DataFrame]
    receipt: dict[str, Any]
    from_cache: bool
    """Whether the features of both splits came from the cache."""
    seconds: float
    notes: list[str] = field(default_factory=list)


def measure(
    suite: Suite,
    model: LoadedModel,
    *,
    data: str | None = None,
    cache: FeatureCache | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
    seed: int = 0,
    backend: Backend = "auto",
    baselines: bool = True,
    batch_size: int = 256,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measure one checkpoint with one suite.

    Args:
        data: Data set to measure on instead of the suite's own.
        cache: Features and baselines are read from and written to it; None computes everything.
        seed: Of everything random in the protocol: draws, shuffles, k-means starts, bootstrap.
        backend: Of the nearest-neighbour search.
        baselines: Measure the suite's baselines too (once per data set when there is a cache).

    Raises:
        DinobenchError: labels missing, one class only, classes that differ between the splits, features not finite.
        UsageError: the suite leaves its data set open and `data` is not given.
    """
    started = time.monotonic()
    module = protocol_module(suite.protocol)
    train_images, test_images = open_splits(suite, data)
    check_labels(suite, train_images, test_images)
    model.backbone.to(device)
    if model.head is not None:
        model.head.to(device)
    options: dict[str, Any] = {"cache": cache, "precision": precision, "batch_size": batch_size, "workers": workers}
    options["progress"] = progress
    train, test = (
        extract(model, images, suite.transform, suite.feature, device=device, **options)
        for images in (train_images, test_images)
    )
    largest = max(_largest(images.labels) for images in (train_images, test_images))
    num_classes = max(len(train_images.classes), largest + 1)
    context = Context(num_classes, tuple(train_images.classes), seed, device, backend, model)
    outcome: Outcome = module.run(train.split(), test.split(), suite.resolved_parameters(), context)
    if suite.headline not in outcome.scores:
        known = ", ".join(outcome.scores)
        raise UsageError(f"suite {suite.id}: headline {suite.headline!r} is no score of {suite.protocol!r}: {known}")
    notes = [*outcome.notes, *_describe_spread(test.cls)]
    beside = {}
    if baselines:
        beside = measure_baselines(Setting(suite, model, train_images, test_images, context, **options))
    seconds = time.monotonic() - started
    receipt = make_receipt(suite, model, (train_images, test_images), (train, test), context, precision, seconds)
    return Measurement(
        suite=suite.id,
        protocol=suite.protocol,
        dataset=train_images.name,
        headline=suite.headline,
        scores=outcome.scores,
        n=outcome.n,
        interval=outcome.interval,
        baselines=beside,
        samples=outcome.samples,
        tables=outcome.tables,
        receipt=receipt,
        from_cache=train.from_cache and test.from_cache,
        seconds=seconds,
        notes=notes,
    )


def open_splits(suite: Suite, data: str | None = None) -> tuple[ImageSet, ImageSet]:
    """Train and test images of the suite, or of `data` with the suite's splits."""
    name = data or suite.dataset.name
    if name is None or name.endswith(":"):
        raise UsageError(f"suite {suite.id} does not know where its images are: add --data {name or 'folder:'}/path")
    return open_dataset(name, split=suite.dataset.train), open_dataset(name, split=suite.dataset.test)


def check_labels(suite: Suite, train: ImageSet, test: ImageSet) -> None:
    """Refuse label sets on which the suite would give a wrong or empty number."""
    if tuple(train.classes) != tuple(test.classes):
        ours, theirs = set(train.classes), set(test.classes)
        odd = sorted(ours ^ theirs)[:5]
        raise DinobenchError(
            f"{train.name}: the classes of {train.split} ({len(ours)}) and {test.split} ({len(theirs)}) differ, "
            f"for example {', '.join(map(repr, odd))}, so labels do not mean the same: give both the same folders"
        )
    if not protocol_module(suite.protocol).NEEDS_LABELS:
        return
    for images in (train, test):
        if images.labels is None:
            raise DinobenchError(
                f"suite {suite.id} needs labels, but {images.name} {images.split} has none: sort the images into one "
                "folder per class, or use a suite of protocol 'prototypes'"
            )
    assert train.labels is not None
    classes = train.labels.unique()
    if len(classes) < 2:
        raise DinobenchError(
            f"suite {suite.id} needs at least two classes, but {train.name} {train.split} has {len(classes)}: "
            "every classifier would be right"
        )


def make_receipt(
    suite: Suite,
    model: LoadedModel,
    images: tuple[ImageSet, ImageSet],
    features: tuple[Features, Features],
    context: Context,
    precision: Precision,
    seconds: float,
) -> dict[str, Any]:
    """Everything that this floor knows about how the scores came about; plain values."""
    facts = model.provenance
    known = ("path", "sha256", "format", "network", "method", "arch", "label", "recipe_hash", "weights_sha256")
    checkpoint = {key: facts.get(key) for key in (*known, "step", "images_seen", "epoch", "seed", "coverage")}
    return {
        "suite": suite.id,
        "suite_fingerprint": suite.fingerprint(),
        "protocol": suite.protocol,
        "parameters": suite.resolved_parameters().model_dump(mode="json"),
        "checkpoint": checkpoint,
        "dataset": {
            role: {"name": split.name, "split": split.split, "n": len(split), "fingerprint": split.fingerprint}
            for role, split in zip(("train", "test"), images, strict=True)
        },
        "transform": suite.transform.model_dump(mode="json"),
        "feature": describe_feature(resolve_feature(suite.feature, model.backbone)),
        "seed": context.seed,
        "device": context.device,
        "precision": precision,
        "knn_backend": context.backend,
        "features": [{"from_cache": part.from_cache, **part.metadata} for part in features],
        "packages": installed_versions(PACKAGES),
        "wall_seconds": round(seconds, 3),
    }


def _largest(labels: Tensor | None) -> int:
    return int(labels.max()) if labels is not None and len(labels) else -1


def _describe_spread(features: Tensor) -> list[str]:
    """A sentence when the features hardly differ between images."""
    unit = torch.nn.functional.normalize(features, dim=1)
    spread = (unit.std(0).mean() * unit.shape[1] ** 0.5).item()
    if spread < 0.01:
        return [f"the features hardly differ between images (relative standard deviation {spread:.2g}): collapsed"]
    return []
