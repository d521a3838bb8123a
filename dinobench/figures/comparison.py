"""Methods side by side: curves with bands over seeds, differences per class, and how the prototypes are used.

Bands are the mean over seeds plus and minus one sample standard deviation, where there are two seeds or more; they say
how much seeds differ, not how sure a difference is (`dinobench compare` tests that). What is drawn comes from stored
results, their per-image tables and metrics.jsonl; nothing is measured.

Shapes: S seeds, T steps, C classes, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinobench import plots
from dinobench.comparison.candidates import Candidate
from dinobench.comparison.lineup import Lineup, Place
from dinobench.figures.drawing import Drawing
from dinobench.files import slug
from suites.interval import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = ("loss/total", "health/target_entropy", "health/feature_std", "prototypes/used")
"""Training metrics that are drawn beside the headlines."""
MAX_CLASSES = 40
"""Most classes with a bar each; of more, those where most changes."""
STYLES = ("-", "--", "-.", ":")
Points = dict[int, float]
"""Step or number of images -> value."""


def draw_comparison(lineup: Lineup) -> list[Drawing]:
    """Every figure for which the values are there."""
    drawings = [draw_curves(lineup)]
    for suite in lineup.places:
        drawings += [draw_classes(lineup, suite), draw_usage(lineup, suite)]
    return [drawing for drawing in drawings if drawing is not None]


def draw_curves(lineup: Lineup) -> Drawing | None:
    """Headlines of the suites and training metrics against the step, or the number of images seen with that alignment.

    None where nothing has two points.
    """
    panels: dict[str, dict[str, list[Points]]] = {}
    for suite, places in lineup.places.items():
        title = f"{suite} {places[0].score.headline}"
        panels[title] = _by_method(lineup, [_headlines(candidate, suite, lineup) for candidate in lineup.candidates])
    for key in METRICS:
        panels[key] = _by_method(lineup, [_metric(candidate, key, lineup) for candidate in lineup.candidates])
    panels = {
        title: methods
        for title, methods in panels.items()
        if any(len(curve) > 1 for curves in methods.values() for curve in curves)
    }
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = plots.new_figure(rows, columns)
    numbers: dict[str, Any] = {}
    for axes, (title, methods) in zip(figure.axes, panels.items(), strict=False):
        numbers[title] = {
            method: _band(axes, method, curves, *_style(lineup, method)) for method, curves in methods.items()
        }
        axes.set(title=title, xlabel="images seen" if lineup.align == "images" else "step")
        axes.title.set_fontsize("small")
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    _legend_below(figure)
    plots.set_title(figure, "Mean over seeds; the band is one standard deviation to either side")
    return Drawing("compare_curves", figure, {"panels": numbers})


def _legend_below(figure: Figure) -> None:
    """One legend for all panels, under them; the figure grows by its lines, so that the panels keep their height."""
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    columns = 2 * int(figure.get_figwidth() // 4)
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(lines) // columns))
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=columns, fontsize="small")


def mean_and_spread(curves: Sequence[Points]) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Places [T] that all S curves have, their mean [T] and sample standard deviation [T] there (0 for one curve)."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[x] for x in shared] for curve in curves], dtype=np.float64)
    deviation = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(shared))
    return np.array(shared, dtype=np.int64), values.mean(0), deviation


def draw_classes(lineup: Lineup, suite: str) -> Drawing | None:
    """Score of each class minus that of the first method, in points; a dot per seed.

    One checkpoint against another has the bootstrap interval over the images of the class. None where fewer than two
    candidates have stored labels and per-image values.
    """
    reference, rows = class_differences(lineup, suite)
    if not rows:
        return None
    classes = _shown_classes(rows)
    figure = plots.new_figure(len(rows), 1, (max(5.0, 0.28 * len(classes)), 2.4))
    positions = np.arange(len(classes))
    for axes, row in zip(figure.axes, rows, strict=True):
        axes.bar(positions, [row.mean[c] for c in classes], color=plots.COLOURS[0], alpha=0.6)
        for seed in row.seeds if len(row.seeds) > 1 else ():
            axes.plot(positions, [seed[c] for c in classes], ".", color="black", markersize=4)
        if row.intervals:
            low, high = np.array([row.intervals[c] for c in classes]).T
            axes.vlines(positions, low, high, color="black", linewidth=1)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(positions, [str(c) for c in classes], fontsize="small")
        axes.set(title=f"{row.name} minus {reference}", ylabel="points", xlabel="class")
        axes.title.set_fontsize("small")
    plots.set_title(figure, f"{suite} by class; {_class_marks(rows)}")
    numbers = {
        row.name: {"seeds": len(row.seeds), "difference": {str(c): row.mean[c] for c in classes}} for row in rows
    }
    return Drawing(f"compare_classes_{slug(suite)}", figure, {"reference": reference, "methods": numbers})


@dataclass(frozen=True)
class ClassRow:
    """One method minus the reference, class by class, in points."""

    name: str
    mean: dict[int, float]
    seeds: list[dict[int, float]]
    """The differences under each common seed."""
    intervals: dict[int, tuple[float, float]]
    """Paired bootstrap over the images of a class, for two checkpoints; else empty."""


def class_differences(lineup: Lineup, suite: str) -> tuple[str, list[ClassRow]]:
    """The reference, and every other method (checkpoint, where no method has two seeds) minus it.

    Those without stored labels and per-image values, or without a seed in common with the reference, are left out.
    """
    found = {place.candidate: place.score.per_image() for place in lineup.places[suite]}
    frames = {k: frame for k, frame in found.items() if frame is not None and "label" in frame}
    methods: dict[str, dict[Any, Any]] = {}
    for k, frame in frames.items():
        methods.setdefault(lineup.methods[k], {})[lineup.candidates[k].seed] = frame
    # unlike the seeds of a method, two checkpoints need not share theirs
    alone = all(len(seeds) == 1 for seeds in methods.values()) or sum(map(len, methods.values())) < len(frames)
    groups = {lineup.names[k]: {None: frame} for k, frame in frames.items()} if alone else methods
    if len(groups) < 2:
        return "", []
    reference = next(iter(groups))
    rows = []
    for name, seeds in list(groups.items())[1:]:
        pairs = [(seeds[seed], groups[reference][seed]) for seed in seeds if seed in groups[reference]]
        if pairs:
            rows.append(_class_row(name, pairs, intervals=alone))
    return reference, rows


def _class_row(name: str, pairs: Sequence[tuple[Any, Any]], *, intervals: bool) -> ClassRow:
    seeds, bounds = [], {}
    for first, second in pairs:
        groups = (first["value"] - second["value"]).groupby(first["label"])
        seeds.append({int(c): float(value) for c, value in groups.mean().items()})
        if intervals:
            bounds = {int(c): mean_interval(values) for c, values in groups}
    mean = {c: float(np.mean([seed[c] for seed in seeds])) for c in seeds[0]}
    return ClassRow(name, mean, seeds, bounds)


def _class_marks(rows: Sequence[ClassRow]) -> str:
    if any(row.intervals for row in rows):
        return "lines: 95 % bootstrap interval over the images of the class"
    return "bars: mean over seeds, dots: seeds"


def draw_usage(lineup: Lineup, suite: str) -> Drawing | None:
    """How many images each prototype takes, their precision kappa, and how many point in different directions.

    One column per method, a line per seed; None where no candidate has the stored table of its prototypes.
    """
    columns: dict[str, list[Place]] = {}
    for place in lineup.places[suite]:
        if place.score.frame("prototypes") is not None:
            columns.setdefault(lineup.methods[place.candidate], []).append(place)
    if not columns:
        return None
    figure = plots.new_figure(3, len(columns), (3.4, 2.6))
    numbers: dict[str, Any] = {}
    grid = [figure.axes[start : start + len(columns)] for start in range(0, 3 * len(columns), len(columns))]
    for row in grid:
        for axes in row[1:]:
            axes.sharex(row[0])
            axes.sharey(row[0])
    for (method, places), column in zip(columns.items(), zip(*grid, strict=True), strict=True):
        numbers[method] = [_draw_prototypes(column, place, _colour(lineup, method)) for place in places]
        column[0].set_title(method, fontsize="small")
    labels = [
        ("prototypes, most used first", "images"),
        ("share of prototypes", "kappa"),
        ("cosine distance", "unique"),
    ]
    for row, (x, y) in zip(grid, labels, strict=True):
        row[0].set_ylabel(y)
        for axes in row:
            axes.set_xlabel(x)
    grid[0][0].set_yscale("log")
    plots.set_title(figure, f"Prototypes: use, precision, and how many differ ({suite}; a line per seed)")
    return Drawing(f"compare_prototypes_{slug(suite)}", figure, {"methods": numbers})


def _draw_prototypes(column: Sequence[Axes], place: Place, colour: str) -> dict[str, Any]:
    table = place.score.frame("prototypes")
    assert table is not None, "the caller has looked"
    counts = np.sort(table["images"].to_numpy())[::-1]
    used = counts[counts > 0]  # no place for 0 on a log axis
    column[0].step(np.arange(1, len(used) + 1), used, where="mid", color=colour, linewidth=1.5)
    kappa = np.sort(table["kappa"].to_numpy())
    column[1].plot((np.arange(len(kappa)) + 0.5) / len(kappa), kappa, color=colour, linewidth=1.5)
    unique = place.score.frame("unique")
    facts = {"prototypes": len(counts), "used": len(used), "kappa_median": float(np.median(kappa))}
    if unique is not None:
        column[2].plot(unique["cosine_distance"], unique["unique"], marker=".", color=colour, linewidth=1.5)
        column[2].set_ylim(0, 1.05 * len(counts))
        facts["unique"] = dict(zip(unique["cosine_distance"].astype(str), unique["unique"].tolist(), strict=True))
    return facts


def _by_method(lineup: Lineup, curves: Sequence[Points]) -> dict[str, list[Points]]:
    found: dict[str, list[Points]] = {}
    for method, curve in zip(lineup.methods, curves, strict=True):
        if curve:
            found.setdefault(method, []).append(curve)
    return found


def _headlines(candidate: Candidate, suite: str, lineup: Lineup) -> Points:
    seen = lineup.align == "images"
    return {
        at.images_seen if seen else at.step: at.scores[suite].value
        for at in candidate.checkpoints
        if suite in at.scores
    }


def _metric(candidate: Candidate, key: str, lineup: Lineup) -> Points:
    curve = candidate.curves.get(key, [])
    if lineup.align != "images":
        return dict(curve)
    per_step = candidate.images_per_step
    return {round(step * per_step): value for step, value in curve} if per_step else {}


def _band(axes: Axes, method: str, curves: Sequence[Points], colour: str, style: str) -> dict[str, Any]:
    x, mean, deviation = mean_and_spread(curves)
    marker = "." if len(x) < 30 else ""
    axes.plot(x, mean, color=colour, linestyle=style, marker=marker, linewidth=1.5, label=f"{method} (n={len(curves)})")
    if len(curves) > 1:
        axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
    return {"n": len(curves), "x": x.tolist(), "mean": mean.tolist(), "sd": deviation.tolist()}


def _style(lineup: Lineup, method: str) -> tuple[str, str]:
    number = lineup.method_names().index(method)
    return _colour(lineup, method), STYLES[number % len(STYLES)]


def _colour(lineup: Lineup, method: str) -> str:
    return plots.COLOURS[lineup.method_names().index(method) % len(plots.COLOURS)]


def _shown_classes(rows: Sequence[ClassRow]) -> list[int]:
    """All classes, or of many those that differ most."""
    classes = sorted(rows[0].mean)
    largest = sorted(classes, key=lambda c: -max(abs(row.mean[c]) for row in rows))
    return sorted(largest[:MAX_CLASSES])
