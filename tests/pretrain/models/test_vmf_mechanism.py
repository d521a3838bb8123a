"""What log C_p does: on a mixture with known spreads it lets the prototypes' norms find the concentrations.

The data are a von Mises-Fisher mixture in p = 16 with overlapping components, three for each of four concentrations.
Only W is fitted (from unit vectors along the true means), by cross-entropy at tau = 0.1, with and without log C_p.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from pretrain.models import vmf

DIM, TAU = 16, 0.1
CONCENTRATIONS = (15.0, 30.0, 60.0, 120.0)
COMPONENTS_EACH, SAMPLES_EACH = 3, 200
OVERLAP = 2.0
"""Weight of the direction that all means share."""


@dataclass
class Mixture:
    means: Tensor  # [K, P]
    kappa: Tensor  # [K]
    samples: Tensor  # [N, P]
    labels: Tensor  # [N]


def sample_mixture(seed: int) -> Mixture:
    rng = np.random.default_rng(seed)
    kappa = np.repeat(CONCENTRATIONS, COMPONENTS_EACH)
    shared, own = rng.normal(size=DIM), rng.normal(size=(len(kappa), DIM))
    means = OVERLAP * shared / np.linalg.norm(shared) + own / np.linalg.norm(own, axis=1, keepdims=True)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    samples = [
        stats.vonmises_fisher(mean, k).rvs(SAMPLES_EACH, random_state=rng) for mean, k in zip(means, kappa, strict=True)
    ]
    labels = torch.arange(len(kappa)).repeat_interleave(SAMPLES_EACH)
    return Mixture(torch.tensor(means), torch.tensor(kappa), torch.tensor(np.concatenate(samples)), labels)


def fit(mixture: Mixture, target: Tensor, *, with_normaliser: bool) -> tuple[float, float]:
    """Fit W to labels [N] or responsibilities [N, K]; gives cross-entropy and rank correlation of ||w|| with kappa."""
    w = mixture.means.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=60, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        logits = mixture.samples @ w.T / TAU
        return F.cross_entropy(logits + vmf.vmf_bias(w, TAU) if with_normaliser else logits, target)

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    optimizer.step(closure)
    norms = w.detach().norm(dim=1)
    return loss().item(), float(stats.spearmanr(norms, mixture.kappa).statistic)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_log_c_lowers_the_cross_entropy_and_ranks_precision(seed: int) -> None:
    mixture = sample_mixture(seed)
    with_c, rank_with_c = fit(mixture, mixture.labels, with_normaliser=True)
    without_c, rank_without_c = fit(mixture, mixture.labels, with_normaliser=False)
    assert with_c < 0.8 * without_c
    assert rank_with_c >= 0.8
    assert rank_without_c < 0.5


def test_true_responsibilities_give_back_the_concentrations() -> None:
    mixture = sample_mixture(0)
    truth = mixture.means * mixture.kappa[:, None] * TAU
    responsibilities = vmf.log_posterior(mixture.samples, truth, TAU).exp()
    with_c, rank_with_c = fit(mixture, responsibilities, with_normaliser=True)
    without_c, rank_without_c = fit(mixture, responsibilities, with_normaliser=False)
    assert with_c < 0.8 * without_c
    assert rank_with_c >= 0.8
    assert rank_without_c < 0.5


def test_fixed_point_of_the_norm_is_the_maximum_likelihood_condition() -> None:
    """A component that owns its samples stops growing where A_p(kappa) equals their mean resultant length."""
    mixture = sample_mixture(1)
    own = mixture.samples[mixture.labels == 5]
    resultant = own.mean(0)
    direction = resultant / resultant.norm()
    kappa = torch.tensor([40.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([kappa], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        likelihood = kappa * (own @ direction).mean() + vmf.log_normalizer(kappa, DIM)
        (-likelihood).sum().backward()
        return -likelihood.detach().sum()

    optimizer.step(closure)  # type: ignore[arg-type]
    (slope,) = torch.autograd.grad(vmf.log_normalizer(kappa, DIM).sum(), kappa)
    assert float(-slope) == pytest.approx(float(resultant.norm()), abs=1e-6)
    assert float(kappa.detach()) == pytest.approx(float(mixture.kappa[5]), rel=0.15)
