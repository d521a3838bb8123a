"""What the normaliser of the von Mises-Fisher density does, and how well it is approximated.

Densities on the circle (p = 2) for prototypes of two magnitudes, kappa = ||w|| / tau:

    without C_p   exp(kappa cos theta)               its area 2 pi I_0(kappa) grows with the magnitude
    with C_p      C_2(kappa) exp(kappa cos theta)    area 1: a longer prototype is narrower, not stronger

Error of log C_p(kappa) for the two forms of `pretrain.models.vmf`, against the power series of I_nu (DLMF 10.25.2) in
decimal arithmetic. All its terms are positive, so 40 digits of the terms are 40 digits of the sum:

    log C_p(kappa) = log C_p(0) - log sum_m (kappa^2 / 4)^m / (m! (nu+1)_m)           nu = p/2 - 1
    log C_p(0) = log( nu! / (2 pi^(p/2)) )                                             for even p
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext

import numpy as np
import torch

from dinobench import plots
from dinobench.figures.drawing import Drawing
from pretrain.models.vmf import Form, log_normalizer

DIGITS = 40
MAGNITUDES = (1.0, 2.0)
DIMS = (64, 256)
FORMS: tuple[Form, ...] = ("leading", "exact")
KAPPAS = tuple(float(f"{kappa:.3g}") for kappa in np.geomspace(1e-2, 5000, 60))
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def draw_densities(temperature: float = 0.1, magnitudes: Sequence[float] = MAGNITUDES) -> Drawing:
    """exp(kappa cos theta) on the circle without and with C_2, for prototypes of these magnitudes."""
    angles = np.linspace(-np.pi, np.pi, 2001)
    figure = plots.new_figure(1, 2, (4.8, 3.6))
    free, normalised = figure.axes
    areas = {}
    for magnitude, colour, style in zip(magnitudes, plots.COLOURS, ("-", "--", ":", "-."), strict=False):
        kappa = magnitude / temperature
        without, with_normaliser = circle_densities(kappa, angles)
        label = rf"$\|w\|$ = {magnitude:g}, $\kappa$ = {kappa:g}"
        area = areas[magnitude] = [float(np.trapezoid(curve, angles)) for curve in (without, with_normaliser)]
        for axes, curve, size in zip(figure.axes, (without, with_normaliser), area, strict=True):
            name = f"{label}: area {size:.3g}"
            axes.plot(np.degrees(angles), curve, style, color=colour, linewidth=1.8, label=name)
        normalised.fill_between(np.degrees(angles), with_normaliser, color=colour, alpha=0.15, linewidth=0)
    free.set(title=r"without $C_p$: $\exp(\kappa \cos\theta)$", yscale="log", ylabel="value (log scale)")
    normalised.set(title=r"with $C_p$: every density has area 1", ylabel="density (1/rad)")
    for axes in figure.axes:
        axes.set(xlabel=r"angle $\theta$ between sample and prototype (degrees)", xticks=range(-180, 181, 60))
        axes.legend(loc="lower center" if axes is free else "upper left", fontsize="small")
    # room for the legend beside the peak
    normalised.set_ylim(0, 1.3 * normalised.get_ylim()[1])
    figure.suptitle(rf"A longer prototype is stronger without $C_p$, narrower with it ($\tau$ = {temperature:g})")
    numbers = {f"norm {magnitude:g}": {"area_without": a, "area_with": b} for magnitude, (a, b) in areas.items()}
    return Drawing("vmf_density", figure, {"temperature": temperature, **numbers})


def draw_errors(dims: Sequence[int] = DIMS, kappas: Sequence[float] = KAPPAS) -> Drawing:
    """|log C_p - reference| over kappa for both forms and these dimensions."""
    figure = plots.new_figure(1, 1, (6.4, 4.0))
    (axes,) = figure.axes
    largest: dict[str, dict[str, float]] = {}
    for dim, colour, marker in zip(dims, plots.COLOURS, ("o", "s", "^", "D"), strict=False):
        for form, style in zip(FORMS, ("-", "--"), strict=True):
            errors = approximation_errors(kappas, dim, form)
            largest.setdefault(f"p={dim}", {})[form] = max(errors)
            axes.plot(
                kappas,
                np.maximum(errors, 1e-16),  # an error of exactly 0 has no place on a log axis
                style,
                color=colour,
                marker=marker,
                markevery=6,
                markersize=4,
                linewidth=1.5,
                label=f"p = {dim}, {form}: at most {max(errors):.1e}",
            )
    axes.set(
        title=r"Error of $\log C_p(\kappa)$: leading term of the paper, and our expansion",
        xlabel=r"precision $\kappa = \|w\| / \tau$",
        ylabel="absolute error (nats)",
        xscale="log",
        yscale="log",
    )
    axes.legend(fontsize="small")
    return Drawing("vmf_error", figure, {"largest_error": largest})


def circle_densities(kappa: float, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """exp(kappa cos theta) at the angles [N] (radians), without and with C_2(kappa)."""
    log_c = log_normalizer(torch.tensor(kappa, dtype=torch.float64), 2, difference=False).item()
    exponent = kappa * np.cos(angles)
    return np.exp(exponent), np.exp(exponent + log_c)


def approximation_errors(kappas: Sequence[float], dim: int, form: Form) -> list[float]:
    """|log C_p(kappa) - reference| of a form, constants included."""
    values = log_normalizer(torch.tensor(kappas, dtype=torch.float64), dim, form, difference=False).tolist()
    pairs = zip(kappas, values, strict=True)
    return [abs(float(Decimal(value) - reference(kappa, dim))) for kappa, value in pairs]


def reference(kappa: float, dim: int) -> Decimal:
    """log C_p(kappa) for even p >= 2, to about 30 digits."""
    assert dim % 2 == 0 and dim >= 2, dim
    with localcontext() as context:
        context.prec = DIGITS
        nu = dim // 2 - 1
        at_zero = Decimal(math.factorial(nu)).ln() - Decimal(2).ln() - dim // 2 * PI.ln()
        quarter = Decimal(kappa) ** 2 / 4
        term = total = Decimal(1)
        m = 0
        while term > total.scaleb(-DIGITS):
            m += 1
            term *= quarter / (m * (m + nu))
            total += term
        return at_zero - total.ln()
