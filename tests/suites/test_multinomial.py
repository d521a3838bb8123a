"""Logistic regression against scikit-learn, and what a path of penalties costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from suites import multinomial
from suites.multinomial import LogisticPath

GRID = 10 ** np.linspace(-6, 5, 45)


def digits() -> tuple[Tensor, Tensor]:
    data, target = load_digits(return_X_y=True)
    return torch.from_numpy(data[:600] / 16), torch.from_numpy(target[:600]).long()


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0])
def test_weights_equal_those_of_scikit_learn(c: float, intercept: bool) -> None:
    x, y = digits()
    fit = LogisticPath(x, y, intercept=intercept, tolerance=1e-8).fit(c)
    oracle = LogisticRegression(C=c, fit_intercept=intercept, tol=1e-8, max_iter=5000).fit(x.numpy(), y.numpy())
    assert fit.converged
    np.testing.assert_allclose(fit.weight, oracle.coef_, atol=2e-5 * np.abs(oracle.coef_).max())
    logits = fit.logits(x).softmax(1)
    np.testing.assert_allclose(logits, oracle.predict_proba(x.numpy()), atol=1e-5)


def test_few_images_of_many_dimensions_equal_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 50, generator=generator).double(), torch.arange(12) % 3 * 4
    for intercept in (True, False):
        fit = LogisticPath(x, y, intercept=intercept, tolerance=1e-9).fit(10.0)
        oracle = LogisticRegression(C=10.0, fit_intercept=intercept, tol=1e-10, max_iter=5000).fit(x.numpy(), y.numpy())
        np.testing.assert_allclose(fit.weight, oracle.coef_, atol=1e-5)
        assert fit.labels.tolist() == [0, 4, 8]


def test_two_classes_are_scikit_learns_problem_at_twice_c() -> None:
    x, y = digits()
    x, y = x[y < 2], y[y < 2]
    fit = LogisticPath(x, y, tolerance=1e-8).fit(0.2)
    oracle = LogisticRegression(C=0.4, tol=1e-9, max_iter=5000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose((fit.weight[1] - fit.weight[0])[None], oracle.coef_, atol=1e-5)


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    x, y = digits()
    path = LogisticPath(x, y, tolerance=1e-7)
    for c in (1e-3, 1e-2, 0.1, 1.0):
        warm = path.fit(c)
    cold = LogisticPath(x, y, tolerance=1e-7).fit(1.0)
    torch.testing.assert_close(warm.weight, cold.weight, rtol=0, atol=1e-3 * cold.weight.abs().max().item())
    torch.testing.assert_close(warm.logits(x).softmax(1), cold.logits(x).softmax(1), rtol=0, atol=1e-4)


def plain_passes(x: Tensor, y: Tensor, c: float) -> int:
    """Passes over the data of L-BFGS from zero weights, as scikit-learn runs it, to the same gradient norm."""
    inputs = torch.cat([x, x.new_ones(len(x), 1)], 1)
    one_hot = torch.nn.functional.one_hot(y).double()
    penalty = torch.full((inputs.shape[1],), 1 / (c * len(x))).double()
    penalty[-1] = 0
    norms: list[float] = []

    class Converged(Exception):
        pass

    def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(one_hot.shape[1], -1)
        log_probability = (inputs @ weights.T).log_softmax(1)
        gradient = (log_probability.exp() - one_hot).T @ inputs / len(x) + penalty * weights
        norms.append(gradient.norm().item())
        if norms[-1] <= multinomial.TOLERANCE * norms[0]:
            raise Converged
        loss = -(log_probability * one_hot).sum() / len(x) + 0.5 * (penalty * weights.square()).sum()
        return loss.item(), gradient.flatten().numpy()

    start = np.zeros(one_hot.shape[1] * inputs.shape[1])
    with pytest.raises(Converged):
        minimize(evaluate, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "gtol": 0, "ftol": 0})
    return len(norms)


@pytest.mark.parametrize("unit", [False, True], ids=["pixels", "rows of length 1"])
def test_path_of_45_penalties_costs_at_most_5_fits_of_plain_lbfgs(unit: bool) -> None:
    """The mean over the grid, small penalties and large ones: measured 1.7 and 2.2."""
    x, y = digits()
    if unit:
        x = torch.nn.functional.normalize(x, dim=1)
    path = LogisticPath(x, y)
    warm = [path.fit(c) for c in GRID]
    assert all(fit.converged for fit in warm)
    cold = np.mean([plain_passes(x, y, c) for c in GRID[2::5]])
    assert sum(fit.evaluations for fit in warm) <= 5 * cold


@pytest.mark.parametrize("unit", [False, True], ids=["pixels", "rows of length 1"])
def test_path_of_45_penalties_costs_at_most_5_of_the_costliest_cold_fits(unit: bool) -> None:
    x, y = digits()
    if unit:
        x = torch.nn.functional.normalize(x, dim=1)
    path = LogisticPath(x, y)
    warm = [path.fit(c) for c in GRID]
    cold = [LogisticPath(x, y).fit(c) for c in GRID[20::4]]
    assert all(fit.converged for fit in (*warm, *cold))
    assert sum(fit.evaluations for fit in warm) <= 5 * max(fit.evaluations for fit in cold)


def test_every_counted_pass_reads_the_data_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    evaluate = LogisticPath._evaluate
    monkeypatch.setattr(LogisticPath, "_evaluate", lambda self, w: calls.append(1) or evaluate(self, w))
    path = LogisticPath(*digits())
    counted = sum(path.fit(c).evaluations for c in (1e-3, 1e-2, 1e-1))
    assert len(calls) == counted + 1  # the first one, at zero weights, belongs to no fit


def test_parts_of_the_data_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = digits()
    whole = LogisticPath(x, y, tolerance=1e-8).fit(0.1)
    monkeypatch.setattr(multinomial, "CHUNK_VALUES", 10 * 7)
    torch.testing.assert_close(LogisticPath(x, y, tolerance=1e-8).fit(0.1).weight, whole.weight, rtol=0, atol=1e-6)


def test_a_fit_that_is_cut_short_says_so() -> None:
    fit = LogisticPath(*digits(), max_evaluations=3).fit(1.0)
    assert (fit.evaluations, fit.converged) == (3, False)
    assert fit.gradient_norm > multinomial.TOLERANCE


def test_features_without_any_spread_predict_the_class_frequencies() -> None:
    y = torch.tensor([0, 0, 0, 1])
    fit = LogisticPath(torch.ones(4, 3), y, tolerance=1e-8).fit(1.0)
    torch.testing.assert_close(fit.logits(torch.ones(1, 3)).softmax(1), torch.tensor([[0.75, 0.25]]).double())
