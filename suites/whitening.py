"""Whitening as in DINO's copy detection (facebookresearch/dino `utils.PCA`, `eval_copy_detection.py`).

Features are shifted by the mean of a separate set, turned into the axes of that set's second moment X^T X / n (about
zero: the official code does not subtract the mean there) and divided by the root of its eigenvalues. Eigenvalues below
1e-5 of the largest are raised to that.

Shapes: N features, D dimensions, d components kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-5
"""Share of the largest eigenvalue to which smaller ones are raised."""


@dataclass(frozen=True)
class Whitening:
    """A fitted whitening."""

    mean: Tensor
    """[D]."""
    components: Tensor
    """[d, D], largest eigenvalue first."""

    def __call__(self, features: Tensor) -> Tensor:
        """Features [N, D] -> whitened [N, d]."""
        return (features - self.mean) @ self.components.T


def fit_whitening(features: Tensor, num_components: int | None = None) -> Whitening:
    """The whitening of features [N, D]; all D components unless told otherwise. Computed in float64."""
    values = features.double()
    eigenvalues, vectors = torch.linalg.eigh(values.T @ values / len(values))
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    eigenvalues = eigenvalues.clamp(min=SMALLEST * float(eigenvalues[0]))
    components = (vectors / eigenvalues.sqrt()).T[:num_components]
    return Whitening(values.mean(0).to(features.dtype), components.to(features.dtype))
