"""Mean intersection over union of label maps, from pixel counts per image and class.

The intersections and unions of a class are summed over all images, then divided; the mean is over the classes. A class
in neither labels nor predictions has no value and is left out; one that is predicted and never right counts 0. Pixels
that are not judged count nowhere, as in mmsegmentation's `intersect_and_union`.

Every count is a sum over images, so the bootstrap over images draws how often each image counts and never looks at
pixels again. Shapes: N images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from suites.interval import bootstrap_interval

Counts = NDArray[np.float64]
"""Numbers of pixels; float64 is exact up to 2^53 and multiplies fast."""


@dataclass(frozen=True)
class Overlap:
    """Pixels of each image [N, C]."""

    shared: Counts
    """Labelled and predicted as this class."""
    labelled: Counts
    predicted: Counts

    def class_iou(self) -> Counts:
        """[C] in [0, 1]; NaN for a class that is nowhere."""
        return _iou(self.shared.sum(0), self.labelled.sum(0), self.predicted.sum(0))

    def mean_iou(self) -> float:
        """In [0, 1]; NaN when no pixel is judged."""
        return float(_mean(self.class_iou()))

    def pixel_accuracy(self) -> float:
        """Share of the judged pixels that are right."""
        return float(self.shared.sum() / self.labelled.sum()) if self.labelled.any() else float("nan")

    def class_accuracy(self) -> float:
        """Mean over the classes that are labelled somewhere of the share of their pixels that are right."""
        return float(_mean(_divide(self.shared.sum(0), self.labelled.sum(0))))

    def interval(self, seed: int) -> tuple[float, float]:
        """95 % bootstrap interval of the mean IoU over images."""

        def statistic(counts: NDArray[np.int64]) -> NDArray[np.float64]:
            drawn = counts.astype(np.float64)
            return _mean(_iou(drawn @ self.shared, drawn @ self.labelled, drawn @ self.predicted))

        return bootstrap_interval(np.arange(len(self.shared)), statistic, seed=seed)

    def images(self) -> pd.DataFrame:
        """Per image, in percent: mean IoU over the classes that it shows or is given, and pixel accuracy."""
        right, judged = self.shared.sum(1), self.labelled.sum(1)
        return pd.DataFrame(
            {
                "pixels": judged.astype(np.int64),
                "correct_pixels": right.astype(np.int64),
                "pixel_accuracy": 100 * _divide(right, judged),
                "miou": 100 * _mean(_iou(self.shared, self.labelled, self.predicted)),
            }
        )

    def classes(self, names: tuple[str, ...]) -> pd.DataFrame:
        """Per class: IoU and accuracy in percent, and the pixels behind them."""
        shared, labelled, predicted = (part.sum(0) for part in (self.shared, self.labelled, self.predicted))
        return pd.DataFrame(
            {
                "class": np.arange(len(names)),
                "name": list(names),
                "iou": 100 * _iou(shared, labelled, predicted),
                "accuracy": 100 * _divide(shared, labelled),
                "correct_pixels": shared.astype(np.int64),
                "labelled_pixels": labelled.astype(np.int64),
                "predicted_pixels": predicted.astype(np.int64),
            }
        )


def count_pixels(labels: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Shared, labelled and predicted pixels of one image: int64 [3, C].

    Args:
        labels: classes of any shape; those not below `num_classes` are not judged.
        prediction: classes [same shape].
    """
    judged = labels < num_classes
    pairs = labels[judged].long() * num_classes + prediction[judged].long()
    confusion = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
    return torch.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)])


def overlap_of(counts: Tensor) -> Overlap:
    """Of the counts of all images [N, 3, C]."""
    shared, labelled, predicted = counts.cpu().numpy().astype(np.float64).transpose(1, 0, 2)
    return Overlap(shared, labelled, predicted)


def _iou(shared: Counts, labelled: Counts, predicted: Counts) -> Counts:
    return _divide(shared, labelled + predicted - shared)


def _divide(part: Counts, whole: Counts) -> Counts:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean(values: Counts) -> Counts:
    """Over the last axis, without NaN; NaN where nothing is left."""
    there = np.isfinite(values)
    return _divide(np.where(there, values, 0).sum(-1), there.sum(-1).astype(np.float64))
