"""A suite on a checkpoint: open the data, extract or read features, run the protocol, add baselines and the receipt.

Two kinds of protocol (suites.protocols.protocol): most read the features of two splits of a labelled data set; those
that read images open their own files and extract what they need.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pretrain.data.datasets import ImageSet, open_dataset
from pretrain.errors import DinobenchError, UsageError
from pretrain.faults import out_of_memory_told
from pretrain.models.checkpoint import LoadedModel
from pretrain.packages import installed_versions
from suites.baselines import BenchmarkSetting, Setting, measure_baselines, measure_benchmark_baselines
from suites.cache import FeatureCache
from suites.extractor import Extractor
from suites.features import LISTED, Features, describe_feature, extract, resolve_feature
from suites.labelled import check_same_classes, check_two_classes
from suites.neighbours import Backend
from suites.passes import Precision, Progress
from suites.protocols.protocol import Context, Outcome
from suites.suite import Suite, protocol_module

SPREAD_IMAGES = 100_000
"""The first so many images tell whether features differ."""
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
    """Images (queries, objects) behind the headline."""
    interval: tuple[float, float]
    """95 % bootstrap interval of the headline over images (queries, sequences)."""
    baselines: dict[str, dict[str, float]]
    samples: pd.DataFrame
    """Per test image: index, label, prediction, correct (what the protocol gives of them); may be empty."""
    tables: dict[str, pd.DataFrame]
    receipt: dict[str, Any]
    from_cache: bool
    """Whether all features came from the cache."""
    seconds: float
    notes: list[str] = field(default_factory=list)


def measure(
    suite: Suite,
    model: LoadedModel,
    *,
    data: str | None = None,
    beside: Sequence[Suite] = (),
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
        beside: Suites that will be measured on the same checkpoint and `data`; a pass over the images takes in what
            they need of them.
        cache: Features and baselines are read from and written to it; None computes everything.
        seed: Of everything random in the protocol: draws, shuffles, k-means starts, bootstrap.
        backend: Of the nearest-neighbour search.
        baselines: Measure the suite's baselines too (once per data set when there is a cache).

    Raises:
        DinobenchError: labels missing, one class only, classes that differ between the splits, features not finite,
            too many unreadable images, no memory.
        UsageError: the suite leaves its data set open and `data` is not given.
    """
    started = time.monotonic()
    model.backbone.to(device)
    if model.head is not None:
        model.head.to(device)
    options: dict[str, Any] = {"cache": cache, "precision": precision, "batch_size": batch_size, "workers": workers}
    options["progress"] = progress
    context = Context(0, seed=seed, device=device, backend=backend, model=model)
    with out_of_memory_told(f"at suite {suite.id} on {device}", "use --device cpu, or a device with more memory"):
        if suite.reads_images:
            found = _on_benchmark(suite, data, context, baselines, options)
        else:
            shared = [other.feature for other in beside if _reads_the_same(suite, other, data)]
            found = _on_splits(suite, data, context, baselines, {**options, "beside": shared})
    outcome, scores = found.outcome, found.outcome.scores
    if suite.headline not in scores:
        raise UsageError(
            f"suite {suite.id}: headline {suite.headline!r} is no score of {suite.protocol!r}: {', '.join(scores)}"
        )
    seconds = time.monotonic() - started
    return Measurement(
        suite=suite.id,
        protocol=suite.protocol,
        dataset=found.dataset,
        headline=suite.headline,
        scores=scores,
        n=outcome.n,
        interval=outcome.interval,
        baselines=found.baselines,
        samples=outcome.samples,
        tables=outcome.tables,
        receipt=make_receipt(suite, model, found, context, precision, seconds),
        from_cache=all(part["from_cache"] for part in found.features),
        seconds=seconds,
        notes=outcome.notes,
    )


@dataclass
class _Found:
    """What either kind of protocol hands to `measure`."""

    outcome: Outcome
    baselines: dict[str, dict[str, float]]
    dataset: str
    images: dict[str, dict[str, Any]]
    """By role, for the receipt: name, split, n, fingerprint."""
    features: list[dict[str, Any]]
    """For the receipt: from_cache, and where and how they were computed."""
    feature: str
    transform: dict[str, Any]


