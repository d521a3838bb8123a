"""Multinomial logistic regression with an L2 penalty along a path of penalties, by L-BFGS in float64 on any device.

    minimise over W [K, D], b [K]    mean_i -log softmax(W x_i + b)_{y_i} + lambda ||W||^2 / 2,    lambda = 1 / (C n)

This is the objective of scikit-learn's and cuML's LogisticRegression(C), divided by C n; lambda is the penalty as
cyanure takes it. b is not penalised. (For two classes scikit-learn fits one vector instead of two: this problem at C
is its at 2 C.)

Four things make a path cheap. (1) The features are turned into the eigenbasis of their second moment, where the penalty
is the same and the Hessian nearly diagonal: about v s_j + lambda for component j of second moment s_j, v the mean
variance of a predicted probability. That diagonal starts every L-BFGS direction. (2) A fit starts from the parabola in
log lambda through the last three solutions, or from the last one where that is better. (3) The curvature pairs (s, y)
of L-BFGS are kept: a step from lambda to lambda' changes y by exactly (lambda' - lambda) s. (4) Of the last solution
the loss and its gradient are known, so that a fit which has nothing left to do costs no pass over the data.

Shapes: n images, D features, R their rank at most, K classes present in the labels.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HISTORY = 40
"""Curvature pairs kept."""
CHUNK_VALUES = 2**25
"""Logits held at a time: 256 MiB."""
TOLERANCE = 1e-5
MAX_EVALUATIONS = 1000
MAX_BACKTRACKS = 20
ROUNDING = 1e-14
"""Relative change of the objective that is not told from none."""


@dataclass(frozen=True)
class LogisticFit:
    """One solution."""

    weight: Tensor
    """[K, D] float64."""
    bias: Tensor
    """[K] float64; zero without intercept."""
    labels: Tensor
    """[K]: the label of each row, ascending."""
    evaluations: int
    """Passes over the data (loss and gradient) that it took."""
    gradient_norm: float
    """Of the objective at the end, relative to that of the loss at zero weights."""
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """features [N, D] -> logits [N, K] float64."""
        return torch.addmm(self.bias, features.double(), self.weight.T)


class _Point(NamedTuple):
    """Weights [K, R (+ 1)] and what is known of the loss there."""

    weights: Tensor
    loss: float
    gradient: Tensor
    """Of the loss, without the penalty."""
    variance: float
    """Mean variance of a predicted probability."""


class _Pair(NamedTuple):
    """Curvature seen along a step: s [K, R (+ 1)], the change y of the gradient, and their product."""

    s: Tensor
    y: Tensor
    sy: Tensor


class LogisticPath:
    """Fits of one training set, each started from those before."""

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        intercept: bool = True,
        tolerance: float = TOLERANCE,
        max_evaluations: int = MAX_EVALUATIONS,
    ):
        """Take features [n, D] of any float type and labels [n] on one device.

        Args:
            intercept: Fit b; without it b is 0.
            tolerance: A fit ends when the norm of its gradient is below `tolerance` times that of the loss at W = 0.
            max_evaluations: Passes over the data after which a fit ends as it is.
        """
        self.labels, self._target = labels.unique(return_inverse=True)
        self.tolerance, self.max_evaluations, self.intercept = tolerance, max_evaluations, intercept
        x = features.double()
        # With an intercept, shifted features are the same problem, and its bias no longer hangs on the weights.
        self._mean = x.mean(0) if intercept else x.new_zeros(x.shape[1])
        self._basis, self._x, self._moment = _eigenbasis(x - self._mean)
        self._penalised = torch.ones_like(self._moment)
        if intercept:
            one = self._moment.new_ones(1)
            self._x = torch.cat([self._x, self._x.new_ones(len(x), 1)], 1)
            self._moment, self._penalised = torch.cat([self._moment, one]), torch.cat([self._penalised, 0 * one])
        self._strength = 0.0
        self._pairs: deque[_Pair] = deque(maxlen=HISTORY)
        self._solutions: deque[tuple[float, Tensor]] = deque(maxlen=3)
        self._point = self._evaluate(self._x.new_zeros(len(self.labels), len(self._moment)))
        self._unit = self._point.gradient.norm().clamp_min(1e-300)

    def fit(self, c: float) -> LogisticFit:
        """The solution at inverse penalty C = `c`; the path starts from zero weights."""
        before, self._strength = self._strength, 1 / (c * len(self._x))
        change = (self._strength - before) * self._penalised
        self._pairs = deque((_pair(pair.s, pair.y + change * pair.s) for pair in self._pairs), maxlen=HISTORY)
        evaluations = 0
        if self._gradient_norm(self._point) > self.tolerance and len(self._solutions) > 1:
            predicted = self._evaluate(self._extrapolate())
            evaluations = 1
            if self._gradient_norm(predicted) < self._gradient_norm(self._point):
                self._move(predicted)
        stuck = False
        while not stuck and self._gradient_norm(self._point) > self.tolerance and evaluations < self.max_evaluations:
            tried, stuck = self._step()
            evaluations += tried
        self._solutions.append((math.log(self._strength), self._point.weights))
        return self._read(evaluations)

    def _read(self, evaluations: int) -> LogisticFit:
        weights, norm = self._point.weights, self._gradient_norm(self._point)
        weight = weights[:, : self._basis.shape[1]] @ self._basis.T
        bias = weights[:, -1] - weight @ self._mean if self.intercept else weight.new_zeros(len(weight))
        return LogisticFit(weight, bias, self.labels, evaluations, norm, norm <= self.tolerance)

    def _extrapolate(self) -> Tensor:
        """Weights at the present lambda, by the polynomial in log lambda through the last solutions (Lagrange)."""
        here, weights = math.log(self._strength), torch.zeros_like(self._point.weights)
        places = [place for place, _ in self._solutions]
        for place, solution in self._solutions:
            others = [other for other in places if other != place]
            weights += math.prod((here - other) / (place - other) for other in others) * solution
        return weights

    def _step(self) -> tuple[int, bool]:
        """One L-BFGS step with a backtracking line search: the evaluations it took, and whether it found none."""
        gradient = self._gradient(self._point)
        direction = self._direction(gradient)
        slope = _dot(gradient, direction).item()
        value = self._objective(self._point)
        size = 1.0
        for tried in range(1, MAX_BACKTRACKS + 1):
            point = self._evaluate(self._point.weights + size * direction)
            rise = self._objective(point) - value
            if rise <= 1e-4 * size * slope + ROUNDING * abs(value):
                self._move(point)
                return tried, False
            # The minimum of the parabola through the value, the slope and the value found.
            size *= min(max(-slope * size / (2 * (rise - slope * size)), 0.1), 0.5)
        return MAX_BACKTRACKS, True

    def _move(self, point: _Point) -> None:
        """Go to `point` and keep the curvature seen on the way."""
        s, y = point.weights - self._point.weights, self._gradient(point) - self._gradient(self._point)
        if _dot(s, y) > ROUNDING * s.norm() * y.norm():
            self._pairs.append(_pair(s, y))
        self._point = point

    def _direction(self, gradient: Tensor) -> Tensor:
        """- H^-1 gradient [K, R (+ 1)] by the two-loop recursion of L-BFGS (Nocedal & Wright, algorithm 7.4)."""
        diagonal = 1 / (self._point.variance * self._moment + self._strength * self._penalised).clamp_min(1e-300)
        q, alphas = gradient.clone(), []
        for pair in reversed(self._pairs):
            alphas.append(_dot(pair.s, q) / pair.sy)
            q -= alphas[-1] * pair.y
        if self._pairs:
            last = self._pairs[-1]
            diagonal = diagonal * last.sy / _dot(last.y, diagonal * last.y)
        q *= diagonal
        for pair, alpha in zip(self._pairs, reversed(alphas), strict=True):
            q += (alpha - _dot(pair.y, q) / pair.sy) * pair.s
        return -q

    def _objective(self, point: _Point) -> float:
        return point.loss + 0.5 * self._strength * (self._penalised * point.weights.square()).sum().item()

    def _gradient(self, point: _Point) -> Tensor:
        return point.gradient + self._strength * self._penalised * point.weights

    def _gradient_norm(self, point: _Point) -> float:
        return (self._gradient(point).norm() / self._unit).item()

    def _evaluate(self, weights: Tensor) -> _Point:
        """One pass over the data."""
        loss = squares = weights.new_zeros(())
        gradient = torch.zeros_like(weights)
        rows = max(1, CHUNK_VALUES // len(weights))
        for x, y in zip(self._x.split(rows), self._target.split(rows), strict=True):
            log_probability = (x @ weights.T).log_softmax(1)
            loss = loss - log_probability.gather(1, y[:, None]).sum()
            error = log_probability.exp_()
            squares = squares + error.square().sum()
            error.scatter_add_(1, y[:, None], error.new_full((len(y), 1), -1))
            gradient.addmm_(error.T, x)
        num_images, num_classes = len(self._x), len(weights)
        variance = (1 - squares.item() / num_images) / max(num_classes - 1, 1)
        return _Point(weights, loss.item() / num_images, gradient / num_images, max(variance, 1e-9))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


def _pair(s: Tensor, y: Tensor) -> _Pair:
    return _Pair(s, y, _dot(s, y))


def _eigenbasis(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Basis [D, R], x in it [n, R] and the second moment [R] of each component, of features x [n, D]."""
    if len(x) < x.shape[1]:  # few images span few directions, and the solution lies in them
        basis = torch.linalg.svd(x, full_matrices=False).Vh.T
    else:
        basis = torch.linalg.eigh(x.T @ x).eigenvectors
    turned = x @ basis
    return basis, turned, turned.square().mean(0)
