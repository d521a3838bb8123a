from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest

from dinobench.figures import vmf
from dinobench.figures.drawing import Drawing


def exact(kappa: Any, dim: int) -> Any:
    nu = mpmath.mpf(dim) / 2 - 1
    bessel = mpmath.log(mpmath.besseli(nu, kappa))
    return nu * mpmath.log(kappa) - mpmath.mpf(dim) / 2 * mpmath.log(2 * mpmath.pi) - bessel


@pytest.fixture(scope="module")
def errors() -> Drawing:
    return vmf.draw_errors()


@pytest.mark.parametrize("dim", [2, 16, 64, 256])
@pytest.mark.parametrize("kappa", [0.01, 1.0, 25.0, 1000.0, 5000.0])
def test_the_reference_is_right_to_thirty_digits(dim: int, kappa: float) -> None:
    with mpmath.workdps(50):
        expected = exact(mpmath.mpf(kappa), dim)
        found = mpmath.mpf(str(vmf.reference(kappa, dim)))
        assert abs(found - expected) < mpmath.mpf("1e-30") * max(1, abs(expected))


def test_the_largest_errors_are_those_of_the_table_in_the_notes(errors: Drawing) -> None:
    """Leading form over kappa in [1e-3, 5000]: 2.7e-3 at p = 64, 6.6e-4 at p = 256."""
    largest = errors.numbers["largest_error"]
    assert f"{largest['p=64']['leading']:.1e}" == "2.7e-03"
    assert f"{largest['p=256']['leading']:.1e}" == "6.6e-04"
    assert largest["p=64"]["exact"] < 1e-7
    assert largest["p=256"]["exact"] < 1e-9
    (axes,) = errors.figure.axes
    for line in axes.lines:
        dim, form = line.get_label().partition(":")[0].removeprefix("p = ").split(", ")
        assert np.max(line.get_ydata()) == largest[f"p={dim}"][form]


def test_one_error_is_the_difference_of_the_values_in_the_notes() -> None:
    """p = 64, kappa = 25: 36.1909674061 exact, 36.1909046284 leading."""
    (error,) = vmf.approximation_errors([25.0], 64, "leading")
    assert error == pytest.approx(36.1909674061 - 36.1909046284, abs=2e-10)


def test_the_normaliser_makes_every_area_one_and_none_without_it() -> None:
    drawing = vmf.draw_densities(0.1)
    for magnitude in (1, 2):
        areas = drawing.numbers[f"norm {magnitude}"]
        bessel = float(mpmath.besseli(0, magnitude / 0.1))
        assert areas["area_without"] == pytest.approx(2 * math.pi * bessel, rel=1e-9)
        assert areas["area_with"] == pytest.approx(1, rel=1e-9)
    free, normalised = drawing.figure.axes
    assert [np.max(line.get_ydata()) for line in free.lines] == pytest.approx([math.exp(10), math.exp(20)])
    wide, narrow = (np.asarray(line.get_ydata()) for line in normalised.lines)
    assert np.max(narrow) > np.max(wide)
    assert narrow[0] < wide[0]


def test_both_figures_are_written(errors: Drawing, tmp_path: Path, look: Callable) -> None:
    for drawing in (vmf.draw_densities(), errors):
        files = drawing.write(tmp_path)
        look(files)
        before = files[1].read_bytes()
        assert drawing.write(tmp_path)[1].read_bytes() == before
