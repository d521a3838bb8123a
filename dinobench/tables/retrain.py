"""A committed cell trained again, to see that the records are what the code gives.

Which one, the hash of the commit decides: over many commits all of them have their turn. The trained numbers are
compared score by score:

    accuracy and NMI (headlines of kNN, linear, few-shot, clusters)   2 points, or how far two seeds of the recipe lie
                                                                      apart in 99 % of cases where that is more
On one machine with the same versions a training repeats itself exactly; on another, rounding sends it elsewhere after
some hundred steps, as another seed would. So only recipes of at least 5 recorded seeds are trained again: fewer do not
say how far another one may go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from dinobench import statistics
from dinobench.statistics import MIN_SEEDS
from dinobench.tables.cells import Cell, Cells
from dinobench.tables.records import Record, RecordStore
from dinobench.tables.worker import Workplace, run_cell
from pretrain.errors import DinobenchError

POINTS = 2.0
CONFIDENCE = 0.99
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
        DinobenchError: `commit` is no hash, or no recipe is recorded under enough seeds.
    """
    try:
        number = int(commit, 16)
    except ValueError as error:
        raise DinobenchError(f"{commit!r} is not the hash of a commit: expected hexadecimal digits") from error
    own = [cell for cell in cells.all if not cell.released and store.is_done(cell)]
    seeds = Counter(_recipe(cell) for cell in own)
    done = sorted((cell for cell in own if seeds[_recipe(cell)] >= MIN_SEEDS), key=lambda c: c.key)
    if not done:
        raise DinobenchError(f"no training of these tables is recorded below {store.root} under {MIN_SEEDS} seeds")
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
    records = [record for c in cells.all if _recipe(c) == _recipe(cell) and (record := store.find(c)) is not None]
    scores = [score for record in records if (score := record.score(suite, headline)) is not None]
    return max(POINTS, statistics.difference_margin(scores, CONFIDENCE) or 0.0)


def _recipe(cell: Cell) -> tuple[object, ...]:
    """What cells that differ by the seed alone have in common."""
    return cell.label, cell.name, cell.overrides