def _on_splits(suite: Suite, data: str | None, context: Context, baselines: bool, options: dict[str, Any]) -> _Found:
    model = context.model
    assert model is not None
    train_images, test_images = open_splits(suite, data)
    check_labels(suite, train_images, test_images)
    train, test = (
        extract(model, images, suite.transform, suite.feature, device=context.device, **options)
        for images in (train_images, test_images)
    )
    pairs = ((train_images, train), (test_images, test))
    largest = max(_largest(images.labels) for images in (train_images, test_images))
    num_classes = max(len(train_images.classes), largest + 1)
    context = replace(context, num_classes=num_classes, classes=tuple(train_images.classes))
    context = replace(context, train_images=_readable(train_images, train), transform=suite.transform)
    module = protocol_module(suite.protocol)
    splits = (part.split(stored=getattr(module, "STREAMS", False)) for part in (train, test))
    outcome: Outcome = module.run(*splits, suite.resolved_parameters(), context)
    outcome.notes += [note for images, part in pairs for note in _describe_unreadable(images, part)]
    outcome.notes += _describe_spread(test.cls)
    beside = {}
    if baselines:
        readable_train, readable_test = (_readable(images, part) for images, part in pairs)
        beside = measure_baselines(Setting(suite, model, readable_train, readable_test, context, **options))
    return _Found(
        outcome,
        beside,
        dataset=train_images.name,
        images={role: _describe_images(*pair) for role, pair in zip(("train", "test"), pairs, strict=True)},
        features=[{"from_cache": part.from_cache, **part.metadata} for part in (train, test)],
        feature=describe_feature(resolve_feature(suite.feature, model.backbone)),
        transform=suite.transform.model_dump(mode="json"),
    )


def _reads_the_same(suite: Suite, other: Suite, data: str | None) -> bool:
    """Whether features of one serve the other, of the same split at least."""
    names = (suite.dataset.name, other.dataset.name)
    return not other.reads_images and suite.transform == other.transform and (data is not None or len(set(names)) == 1)


def _on_benchmark(suite: Suite, data: str | None, context: Context, baselines: bool, options: dict[str, Any]) -> _Found:
    assert context.model is not None
    module, parameters = protocol_module(suite.protocol), suite.resolved_parameters()
    opened = module.open_data(suite.dataset, data, parameters)
    extractor = Extractor(context.model, context.device, **options)
    outcome: Outcome = module.run(opened, extractor, parameters, context)
    beside = {}
    if baselines:
        beside = measure_benchmark_baselines(BenchmarkSetting(suite, context.model, opened, context, extractor))
    # Transform and feature are part of the protocol's parameters, which the receipt holds.
    described = f"of protocol {suite.protocol}"
    return _Found(outcome, beside, opened.name, opened.receipt(), extractor.log, described, {})


def open_splits(suite: Suite, data: str | None = None) -> tuple[ImageSet, ImageSet]:
    """Train and test images of the suite, or of `data` with the suite's splits."""
    name = data or suite.dataset.name
    if name is None or name.endswith(":"):
        raise UsageError(f"suite {suite.id} does not know where its images are: add --data {name or 'folder:'}/path")
    return open_dataset(name, split=suite.dataset.train), open_dataset(name, split=suite.dataset.test)


def check_labels(suite: Suite, train: ImageSet, test: ImageSet) -> None:
    """Refuse label sets on which the suite would give a wrong or empty number."""
    check_same_classes(train, test)
    if not protocol_module(suite.protocol).NEEDS_LABELS:
        return
    for images in (train, test):
        if images.labels is None:
            raise DinobenchError(
                f"suite {suite.id} needs labels, but {images.name} {images.split} has none: sort the images into one "
                "folder per class, or use a suite of protocol 'prototypes' or 'representation'"
            )
    check_two_classes(train)


def make_receipt(
    suite: Suite,
    model: LoadedModel,
    found: _Found,
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
        "dataset": found.images,
        "transform": found.transform,
        "feature": found.feature,
        "seed": context.seed,
        "device": context.device,
        "precision": precision,
        "knn_backend": context.backend,
        "features": found.features,
        "packages": installed_versions(PACKAGES),
        "wall_seconds": round(seconds, 3),
    }


def _readable(images: ImageSet, features: Features) -> ImageSet:
    """The images that have features."""
    return images if len(features.index) == len(images) else images.subset(features.index)


def _describe_images(images: ImageSet, features: Features) -> dict[str, Any]:
    """For the receipt."""
    facts: dict[str, Any] = {"name": images.name, "split": images.split, "n": len(features.index)}
    facts["fingerprint"] = images.fingerprint
    if unreadable := features.list_unreadable(images):
        facts["unreadable"] = unreadable
    return facts


def _describe_unreadable(images: ImageSet, features: Features) -> list[str]:
    """A sentence when images were left out."""
    unreadable = features.list_unreadable(images)
    if not unreadable:
        return []
    total, shown = len(images) + len(images.skipped), "; ".join(unreadable[:LISTED])
    left_out = f"{len(unreadable)} of {total} images of {images.name} {images.split} cannot be read and are left out"
    return [f"{left_out}: {shown}" + ("; ..." if len(unreadable) > LISTED else "")]


def _largest(labels: Tensor | None) -> int:
    return int(labels.max()) if labels is not None and len(labels) else -1


def _describe_spread(features: Tensor) -> list[str]:
    """A sentence when the features hardly differ between images."""
    unit = torch.nn.functional.normalize(features[:SPREAD_IMAGES].float(), dim=1)
    spread = (unit.std(0).mean() * unit.shape[1] ** 0.5).item()
    if spread < 0.01:
        return [f"the features hardly differ between images (relative standard deviation {spread:.2g}): collapsed"]
    return []
