"""Figures of one run: its curves, and the histogram of its prototypes. PNG, readable on white and on dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dinobench.journal import Journal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {
    "loss": ("loss/total", "loss/over_lnK", "loss/kl"),
    "health": ("health/target_entropy", "health/mean_target_entropy", "health/information"),
    "features": ("health/feature_std", "health/effective_rank"),
    "prototypes": ("prototypes/used", "prototypes/unique", "prototypes/kappa_q50"),
}
"""Figure -> the metrics it draws, one panel each."""


def draw_curves(journal: Journal, folder: Path) -> list[Path]:
    """The training curves; a metric the method does not have gets no panel."""
    files = []
    for name, keys in CURVES.items():
        curves = {key: curve for key in keys if (curve := journal.curve(key))[0]}
        if not curves:
            continue
        figure = _figure(len(curves))
        for axes, (key, (steps, values)) in zip(figure.axes, curves.items(), strict=True):
            axes.plot(steps, values, marker="." if len(steps) < 30 else "", linewidth=1.5)
            axes.set(title=key, xlabel="step")
        files.append(_save(figure, folder / f"{name}.png"))
    return files


def draw_prototypes(norms: Sequence[float], kappas: Sequence[float] | None, file: Path) -> Path:
    """Histogram of the prototypes' norms and, where the temperature is known, of their precisions kappa."""
    panels = {"norm of the prototypes": norms}
    if kappas is not None:
        panels["precision kappa = norm / tau"] = kappas
    figure = _figure(len(panels))
    for axes, (title, values) in zip(figure.axes, panels.items(), strict=True):
        # normalised prototypes differ by rounding only: without a least width the axis would show noise
        middle, half = (max(values) + min(values)) / 2, (max(values) - min(values)) / 2
        half = max(half, 0.02 * abs(middle), 1e-6)
        axes.hist(values, bins=40, range=(middle - half, middle + half))
        axes.set(title=title, ylabel="prototypes")
    return _save(figure, file)


def _figure(panels: int) -> Figure:
    # Figure without pyplot: no global state, no display, nothing to close
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * panels, 3.2), layout="constrained", facecolor="white")
    for axes in _panels(figure, panels):
        axes.grid(alpha=0.3)
    return figure


def _panels(figure: Figure, panels: int) -> list[Axes]:
    return list(figure.subplots(1, panels, squeeze=False)[0])


def _save(figure: Figure, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return file
