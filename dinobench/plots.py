"""Figures of one run: its curves, and the histogram of its prototypes. PNG, readable on white and on dark pages.

`new_figure`, `show`, `set_title`, `histogram` and `save` are shared with dinobench/figures.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinobench.files import write_bytes
from dinobench.journal import Journal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

CURVES = {
    "loss": ("loss/total", "loss/over_lnK", "loss/kl"),
    "parts": ("loss/image", "loss/patch", "loss/koleo", "loss/koleo_proto", "loss/mean_entropy", "loss/gram"),
    "health": ("health/target_entropy", "health/mean_target_entropy", "health/information"),
    "patch": ("patch/target_entropy", "patch/mean_target_entropy", "patch/information"),
    "features": ("health/feature_std", "health/effective_rank", "contrast/alignment", "contrast/uniformity"),
    "prototypes": ("prototypes/used", "prototypes/unique", "prototypes/redundancy", "prototypes/kappa_q50"),
    "patch_prototypes": (
        "patch_prototypes/used",
        "patch_prototypes/unique",
        "patch_prototypes/redundancy",
        "patch_prototypes/kappa_q50",
    ),
}
"""Figure -> the metrics it draws, one panel each."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Palette of Okabe and Ito: colour-blind readers can tell its colours apart."""


def draw_curves(journal: Journal, folder: Path) -> list[Path]:
    """The training curves; a metric the method does not have gets no panel."""
    files = []
    for name, keys in CURVES.items():
        curves = {key: curve for key in keys if (curve := journal.curve(key))[0]}
        if not curves:
            continue
        figure = new_figure(1, len(curves))
        for axes, (key, (steps, values)) in zip(figure.axes, curves.items(), strict=True):
            axes.plot(steps, values, marker="." if len(steps) < 30 else "", linewidth=1.5)
            axes.set(title=key, xlabel="step")
        files.append(save(figure, folder / f"{name}.png"))
    return files


def draw_prototypes(norms: Sequence[float], kappas: Sequence[float] | None, file: Path) -> Path:
    """Histogram of the prototypes' norms and, where the temperature is known, of their precisions kappa."""
    panels = {"norm of the prototypes": norms}
    if kappas is not None:
        panels["precision kappa = norm / tau"] = kappas
    figure = new_figure(1, len(panels))
    for axes, (title, values) in zip(figure.axes, panels.items(), strict=True):
        histogram(axes, values)
        axes.set(title=title, ylabel="prototypes")
    return save(figure, file)


def histogram(axes: Axes, values: Sequence[float]) -> None:
    """Histogram of 40 bins over the range of the values."""
    # normalised prototypes differ by rounding only: without a least width the axis would show noise
    middle, half = (max(values) + min(values)) / 2, (max(values) - min(values)) / 2
    half = max(half, 0.02 * abs(middle), 1e-6)
    axes.hist(values, bins=40, range=(middle - half, middle + half), color=COLOURS[0])


def new_figure(rows: int, columns: int, panel: tuple[float, float] = (4.2, 3.2), *, grid: bool = True) -> Figure:
    """A white figure of rows x columns panels (`figure.axes`, by rows), `panel` inches wide and high each."""
    # Figure without pyplot: no global state, no display, nothing to close
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained", facecolor="white")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        if grid:
            axes.grid(alpha=0.3)
        else:
            axes.set_axis_off()
    return figure


def show(axes: Axes, image: Tensor, **options: Any) -> None:
    """An image [h, w], [h, w, 3] or [h, w, 4] on the CPU, each pixel a square; `options` are those of imshow."""
    axes.imshow(image.numpy(), interpolation="nearest", **options)


def set_title(figure: Figure, text: str) -> None:
    """A title over all panels, its lines broken to the width of the figure."""
    width = int(14 * figure.get_figwidth())  # characters of this size that fit
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width)]
    figure.suptitle("\n".join(lines), fontsize="small")


def save(figure: Figure, file: Path) -> Path:
    """Write a figure in the format of the file's suffix; drawn twice, an SVG is the same file.

    Raises:
        DinobenchError: the file cannot be written.
    """
    import matplotlib

    content, kind = io.BytesIO(), file.suffix.removeprefix(".") or "png"
    with matplotlib.rc_context({"svg.hashsalt": "dinobench"}):
        figure.savefig(content, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    write_bytes(file, content.getvalue())
    return file
