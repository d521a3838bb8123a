"""Transfer to small data sets: L2-regularised logistic regression on frozen features, scored in the metric of each set.

Source: Kornblith, Shlens and Le, CVPR 2019, arXiv 1805.08974 (logistic regression), as SimCLR (appendix B.8) and the
public code of Ericsson, Gouk and Hospedales, CVPR 2021, arXiv 2011.13377 (linusericsson/ssl-transfer `linear.py`) do
it: images at 224 px, features as they are, one of 45 values of C chosen on the validation split of the set, or a
held-out part of train where it has none; then the classifier is fitted on both, and the test part is read once.

Metrics: suites.class_metrics. For several classes per image (voc07_map) there is one classifier of two classes for each
class, all at the same C; images in which every object of the class is marked difficult are left out in training too.

C is scikit-learn's, for two classes too. Ties in the choice go to the lower cross-entropy, then the lower C. Departures
from the public code: the held-out part is stratified by class and drawn with torch's generator (for several classes per
image: drawn from all), fits end at suites.multinomial's criterion instead of 100 iterations, and a precision of 1 at
recall 0 that no image gave is not counted.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pretrain.data import torchvision_sets
from pretrain.data.datasets import dataset_names, open_dataset
from pretrain.data.images import ImageSet
from pretrain.data.multi_label import MultiLabelSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError, UsageError
from suites.baselines import MAX_SIDE, raw_pixels
from suites.cache import content_key
from suites.class_metrics import Metric, class_table, metric_interval, metric_value
from suites.classifiers import LogisticClassifiers
from suites.extractor import Extractor
from suites.features import extract_with
from suites.protocols.linear import held_out_split
from suites.protocols.logistic import Parameters as LogisticParameters
from suites.protocols.logistic import prepare_rows
from suites.protocols.protocol import Context, Outcome, ProtocolParameters, Split, sample_table
from suites.suite import Feature, SuiteDataset

NEEDS_LABELS = True
READS_IMAGES = True


class Parameters(ProtocolParameters):
    """Numbers that define the score."""

    metric: Metric = "top1"
    """By which C is chosen."""
    validation: str | None = None
    """Split on which C is chosen; None = a held-out part of train."""
    transform: EvalTransform = EvalTransform(resize=224, crop=224)
    feature: Feature = "cls"
    logistic: LogisticParameters = LogisticParameters(first_exponent=-5, last_exponent=6, held_out=0.2)


@dataclass(frozen=True)
class TransferData:
    """The images of a set."""

    parts: dict[str, ImageSet]
    """train, test, and validation where the suite names one."""

    @property
    def name(self) -> str:
        return self.parts["train"].name

    @property
    def fingerprint(self) -> str:
        """Hash of the images and labels of all parts."""
        return content_key(**{role: images.fingerprint for role, images in self.parts.items()})

    def receipt(self) -> dict[str, dict[str, Any]]:
        """By role: name, split, n, fingerprint."""
        return {
            role: {"name": images.name, "split": images.split, "n": len(images), "fingerprint": images.fingerprint}
            for role, images in self.parts.items()
        }


@dataclass(frozen=True)
class Part:
    """Features [N, D] with labels [N] or presence [N, C]."""

    features: Tensor
    targets: Tensor
    index: Tensor
    """[N]: number of the image in its split."""


def open_data(dataset: SuiteDataset, data: str | None, parameters: Parameters) -> TransferData:
    """The splits of the suite's data set, or those of `data` with the same names.

    `data` may be another data set, or folder:/path that holds this one as the data root would.

    Raises:
        UsageError: there is no name, or no such split.
        DinobenchError: the set is not there, or its labels do not suit the metric.
    """
    name = data or dataset.name
    if name is None or name.endswith(":"):
        raise UsageError(f"this suite does not know where its images are: add --data {name or 'folder:'}/path")
    root = None
    if data and data.startswith("folder:") and dataset.name in torchvision_sets.SETS:
        folder = Path(data.removeprefix("folder:")).expanduser()
        if torchvision_sets.find(dataset.name, folder):
            name, root = dataset.name, folder
    splits = {"train": dataset.train, "validation": parameters.validation, "test": dataset.test}
    try:
        opened = TransferData({role: open_dataset(name, part, root=root) for role, part in splits.items() if part})
    except DinobenchError as error:
        if name not in {info.name for info in dataset_names() if not info.available}:
            raise
        layout = "these" if name in torchvision_sets.SETS else " ".join(f"{part}/" for part in splits.values() if part)
        raise DinobenchError(f"{error} Or add --data folder:/path with {layout} in that folder.") from error
    _check(opened, parameters)
    return opened


def _check(data: TransferData, parameters: Parameters) -> None:
    """Refuse labels that do not suit the metric, or do not mean the same in all splits."""
    several, train = parameters.metric == "voc07_map", data.parts["train"]
    for images in data.parts.values():
        if several and not isinstance(images, MultiLabelSet):
            raise DinobenchError(f"metric voc07_map needs several classes per image, as of voc2007: not {images.name}")
        if not several and images.labels is None:
            raise DinobenchError(
                f"metric {parameters.metric} needs one label per image, but {images.name} {images.split} has none: "
                "sort the images into one folder per class"
            )
        if images.classes != train.classes:
            odd = sorted(set(images.classes) ^ set(train.classes))[:5]
            raise DinobenchError(
                f"{data.name}: the classes of {train.split} ({len(train.classes)}) and {images.split} "
                f"({len(images.classes)}) differ, for example {', '.join(map(repr, odd))}, so labels do not mean the "
                "same: give all splits the same classes"
            )
    if train.labels is not None and len(train.labels.unique()) < 2:
        raise DinobenchError(f"{data.name} {train.split} has one class: every classifier would be right")


def run(data: TransferData, extractor: Extractor, parameters: Parameters, context: Context) -> Outcome:
    """Choose C, fit train and validation, score test."""
    parts = {role: _part(images, extractor, parameters) for role, images in data.parts.items()}
    outcome = score_features(parts, data.parts["train"].classes, parameters, context)
    for role, images in data.parts.items():
        left_out = len(images) - len(parts[role].index)
        if left_out:
            outcome.notes.append(
                f"{left_out} of {len(images)} images of {images.split} cannot be read and are left out"
            )
    return outcome


def _part(images: ImageSet, extractor: Extractor, parameters: Parameters) -> Part:
    """Features by the same cache entry as those of other suites with this transform."""
    found = extract_with(extractor, images, parameters.transform, parameters.feature)
    return Part(found.cls, _targets(images)[found.index], found.index)


def _targets(images: ImageSet) -> Tensor:
    targets = images.presence if isinstance(images, MultiLabelSet) else images.labels
    assert targets is not None
    return targets


def pixel_scores(data: TransferData, parameters: Parameters, context: Context) -> dict[str, float] | None:
    """Scores of the stored pixels as features; None for large images, images of several sizes, a validation split."""
    train, test = data.parts["train"], data.parts["test"]
    if "validation" in data.parts or max(max(images.image(0).size) for images in (train, test)) > MAX_SIDE:
        return None
    pixels = raw_pixels(train, test)
    if pixels is None:
        return None
    parts = {
        role: Part(values, _targets(images), torch.arange(len(images)))
        for role, values, images in zip(("train", "test"), pixels, (train, test), strict=True)
    }
    return score_features(parts, train.classes, parameters, context).scores


def score_features(
    parts: dict[str, Part], classes: tuple[str, ...], parameters: Parameters, context: Context
) -> Outcome:
    """Choose C on validation (or inside train), fit both, score test."""
    options, metric = parameters.logistic, parameters.metric
    rows = {
        role: prepare_rows(part.features.to(context.device), centre=options.centre_rows, scale=options.normalise_rows)
        for role, part in parts.items()
    }
    targets = {role: part.targets for role, part in parts.items()}
    features, known, fit, held = _learning_part(rows, targets, parameters, context)
    num_classes = len(classes)
    if known.ndim == 1:
        num_classes = max(num_classes, *(int(labels.max()) + 1 for labels in targets.values()))
    table = _validate(features, known, fit, held, num_classes, parameters)
    values, losses = table[f"held_out_{metric}"].tolist(), table["held_out_loss"].tolist()
    if not np.isfinite(values).all():
        raise DinobenchError(f"no class has an image among the {len(held)} on which C is chosen: give more images")
    best = max(range(len(table)), key=lambda i: (values[i], -losses[i], -i))
    c = options.penalties[best]
    final = _classifiers(features, known, num_classes, parameters)
    decisions, test = final.scores(final.fit(c), rows["test"]), parts["test"]
    names: list[Metric] = ["voc07_map"] if known.ndim == 2 else ["top1", "mean_per_class"]
    scores = {name: metric_value(name, decisions, test.targets) for name in names}
    scores |= {f"held_out_{metric}": values[best], "C": c}
    interval = metric_interval(metric, decisions, test.targets, context.seed)
    tables = {"path": table, "classes": class_table(decisions, test.targets, classes)}
    where = "the validation split" if "validation" in parts else "a held-out part of train"
    notes = [f"C={c:.3g} chosen among {len(table)} on {len(held)} images of {where}"]
    if len(table) > 1 and best in (0, len(table) - 1):
        notes.append("the chosen C is at the edge of the grid")
    unfinished = [*table["converged"], final.converged].count(False)
    if unfinished:
        notes.append(f"{unfinished} of {len(table) + 1} fits ended above the tolerance")
    return Outcome(scores, len(decisions), interval, _samples(decisions, test, classes), tables, notes)


def _learning_part(
    rows: dict[str, Tensor], targets: dict[str, Tensor], parameters: Parameters, context: Context
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and targets of all that may be learned from, and in it the images to fit and those to choose C on."""
    if "validation" in rows:
        features, known = (torch.cat([values["train"], values["validation"]]) for values in (rows, targets))
        fit, held = torch.arange(len(features)).split([len(rows["train"]), len(rows["validation"])])
        return features, known, fit, held
    known = targets["train"]
    strata = known if known.ndim == 1 else torch.zeros(len(known), dtype=torch.int64)
    fit, held = held_out_split(strata, parameters.logistic.held_out, context.seed)
    return rows["train"], known, fit, held


