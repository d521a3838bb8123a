"""Scores of a classifier of images, with their intervals over images and one row per class.

    top1            share of images whose class is right
    mean_per_class  the same per class, averaged over the classes that have images (balanced accuracy)
    voc07_map       for several classes per image: mean average precision, see suites.eleven_point

In percent. Shapes: N images, C classes, R resamples.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from suites.eleven_point import average_precision, mean_average_precision
from suites.interval import bootstrap_interval, mean_interval

Metric = Literal["top1", "mean_per_class", "voc07_map"]


def metric_value(metric: Metric, decisions: Tensor, targets: Tensor) -> float:
    """The metric of decisions [N, C] against labels [N], or presence [N, C] (1, 0, -1: does not count)."""
    if metric == "voc07_map":
        return 100 * mean_average_precision(decisions.numpy(), targets.numpy()).item()
    correct = (decisions.argmax(1) == targets).double()
    if metric == "top1":
        return 100 * correct.mean().item()
    return 100 * _recall(correct, targets).mean().item()


def metric_interval(metric: Metric, decisions: Tensor, targets: Tensor, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval over images."""
    if metric == "voc07_map":
        scores, presence = decisions.numpy(), targets.numpy()

        def of_images(counts: NDArray[np.int64]) -> NDArray[np.float64]:
            return 100 * mean_average_precision(scores, presence, counts)

        return bootstrap_interval(np.arange(len(scores)), of_images, seed=seed)
    correct = decisions.argmax(1) == targets
    if metric == "top1":
        return mean_interval(100.0 * correct.numpy(), seed=seed)
    found, number = targets.unique(return_inverse=True)

    def of_groups(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        # Wrong and right images of each class side by side; the last group may be empty and then has no column.
        pairs = np.pad(counts, ((0, 0), (0, 2 * len(found) - counts.shape[1]))).reshape(len(counts), -1, 2)
        total = pairs.sum(2)
        recall = pairs[:, :, 1] / np.maximum(total, 1)
        return 100 * recall.sum(1) / (total > 0).sum(1)

    return bootstrap_interval(2 * number.numpy() + correct.numpy(), of_groups, seed=seed)


def class_table(decisions: Tensor, targets: Tensor, classes: tuple[str, ...]) -> pd.DataFrame:
    """One row per class that has images: class, n (images that show it), and its recall or average precision."""
    if targets.ndim == 2:
        number = (targets == 1).sum(0)
        found = number.nonzero().flatten()
        values = [average_precision(decisions[:, c].numpy(), targets[:, c].numpy()).item() for c in found.tolist()]
        value, column = 100 * np.array(values), "average_precision"
    else:
        number = targets.bincount()
        found = number.nonzero().flatten()
        value, column = 100 * _recall((decisions.argmax(1) == targets).double(), targets).numpy(), "recall"
    names = [classes[label] if label < len(classes) else str(label) for label in found.tolist()]
    return pd.DataFrame({"class": names, "n": number[found].numpy(), column: value})


def _recall(correct: Tensor, labels: Tensor) -> Tensor:
    """Share of right images of each class that has some, ascending."""
    found, number = labels.unique(return_inverse=True)
    return torch.zeros(len(found)).double().index_add_(0, number, correct) / number.bincount()
