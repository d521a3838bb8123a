"""Region similarity J and contour accuracy F of a mask, as DAVIS defines them (Perazzi et al., CVPR 2016, section 5).

    J   intersection over union of the two masks; 1 when both are empty
    F   2 P R / (P + R): P is the share of the found contour that lies near the true contour, R the share of the true
        contour that lies near the found one. Near: within a disk whose radius is 0.8 % of the image diagonal, rounded
        up. Without contours on both sides F is 1, without contours on one side 0.

The contour is made of the pixels that differ from their right, lower or lower right neighbour. Over the frames of an
object: mean; recall, the share of frames above 0.5; decay, the mean of the first quarter of frames minus the last.

Shapes: H x W pixels, F frames.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
TOLERANCE = 0.008
"""Radius of the disk as a share of the diagonal."""
RECALL_ABOVE = 0.5


class Summary(NamedTuple):
    """Of the values of one measure over the frames of one object."""

    mean: float
    recall: float
    decay: float


def region_similarity(found: Mask, true: Mask) -> float:
    """J of two masks [H, W]."""
    union = np.count_nonzero(found | true)
    return np.count_nonzero(found & true) / union if union else 1.0


def contour_accuracy(found: Mask, true: Mask, tolerance: float = TOLERANCE) -> float:
    """F of two masks [H, W]."""
    radius = math.ceil(tolerance * math.hypot(*true.shape))
    found_contour, true_contour = contour(found), contour(true)
    num_found, num_true = np.count_nonzero(found_contour), np.count_nonzero(true_contour)
    if not num_found and not num_true:
        return 1.0
    if not num_found or not num_true:
        return 0.0
    precision = np.count_nonzero(found_contour & widen(true_contour, radius)) / num_found
    recall = np.count_nonzero(true_contour & widen(found_contour, radius)) / num_true
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: Mask) -> Mask:
    """The contour [H, W] of a mask [H, W]; beyond the border the mask goes on unchanged."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    return (here != padded[:-1, 1:]) | (here != padded[1:, :-1]) | (here != padded[1:, 1:])


def widen(points: Mask, radius: int) -> Mask:
    """All pixels [H, W] within `radius` of a marked one.

    Contours are thin, so each of their points marks its disk: much less work than a convolution of the image.
    """
    rows, columns = np.nonzero(points)
    wide = np.zeros((points.shape[0] + 2 * radius, points.shape[1] + 2 * radius), dtype=bool)
    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            if down * down + right * right <= radius * radius:
                wide[rows + radius + down, columns + radius + right] = True
    return wide[radius : radius + points.shape[0], radius : radius + points.shape[1]]


def summarise(values: NDArray[np.float64]) -> Summary:
    """Mean, recall and decay of values [F]; neighbouring quarters share the frame between them."""
    edges = np.floor(np.linspace(1, len(values), 5) + 0.5).astype(int) - 1
    first, last = values[: edges[1] + 1], values[edges[3] : edges[4] + 1]
    return Summary(float(values.mean()), float((values > RECALL_ABOVE).mean()), float(first.mean() - last.mean()))