def _validate(
    features: Tensor, targets: Tensor, fit: Tensor, held: Tensor, num_classes: int, parameters: Parameters
) -> pd.DataFrame:
    """One row per C: the metric in percent and the cross-entropy on the images `held`, after a fit on `fit`."""
    here = features.device
    classifiers = _classifiers(features[fit.to(here)], targets[fit], num_classes, parameters)
    queries, wanted = features[held.to(here)], targets[held]
    rows = []
    for c in parameters.logistic.penalties:
        fits = classifiers.fit(c)
        decisions = classifiers.scores(fits, queries)
        value = metric_value(parameters.metric, decisions, wanted)
        rows.append((c, value, _loss(decisions, wanted), sum(f.evaluations for f in fits), classifiers.converged))
    columns = ["C", f"held_out_{parameters.metric}", "held_out_loss", "evaluations", "converged"]
    return pd.DataFrame(rows, columns=columns)


def _classifiers(features: Tensor, targets: Tensor, num_classes: int, parameters: Parameters) -> LogisticClassifiers:
    options = parameters.logistic.model_dump(include={"intercept", "tolerance", "max_evaluations"})
    return LogisticClassifiers(features, targets, num_classes, **options)


def _loss(decisions: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy; for presence [N, C], over all pairs of image and class that count."""
    if targets.ndim == 1:
        return nn.functional.cross_entropy(decisions, targets).item()
    counted = targets >= 0
    return nn.functional.binary_cross_entropy_with_logits(decisions[counted], targets[counted].double()).item()


def _samples(decisions: Tensor, test: Part, classes: tuple[str, ...]) -> pd.DataFrame:
    """Per image: index, label, prediction, correct; or index, and presence and log-odds of each class."""
    if test.targets.ndim == 1:
        prediction = decisions.argmax(1)
        return sample_table(Split(test.features, test.targets, test.index), prediction, prediction == test.targets)
    columns = {f"label_{name}": test.targets[:, c].numpy() for c, name in enumerate(classes)}
    columns |= {f"score_{name}": decisions[:, c].numpy() for c, name in enumerate(classes)}
    return pd.DataFrame({"index": test.index.numpy(), **columns})
