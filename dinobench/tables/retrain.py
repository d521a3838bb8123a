"""A committed cell trained again, to see that the records are what the code gives.

Which one, the hash of the commit decides: over many commits all of them have their turn. The trained numbers are
compared score by score:

    accuracy and NMI (headlines of kNN, linear, few-shot, clusters)   2 points, or 3 standard deviations over the seeds
                                                                      of the same recipe where they vary more
On one machine with the same versions a training repeats itself exactly; on another, rounding sends it elsewhere after
some hundred steps, as another seed would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dinobench import statistics
from dinobench.tables.cells import Cell, Cells
from dinobench.tables.records import Record, RecordStore
from dinobench.tables.worker import Workplace, run_cell
from pretrain.errors import DinobenchError

POINTS = 2.0
DEVIATIONS = 3.0
COMPARED = ("knn", "linear", "fewshot", "clusters")
"""Protocols whose headline is a score in percent."""


@dataclass(frozen=True)
class Comparison:
    """A headline score as recorded and as trained now."""

    suite: str
    recorded: float
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        return abs(self.recorded - self.found) <= self.allowed


def choose(cells: Cells, store: RecordStore, commit: str) -> Cell:
    """The recorded training that a commit stands for.

    Raises:
        DinobenchError: `commit` is no hash, or nothing is recorded.
    """
    done = sorted((cell for cell in cells.all if not cell.released and store.is_done(cell)), key=lambda c: c.key)
    try:
        number = int(commit, 16)
    except ValueError as error:
        raise DinobenchError(f"{commit!r} is not the hash of a commit: expected hexadecimal digits") from error
    if not done:
        raise DinobenchError(f"no training of these tables is recorded below {store.root}")
    return done[number % len(done)]


def retrain(
    cell: Cell, cells: Cells, store: RecordStore, place: Workplace, say: Callable[[str], None]
) -> list[Comparison]:
    """Train a recorded cell anew in `place` and compare its headlines.

    Raises:
        DinobenchError: `place` has a record of it already, so that nothing would be trained.
    """
    recorded = store.find(cell)
    assert recorded is not None, "chosen among the recorded cells"
    if RecordStore(place.records).find(cell) is not None:
        raise DinobenchError(f"{place.records} has a record of {cell.command}: give an empty folder")
    run_cell(cell, place, say)
    found = RecordStore(place.records).find(cell)
    if found is None:
        raise DinobenchError(f"another process trains {cell.command} in {place.output}: wait for it")
    return [
        Comparison(suite, before, now, _allowed(cell, cells, store, suite, headline))
        for suite, headline in _headlines(recorded)
        if (before := recorded.score(suite, headline)) is not None and (now := found.score(suite, headline)) is not None
    ]


def _headlines(record: Record) -> list[tuple[str, str]]:
    from suites.suite import load_suite

    results = record.content["results"]
    return [(suite, results[suite]["headline"]) for suite in results if load_suite(suite).protocol in COMPARED]


def _allowed(cell: Cell, cells: Cells, store: RecordStore, suite: str, headline: str) -> float:
    """From the seeds of the same recipe."""
    same = [c for c in cells.all if (c.label, c.name, c.overrides) == (cell.label, cell.name, cell.overrides)]
    records = [record for c in same if (record := store.find(c)) is not None]
    scores = [score for record in records if (score := record.score(suite, headline)) is not None]
    deviation = statistics.spread(scores) if len(scores) > 2 else None
    return max(POINTS, DEVIATIONS * deviation) if deviation is not None else POINTS
