"""log C_p(kappa) against mpmath and the golden values, its gradient, its precision in float32, and the mixture."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.errors import UsageError
from pretrain.models import vmf

Golden = Callable[[str], dict[str, np.ndarray]]


def oracle(kappa: float, dim: int) -> tuple[float, float, float]:
    """log C_p(kappa) - log C_p(0), log C_p(kappa), A_p(kappa), with 40 digits."""
    with mpmath.workdps(40):
        p, k = mpmath.mpf(dim), mpmath.mpf(kappa)
        at_zero = mpmath.loggamma(p / 2) - mpmath.log(2) - p / 2 * mpmath.log(mpmath.pi)
        if k == 0:
            return 0.0, float(at_zero), 0.0
        nu = p / 2 - 1
        bessel, following = mpmath.besseli(nu, k), mpmath.besseli(nu + 1, k)
        value = nu * mpmath.log(k) - p / 2 * mpmath.log(2 * mpmath.pi) - mpmath.log(bessel)
        return float(value - at_zero), float(value), float(following / bessel)


def value_and_slope(
    kappa: Tensor, dim: int, form: vmf.Form = "exact", difference: bool = True
) -> tuple[Tensor, Tensor]:
    kappa = kappa.clone().requires_grad_()
    value = vmf.log_normalizer(kappa, dim, form, difference=difference)
    (slope,) = torch.autograd.grad(value.sum(), kappa)
    return value.detach(), slope


def test_golden_vmf_logC(golden: Golden) -> None:
    reference = golden("vmf_logC")
    kappa = torch.from_numpy(reference["kappa"])
    for row, dim in enumerate(reference["p"].tolist()):
        value, slope = value_and_slope(kappa, dim, difference=False)
        torch.testing.assert_close(value, torch.from_numpy(reference["log_Cp"][row]), rtol=0, atol=1e-6)
        torch.testing.assert_close(slope, torch.from_numpy(reference["dlogCp_dkappa"][row]), rtol=0, atol=1e-6)
        assert vmf.log_normalizer_at_zero(dim) == pytest.approx(float(reference["log_Cp_at_zero"][row]), abs=1e-9)
        nu = dim / 2 - 1
        bessel = nu * kappa.log() - dim / 2 * np.log(2 * np.pi) - value
        torch.testing.assert_close(bessel, torch.from_numpy(reference["log_besseli_nu"][row]), rtol=1e-9, atol=1e-6)


def test_golden_vmf_logC_expansion_terms(golden: Golden) -> None:
    reference = golden("vmf_logC")
    kappa = torch.from_numpy(reference["kappa"])
    for row, dim in enumerate(reference["p"].tolist()):
        for num_terms in range(3):
            value = vmf.uniform_log_normalizer(kappa, dim, num_terms)
            expected = torch.from_numpy(reference[f"log_Cp_uniform_order{num_terms}"][row])
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-9)
        value, slope = value_and_slope(kappa, dim, "leading", difference=False)
        torch.testing.assert_close(
            value, torch.from_numpy(reference["log_Cp_uniform_order0"][row]), rtol=1e-12, atol=1e-9
        )
        torch.testing.assert_close(slope, torch.from_numpy(reference["dlogCp_uniform_order0"][row]), rtol=0, atol=1e-9)


def test_golden_vmf_mixture_posteriors(golden: Golden) -> None:
    reference = {key: torch.from_numpy(value) for key, value in golden("vmf_mixture").items()}
    w, x, tau = reference["w"], reference["x"], float(reference["tau"])
    posterior = vmf.log_posterior(x, w, tau)
    torch.testing.assert_close(posterior, reference["log_posterior"], rtol=0, atol=1e-6)
    logits = vmf.vmf_logits(x, w, tau) + vmf.log_normalizer_at_zero(w.shape[1])
    torch.testing.assert_close(logits, reference["logits"], rtol=0, atol=1e-6)
    kappa = w.norm(dim=1) / tau
    torch.testing.assert_close(kappa, reference["kappa"])
    absolute = vmf.log_normalizer(kappa, w.shape[1], difference=False)
    torch.testing.assert_close(absolute, reference["log_Cp_kappa"], rtol=0, atol=1e-6)
    plain = torch.log_softmax(x @ w.T / tau, dim=-1)
    torch.testing.assert_close(plain, reference["log_posterior_without_Cp"], rtol=0, atol=1e-9)
    assert (posterior - plain).abs().max() > 0.1


@pytest.mark.parametrize("dim", [2, 3, 16, 17, 32, 63, 64, 256, 1024])
def test_float32_difference_equals_mpmath(dim: int) -> None:
    kappa = torch.tensor([0.0, 1e-6, 1e-3, 0.05, 0.1, 0.11, 1.0, 7.7, 14.3, 25.0, 100.0, 200.0, 201.0, 1e3, 1e4])
    value, slope = value_and_slope(kappa, dim)
    assert value.dtype == torch.float32
    expected = [oracle(float(k), dim) for k in kappa]
    for k, v, s, (difference, _, a) in zip(kappa.tolist(), value.tolist(), slope.tolist(), expected, strict=True):
        allowed = 1e-5 if k <= 200 else 1e-6 * abs(difference)
        assert abs(v - difference) <= allowed, (k, v, difference)
        assert abs(s + a) <= 1e-6, (k, s, a)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(0, 5000), st.one_of(st.sampled_from([2, 3]), st.integers(16, 600)))
def test_float64_equals_mpmath_anywhere(kappa: float, dim: int) -> None:
    value, slope = value_and_slope(torch.tensor([kappa], dtype=torch.float64), dim)
    difference, absolute, a = oracle(kappa, dim)
    assert float(value) == pytest.approx(difference, rel=1e-10, abs=2e-7)
    assert float(slope) == pytest.approx(-a, abs=2e-7)
    whole = vmf.log_normalizer(torch.tensor([kappa], dtype=torch.float64), dim, difference=False)
    assert float(whole) == pytest.approx(absolute, rel=1e-10, abs=1e-6)


def test_paper_table_of_leading_form() -> None:
    """Oracle values with 50 digits: p, kappa, log C_p, its leading form."""
    for dim, kappa, exact, leading in [
        (16, 10.0, -4.05729904727, -4.05288542378),
        (64, 25.0, 36.1909674061, 36.1909046284),
        (256, 10.0, 344.139710715, 344.139066557),
        (256, 1000.0, -345.532935885, -345.532815106),
    ]:
        k = torch.tensor([kappa], dtype=torch.float64)
        assert float(vmf.log_normalizer(k, dim, difference=False)) == pytest.approx(exact, abs=1e-6)
        assert float(vmf.log_normalizer(k, dim, "leading", difference=False)) == pytest.approx(leading, abs=1e-8)


@pytest.mark.parametrize("dim", [2, 3, 16, 64])
def test_gradcheck(dim: int) -> None:
    kappa = torch.tensor([0.01, 0.3, 5.0, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k: vmf.log_normalizer(k, dim), kappa)


@pytest.mark.parametrize("dim", [4, 8, 15, 1, 0])
def test_dimension_without_accurate_form_is_refused(dim: int) -> None:
    with pytest.raises(UsageError, match=rf"p >= 16, found p = {dim}"):
        vmf.log_normalizer(torch.ones(1), dim)


def test_unknown_form_names_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'leading'"):
        vmf.log_normalizer(torch.ones(1), 64, "leadin")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_stays_under_autocast(dtype: torch.dtype) -> None:
    w = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = vmf.vmf_bias(w.double(), 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bias = vmf.vmf_bias(w, 0.1)
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("form", ["exact", "leading"])
def test_zero_prototype_has_finite_logit_and_zero_gradient_of_the_normaliser(form: vmf.Form) -> None:
    w = torch.zeros(3, 16, requires_grad=True)
    bias = vmf.vmf_bias(w, 0.04, form)
    bias.sum().backward()
    assert torch.equal(bias, torch.zeros(3))
    assert w.grad is not None and torch.equal(w.grad, torch.zeros(3, 16))


def test_gradient_of_the_logit_equals_its_formula() -> None:
    """d l_k / d w_k = (y - A_p(kappa_k) mu_k) / tau, and d l_k / d ||w_k|| = (cos(y, w_k) - A_p(kappa_k)) / tau."""
    generator = torch.Generator().manual_seed(1)
    dim, tau = 64, 0.1
    w = (torch.randn(6, dim, generator=generator) * torch.linspace(0.05, 2, 6)[:, None]).requires_grad_()
    y = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
    vmf.vmf_logits(y, w, tau).sum().backward()
    assert w.grad is not None
    norms = w.detach().norm(dim=1)
    mu = w.detach() / norms[:, None]
    a = torch.tensor([oracle(float(kappa), dim)[2] for kappa in norms / tau])
    torch.testing.assert_close(w.grad, (y - a[:, None] * mu) / tau, rtol=0, atol=1e-5)
    along = (w.grad * mu).sum(1)
    torch.testing.assert_close(along, (mu @ y - a) / tau, rtol=0, atol=1e-5)


def test_equal_norms_give_the_posterior_of_plain_dino() -> None:
    generator = torch.Generator().manual_seed(2)
    w = 1.7 * torch.nn.functional.normalize(torch.randn(30, 32, generator=generator).double(), dim=1)
    z = torch.nn.functional.normalize(torch.randn(5, 32, generator=generator).double(), dim=1)
    torch.testing.assert_close(vmf.log_posterior(z, w, 0.1), torch.log_softmax(z @ w.T / 0.1, dim=-1))
