"""Normaliser of the von Mises-Fisher density on the unit sphere of R^p (DINO-vMF section 3.1; Mardia and Jupp 9.3.2).

    f(y; mu, kappa) = C_p(kappa) exp(kappa mu . y)
    C_p(kappa) = kappa^nu / ((2 pi)^(p/2) I_nu(kappa))                         nu = p/2 - 1
    d log C_p / d kappa = -A_p(kappa) = -I_{nu+1}(kappa) / I_nu(kappa)

I_nu comes from its uniform expansion for large order (DLMF 10.41.3), with s = sqrt(nu^2 + kappa^2) and t = nu / s:

    log I_nu(kappa) ~ s + nu log(kappa / (nu + s)) - log(2 pi s) / 2 + log(1 + sum_k U_k(t) / nu^k)

Without the sum this is the form of the paper (`leading`). `exact` keeps 3 or 6 terms of it: its error and that of its
derivative are below 1e-7 for every kappa from p = 16 on. A softmax only sees differences between prototypes, so the
usual value is log C_p(kappa) - log C_p(0): it is written without cancellation and is smooth down to kappa = 0.

Everything is computed in float64 (K numbers per step: free) and given back in float32, also under autocast: at
kappa = 200 half a unit in the last place of float32 is 8e-6 already, and bfloat16 is wrong by several nats.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from pretrain.errors import UsageError, unknown_name

Form = Literal["exact", "leading"]

MIN_DIM = 16
"""From this p on the expansion keeps its stated accuracy; p = 2 and p = 3 have closed forms."""


def log_normalizer(kappa: Tensor, dim: int, form: Form = "exact", *, difference: bool = True) -> Tensor:
    """log C_p(kappa), differentiable for kappa >= 0; same shape as `kappa`, float32 (float64 for float64 input).

    Args:
        kappa: precisions, any shape.
        dim: p, the dimension of the space around the sphere: 2, 3, or at least 16.
        form: `exact`, or `leading` for the first term of the expansion as in the paper.
        difference: subtract log C_p(0).

    Raises:
        UsageError: there is no accurate form for this `dim`.
    """
    check_dim(dim)
    if form not in ("exact", "leading"):
        raise unknown_name("form of the vMF normaliser", form, ("exact", "leading"))
    x = _wide(kappa)
    if dim == 2:
        value = _difference_circle(x)
    elif dim == 3:
        value = _difference_sphere(x)
    else:
        value = _difference_uniform(x, dim, _num_terms(dim) if form == "exact" else 0)
    if not difference:
        value = value + (log_normalizer_at_zero(dim) if form == "exact" or dim < MIN_DIM else _uniform_at_zero(dim, 0))
    return value.to(torch.float64 if kappa.dtype == torch.float64 else torch.float32)


def uniform_log_normalizer(kappa: Tensor, dim: int, num_terms: int) -> Tensor:
    """log C_p(kappa) from the expansion with its first `num_terms` correction terms, constants included."""
    check_dim(dim)
    return _difference_uniform(_wide(kappa), dim, num_terms) + _uniform_at_zero(dim, num_terms)


def log_normalizer_at_zero(dim: int) -> float:
    """log C_p(0) = log(Gamma(p/2) / (2 pi^(p/2))), minus the log of the area of the sphere."""
    return math.lgamma(dim / 2) - math.log(2) - dim / 2 * math.log(math.pi)


def check_dim(dim: int) -> None:
    """Refuse a dimension for which no accurate form is implemented."""
    if dim not in (2, 3) and dim < MIN_DIM:
        raise UsageError(
            f"the vMF normaliser log C_p needs p = 2, p = 3 or p >= {MIN_DIM}, found p = {dim}: "
            f"choose a bottleneck (head.bottleneck) of at least {MIN_DIM} dimensions"
        )


def vmf_logits(z: Tensor, vectors: Tensor, temperature: float, form: Form = "exact") -> Tensor:
    """l_k = <w_k, z> / tau + log C_p(||w_k|| / tau) - log C_p(0) for z [..., P], vectors [K, P] -> [..., K]."""
    return z @ vectors.T / temperature + vmf_bias(vectors, temperature, form)


def vmf_bias(vectors: Tensor, temperature: float, form: Form = "exact") -> Tensor:
    """The term of the logits that depends on the prototype alone: log C_p(||w_k||/tau) - log C_p(0), [K]."""
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    norms = torch.linalg.vector_norm(vectors, dim=1)  # gradient 0 at w = 0
    return log_normalizer(norms / temperature, vectors.shape[1], form)


def log_posterior(z: Tensor, vectors: Tensor, temperature: float, form: Form = "exact") -> Tensor:
    """log P(k | z) under the mixture with uniform weights, [..., K]."""
    return torch.log_softmax(vmf_logits(z, vectors, temperature, form), dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()  # Apple's GPU has no float64


def _difference_uniform(kappa: Tensor, dim: int, num_terms: int) -> Tensor:
    """log C_p(kappa) - log C_p(0), both from the expansion."""
    nu = dim / 2 - 1
    z_squared = (kappa / nu) ** 2
    ratio = torch.sqrt(1 + z_squared)  # s / nu
    excess = z_squared / (ratio + 1)  # s / nu - 1 without cancellation
    value = nu * (torch.log1p(excess / 2) - excess) + torch.log1p(excess) / 2
    if num_terms:
        at_zero = _corrections(torch.ones((), dtype=kappa.dtype, device=kappa.device), nu, num_terms)
        value = value - torch.log(_corrections(1 / ratio, nu, num_terms) / at_zero)
    return value


def _num_terms(dim: int) -> int:
    """Terms that keep value and gradient within 1e-7 (worst case p = 16: 6e-8; p = 64: 2e-8)."""
    return 3 if dim >= 64 else 6


def _uniform_at_zero(dim: int, num_terms: int) -> float:
    nu = dim / 2 - 1
    corrections = _corrections(torch.ones((), dtype=torch.float64), nu, num_terms)
    leading = nu * math.log(2 * nu) - nu + math.log(nu) / 2 - (dim - 1) / 2 * math.log(2 * math.pi)
    return leading - math.log(float(corrections))


def _corrections(t: Tensor, nu: float, num_terms: int) -> Tensor:
    """1 + sum_{k=1..num_terms} U_k(t) / nu^k, by Horner's rule."""
    coefficients = [1.0] + [0.0] * (3 * num_terms)
    for k, polynomial in enumerate(_U_POLYNOMIALS[:num_terms], start=1):
        for power, coefficient in polynomial.items():
            coefficients[power] += float(coefficient) / nu**k
    total = torch.full_like(t, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * t + coefficient
    return total


def _debye_polynomials(num: int) -> list[dict[int, Fraction]]:
    """U_1..U_num of DLMF 10.41.9, exactly, as {power of t: coefficient}.

    U_{k+1}(t) = t^2 (1 - t^2) U_k'(t) / 2 + 1/8 int_0^t (1 - 5 s^2) U_k(s) ds,  U_0 = 1
    """
    polynomials = [{0: Fraction(1)}]
    for _ in range(num):
        following: dict[int, Fraction] = {}
        for power, c in polynomials[-1].items():
            rise = c * (Fraction(power, 2) + Fraction(1, 8 * (power + 1)))
            fall = c * (Fraction(power, 2) + Fraction(5, 8 * (power + 3)))
            following[power + 1] = following.get(power + 1, Fraction(0)) + rise
            following[power + 3] = following.get(power + 3, Fraction(0)) - fall
        polynomials.append(following)
    return polynomials[1:]


_U_POLYNOMIALS = _debye_polynomials(6)


def _difference_circle(kappa: Tensor) -> Tensor:
    """p = 2: log C_2(kappa) - log C_2(0) = -log I_0(kappa)."""
    # abs() carries the sign that makes the derivative -I_1 / I_0 right at 0, where i0e has a kink.
    return -(kappa.abs() + torch.log(torch.special.i0e(kappa)))


def _difference_sphere(kappa: Tensor) -> Tensor:
    """p = 3: log C_3(kappa) - log C_3(0) = -log(sinh(kappa) / kappa)."""
    small = kappa < 0.1
    low = torch.where(small, kappa, 0.0) ** 2  # series error below kappa^8 / 37800
    series = low / 6 - low**2 / 180 + low**3 / 2835
    high = torch.where(small, 1.0, kappa)
    closed = high + torch.log(-torch.expm1(-2 * high)) - torch.log(2 * high)
    return -torch.where(small, series, closed)
