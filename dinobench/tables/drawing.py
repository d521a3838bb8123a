"""The picture of a table: one panel per column, one line per row, the mean with its spread over seeds (or the interval
over images of a single seed). Published figures are drawn at the scale paper only: elsewhere they compare nothing.
"""

from __future__ import annotations

from typing import Any

from dinobench import plots
from dinobench.figures.drawing import SUFFIXES, Drawing
from dinobench.tables.contents import Contents, Entry
from dinobench.tables.writing import CSV_DECIMALS

__all__ = ["SUFFIXES", "draw", "numbers"]

ROW_HEIGHT, MARGIN, WIDTH = 0.24, 1.1, 2.6


def numbers(contents: Contents) -> dict[str, Any]:
    """What the picture shows: column -> row -> mean, low, high and, at the scale paper, the published figures."""
    return {
        column.label: {line.label: _shown(line.entries[k], contents) for line in contents.lines}
        for k, column in enumerate(contents.columns)
    }


def draw(contents: Contents) -> Drawing:
    """The picture, under the table's name."""
    shown = numbers(contents)
    height = MARGIN + ROW_HEIGHT * len(contents.lines)
    figure = plots.new_figure(1, len(contents.columns), (WIDTH, height))
    labels = [line.label for line in contents.lines]
    for panel, (axes, (title, rows)) in enumerate(zip(figure.axes, shown.items(), strict=True)):
        for place, row in enumerate(rows.values()):
            if row["mean"] is not None:
                axes.plot([row["low"], row["high"]], [place, place], color=plots.COLOURS[0], linewidth=2)
                axes.plot(row["mean"], place, marker="o", color=plots.COLOURS[0], markersize=5)
            for value in row["published"]:
                axes.plot(value, place, marker="D", markerfacecolor="none", color=plots.COLOURS[1], markersize=6)
        axes.set_yticks(range(len(labels)), labels if panel == 0 else [""] * len(labels), fontsize="small")
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_title(title, fontsize="medium")
    published = "; diamonds: published" if contents.scale == "paper" else ""
    short = ", short schedule" if contents.short else ""
    plots.set_title(figure, f"{contents.table.title}\nscale {contents.scale}{short}{published}")
    return Drawing(contents.table.name, figure, shown)


def _shown(entry: Entry, contents: Contents) -> dict[str, Any]:
    mean, spread = entry.mean, entry.spread
    published = [float(figure.value) for figure in entry.published] if contents.scale == "paper" else []
    if mean is None:
        return {"mean": None, "low": None, "high": None, "published": published}
    low, high = (mean - spread, mean + spread) if spread is not None else entry.interval or (mean, mean)
    ends = (round(value, CSV_DECIMALS) for value in (mean, low, high))
    return {**dict(zip(("mean", "low", "high"), ends, strict=True)), "published": published}
