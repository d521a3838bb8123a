"""A table with its numbers: what the papers print beside what was measured, and what the difference means.

    not run                        there is no record
    other scale: not comparable    measured, but not what the paper trained
    within tolerance, outside      at the scale paper, the nearest published figure
    no published figure            measured at the scale paper; published.csv has nothing to compare with
    does not apply                 the suite says nothing about this method (prototypes, of one without)

Measured is the mean over seeds with the sample standard deviation, or for one seed the bootstrap interval over images.
Bold is what `statistics.may_be_bold` lets be bold: the method test with at least 5 seeds, Holm over the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from dinobench import statistics
from dinobench.entries import BASELINES
from dinobench.tables.cells import Cells
from dinobench.tables.definition import Column, Row, Scale, Table
from dinobench.tables.published import Figure
from dinobench.tables.records import Record, RecordStore

Verdict = Literal[
    "within tolerance", "outside", "other scale: not comparable", "not run", "no published figure", "does not apply"
]


@dataclass(frozen=True)
class Entry:
    """One row in one column."""

    published: tuple[Figure, ...]
    scores: Mapping[int, float]
    """Seed -> score."""
    interval: tuple[float, float] | None
    """Bootstrap interval over images, of a single seed's headline score."""
    verdict: Verdict
    bold: bool = False

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def mean(self) -> float | None:
        return fmean(self.scores.values()) if self.scores else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than 2."""
        return statistics.spread(list(self.scores.values()))

    @property
    def nearest(self) -> Figure | None:
        """The published figure nearest to what was measured; the first one where nothing was."""
        mean = self.mean
        if mean is None or not self.published:
            return next(iter(self.published), None)
        return min(self.published, key=lambda figure: abs(float(figure.value) - mean))

    @property
    def difference(self) -> float | None:
        """Measured minus published, where that means something."""
        if self.mean is None or self.nearest is None or self.verdict not in ("within tolerance", "outside"):
            return None
        return self.mean - float(self.nearest.value)


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    row: Row
    label: str
    entries: tuple[Entry, ...]
    """One per column."""
    records: tuple[Record, ...]
    """What they were read from, by seed."""
    wanted: int
    """Seeds that the table asks for."""


@dataclass(frozen=True)
class Contents:
    """A table at one scale."""

    table: Table
    scale: Scale
    columns: tuple[Column, ...]
    """Those measured at this scale."""
    lines: tuple[Line, ...]
    baselines: Mapping[str, tuple[float | None, ...]]
    """Baseline -> its score per column."""
    left_out: int
    """Rows that are not trained at this scale."""

    @property
    def short(self) -> tuple[str, ...]:
        return self.table.setting(self.scale).short_schedule

    @property
    def outside(self) -> list[str]:
        """What is out of tolerance, as `row, column`."""
        return [
            f"{line.label}, {column.label}"
            for line in self.lines
            for column, entry in zip(self.columns, line.entries, strict=True)
            if entry.verdict == "outside"
        ]

    @property
    def num_records(self) -> int:
        return sum(len(line.records) for line in self.lines)

    @property
    def num_wanted(self) -> int:
        return sum(line.wanted for line in self.lines)


def fill(table: Table, cells: Cells, store: RecordStore) -> Contents:
    """A table from the records that there are.

    Raises:
        UsageError: a published figure is not found.
        DinobenchError: a record is damaged.
    """
    scale = cells.scale
    columns = tuple(table.measured_columns(scale))
    shown = [row for row in table.rows if scale == "paper" or cells.of_row[table.name, row.label]]
    lines = tuple(_line(table, row, columns, cells, store) for row in shown)
    return Contents(
        table=table,
        scale=scale,
        columns=columns,
        lines=_with_bold(columns, lines),
        baselines=_baselines(store, scale, columns) if table.baselines else {},
        left_out=len(table.rows) - len(shown),
    )


def _line(table: Table, row: Row, columns: Sequence[Column], cells: Cells, store: RecordStore) -> Line:
    own = cells.of(table.name, row.label)
    found = {cell.seed: record for cell in own if (record := store.find(cell)) is not None}
    entries = tuple(_entry(table, row, column, cells.scale, found) for column in columns)
    return Line(row, row.label_at(cells.scale), entries, tuple(found.values()), len(own))


def _entry(table: Table, row: Row, column: Column, scale: Scale, records: Mapping[int, Record]) -> Entry:
    measure = column.at[scale]
    current = {seed: record for seed, record in records.items() if not record.lacks([measure.suite])}
    scores = {seed: record.score(measure.suite, measure.score) for seed, record in current.items()}
    measured = {seed: score for seed, score in scores.items() if score is not None}
    interval = None
    if len(measured) == 1:
        interval = next(current[seed].interval(measure.suite, measure.score) for seed in measured)
    published = tuple(table.figures(row, column))
    return Entry(published, measured, interval, _verdict(table, scale, published, measured, bool(records)))


def _verdict(
    table: Table, scale: Scale, published: Sequence[Figure], scores: Mapping[int, float], recorded: bool
) -> Verdict:
    if not scores:
        return "does not apply" if recorded else "not run"
    if scale != "paper":
        return "other scale: not comparable"
    if not published:
        return "no published figure"
    away = min(abs(fmean(scores.values()) - float(figure.value)) for figure in published)
    return "within tolerance" if away <= table.tolerance else "outside"


def _with_bold(columns: Sequence[Column], lines: Sequence[Line]) -> tuple[Line, ...]:
    """Mark what the method test supports; columns in which more is not better have no best."""
    from dataclasses import replace

    scores = {
        column.label: {line.label: line.entries[k].scores for line in lines if line.entries[k].scores}
        for k, column in enumerate(columns)
        if column.compared
    }
    best = statistics.may_be_bold(scores)
    return tuple(
        replace(
            line,
            entries=tuple(
                replace(entry, bold=best.get(column.label) == line.label)
                for column, entry in zip(columns, line.entries, strict=True)
            ),
        )
        for line in lines
    )


def _baselines(store: RecordStore, scale: Scale, columns: Sequence[Column]) -> dict[str, tuple[float | None, ...]]:
    stored = store.baselines(scale)
    found = {
        shown: tuple(stored.get(c.at[scale].suite, {}).get(name, {}).get(c.at[scale].score) for c in columns)
        for name, shown in BASELINES.items()
    }
    return {name: scores for name, scores in found.items() if any(score is not None for score in scores)}


def receipt_paths(line: Line, folder: Path) -> list[tuple[int, str]]:
    """Seed and path of the records behind a row, relative to the folder of the table."""
    import os

    return [(record.seed, Path(os.path.relpath(record.file, folder)).as_posix()) for record in line.records]
