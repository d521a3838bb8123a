"""When a loss curve is inside the band around another."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STEPS, WARMUP = 400, 50


@pytest.fixture
def band(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script's module; the folder of a script is on the path only when it runs."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("loss_band")


@pytest.fixture
def smoothed(band: Any) -> dict[str, np.ndarray]:
    """A reference that falls from 6 to 2 and two other seeds, 0.1 above and below it."""
    reference = np.linspace(6, 2, STEPS)
    return {"plain": reference, "above": reference + 0.1, "below": reference - 0.1}


def judged(band: Any, smoothed: dict[str, np.ndarray], run: np.ndarray) -> dict[str, Any]:
    width = band.half_width(smoothed["plain"], [smoothed["above"], smoothed["below"]])
    return band.judge(run, smoothed["plain"], width, WARMUP)


def test_smoothing_is_the_mean_of_the_last_steps(band: Any) -> None:
    losses = np.random.default_rng(0).normal(5, 1, 90)
    found = band.smooth(losses, 20)
    assert found[60] == pytest.approx(losses[41:61].mean())
    assert found[4] == pytest.approx(losses[:5].mean())


def test_seeds_that_cross_still_have_a_deviation(band: Any) -> None:
    up = np.linspace(-1, 1, 101)
    assert np.var([up, -up], axis=0, ddof=1)[50] == 0
    expected = np.sqrt(np.mean(2 * np.linspace(-0.2, 0.2, 21) ** 2))
    assert band.deviation_between([up, -up], pool=21)[50] == pytest.approx(expected)


def test_a_curve_between_the_seeds_is_inside(band: Any, smoothed: dict[str, np.ndarray]) -> None:
    verdict = judged(band, smoothed, smoothed["plain"] + 0.099)
    assert verdict["inside"] and verdict["steps_inside"] == 1
    assert verdict["largest_share_of_band"] == pytest.approx(0.99)
    assert verdict["mean_difference"] == pytest.approx(0.099)


def test_one_step_outside_is_named(band: Any, smoothed: dict[str, np.ndarray]) -> None:
    run = smoothed["plain"].copy()
    run[299] -= 0.11
    verdict = judged(band, smoothed, run)
    assert not verdict["inside"] and verdict["at_step"] == 300
    assert verdict["steps_inside"] == pytest.approx(1 - 1 / (STEPS - WARMUP))


def test_the_warm_up_is_not_judged(band: Any, smoothed: dict[str, np.ndarray]) -> None:
    run = smoothed["plain"].copy()
    run[:WARMUP] += 1
    assert judged(band, smoothed, run)["inside"]
    run[WARMUP] += 1
    assert not judged(band, smoothed, run)["inside"]


def test_where_the_seeds_agree_the_floor_is_the_band(band: Any) -> None:
    reference = np.full(STEPS, 4.0)
    width = band.half_width(reference, [reference, reference])
    assert width == pytest.approx(np.full(STEPS, 4 * band.FLOOR))


def test_first_steps_are_compared_one_by_one(band: Any) -> None:
    reference = np.full(STEPS, 4.0)
    run = reference * (1 + 0.9 * band.EXACT)
    run[band.FIRST] = 5
    assert band.judge_first(run, reference)["inside"]
    run[band.FIRST - 1] = 4 * (1 + 1.1 * band.EXACT)
    found = band.judge_first(run, reference)
    assert not found["inside"] and found["largest_relative"] == pytest.approx(1.1 * band.EXACT)
