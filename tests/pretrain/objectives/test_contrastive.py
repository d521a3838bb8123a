"""Contrastive losses against independent loops in numpy, and values known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretrain.objectives.contrastive import alignment, byol_regression, info_nce, nt_xent, uniformity


def _views(batch=7, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(batch, dim, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)]


def _unit(x):
    x = x.detach().numpy()
    return x / np.sqrt((x**2).sum(1, keepdims=True))


def _numpy_info_nce(queries, keys, temperature):
    q, k = _unit(queries), _unit(keys)
    terms = []
    for i in range(len(q)):
        candidates = np.exp([q[i] @ other / temperature for other in k])
        terms.append(-2 * temperature * np.log(candidates[i] / candidates.sum()))
    return np.mean(terms)


def _numpy_nt_xent(z1, z2, temperature):
    z = np.concatenate([_unit(z1), _unit(z2)])
    terms = []
    for i in range(len(z)):
        partner = (i + len(z) // 2) % len(z)
        rest = sum(np.exp(z[i] @ z[j] / temperature) for j in range(len(z)) if j != i)
        terms.append(-np.log(np.exp(z[i] @ z[partner] / temperature) / rest))
    return np.mean(terms)


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
@pytest.mark.parametrize(("ours", "plain"), [(info_nce, _numpy_info_nce), (nt_xent, _numpy_nt_xent)])
def test_loss_equals_the_loop_over_candidates(ours, plain, temperature):
    views = _views()
    np.testing.assert_allclose(ours(*views, temperature).item(), plain(*views, temperature), rtol=1e-12)


@pytest.mark.parametrize("loss", [lambda a, b: nt_xent(a, b, 0.3), lambda a, b: alignment(a, b, 3)])
def test_gradcheck_of_the_symmetric_losses(loss):
    assert torch.autograd.gradcheck(loss, _views(4, 3))


@pytest.mark.parametrize("loss", [lambda a, b: info_nce(a, b, 0.3), byol_regression])
def test_the_teacher_takes_no_gradient(loss):
    first, second = _views(4, 3)
    assert torch.autograd.gradcheck(lambda a: loss(a, second.detach()), first)
    loss(first, second).backward()
    assert second.grad is None


def test_equal_vectors_give_the_log_of_the_number_of_candidates():
    same = torch.ones(6, 4)
    assert info_nce(same, same, 0.2).item() == pytest.approx(2 * 0.2 * math.log(6), rel=1e-6)
    assert nt_xent(same, same, 0.2).item() == pytest.approx(math.log(11), rel=1e-6)


def test_orthogonal_images_have_a_known_loss():
    eye = torch.eye(5).double()
    assert info_nce(eye, 7 * eye, 0.5).item() == pytest.approx(2 * 0.5 * math.log(1 + 4 * math.exp(-2)))
    assert nt_xent(eye, 7 * eye, 0.5).item() == pytest.approx(math.log(1 + 8 * math.exp(-2)))


def test_small_temperatures_stay_finite_in_float32():
    views = [view.float() for view in _views()]
    assert math.isfinite(info_nce(*views, 1e-3).item()) and math.isfinite(nt_xent(*views, 1e-3).item())


def test_autocast_does_not_round_the_cosines():
    views = [view.float() for view in _views(dim=64)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = info_nce(*views, 0.05), nt_xent(*views, 0.05)
    assert rounded == (info_nce(*views, 0.05), nt_xent(*views, 0.05))


def test_regression_is_the_squared_distance_of_unit_vectors():
    first, second = _views()
    plain = ((_unit(first) - _unit(second)) ** 2).sum(1).mean()
    np.testing.assert_allclose(byol_regression(first, second).item(), plain, rtol=1e-12)
    assert byol_regression(first, 2 * first).item() == pytest.approx(0, abs=1e-12)
    assert byol_regression(first, -first).item() == pytest.approx(4)


@pytest.mark.parametrize("alpha", [1, 2, 3])
def test_alignment_is_the_mean_distance_to_the_power_alpha(alpha):
    first, second = _views()
    plain = (np.sqrt(((_unit(first) - _unit(second)) ** 2).sum(1)) ** alpha).mean()
    np.testing.assert_allclose(alignment(first, second, alpha).item(), plain, rtol=1e-12)


@pytest.mark.parametrize("t", [1, 2])
def test_uniformity_is_the_log_of_the_mean_potential_over_pairs(t):
    z = _views()[0]
    x = _unit(z)
    potentials = [np.exp(-t * ((x[i] - x[j]) ** 2).sum()) for i in range(len(x)) for j in range(i)]
    np.testing.assert_allclose(uniformity(z, t).item(), np.log(np.mean(potentials)), rtol=1e-12)


def test_uniformity_is_zero_when_all_are_equal_and_lower_when_spread():
    assert uniformity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.eye(4)).item() == pytest.approx(-4, rel=1e-6)
    collapsed = torch.ones(5, 3).requires_grad_()
    uniformity(collapsed).backward()
    assert collapsed.grad is not None and torch.isfinite(collapsed.grad).all()
