"""Logistic classifiers along a path of penalties, of one class per image or of several.

C is scikit-learn's: the weight of the summed cross-entropy against half the squared norm of the weights.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from suites.multinomial import LogisticFit, LogisticPath
from suites.protocols.logistic import class_scores


class LogisticClassifiers:
    """One classifier of labels [N], or one of two classes for each column of presence [N, C] (1, 0, -1: left out)."""

    def __init__(self, features: Tensor, targets: Tensor, num_classes: int, **options: Any):
        """Take features [N, D] with labels or presence; options are those of LogisticPath."""
        self.num_classes, self.several = num_classes, targets.ndim == 2
        self.converged = True
        """Whether all fits at the last C came to their tolerance."""
        targets = targets.to(features.device)
        problems = [(features, targets)]
        if self.several:
            problems = [(features[column >= 0], column[column >= 0]) for column in targets.T]
        self._paths = [LogisticPath(x, y, **options) for x, y in problems]

    def fit(self, c: float) -> list[LogisticFit]:
        """The classifiers at inverse penalty `c`, each started from those before; see suites.multinomial."""
        # scikit-learn fits one vector for two classes where LogisticPath fits two: half its C is the same problem.
        fits = [path.fit(c / 2 if len(path.labels) == 2 else c) for path in self._paths]
        self.converged = all(fit.converged for fit in fits)
        return fits

    def scores(self, fits: list[LogisticFit], features: Tensor) -> Tensor:
        """Logits, or log-odds of presence, [N, C] float64 on the CPU for features [N, D]."""
        if not self.several:
            return class_scores(fits[0], features, self.num_classes)
        columns = []
        for fit in fits:
            # Of a class that the images fitted on all show, or none of them, nothing is known.
            logits = fit.logits(features).cpu() if len(fit.labels) == 2 else torch.zeros(len(features), 2).double()
            columns.append(logits[:, 1] - logits[:, 0])
        return torch.stack(columns, 1)
