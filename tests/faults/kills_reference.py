"""Runs and tables that nothing interrupted, and folders in which commands are started."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path

from dinobench.files import ABANDONED_SECONDS
from dinobench.runs import RunFolder, list_runs
from kills import End, Moment, Starter, duration, run
from kills_checks import TEMPORARY, check_whole, files

RECIPE = (
    "dino_vmf",
    "schedule.epochs=3",
    "schedule.steps_per_epoch=10",
    "schedule.warmup_epochs=1",
    "optim.batch_size=16",
    "head.num_prototypes=32",
    "runtime.log_every=2",
    "runtime.threads=1",
    "checkpoint.every_epochs=1",
    "checkpoint.every_steps=3",
    "checkpoint.keep=2",
    "evaluation.suites=[digits_knn]",
)
TRAIN = ["pretrain", *RECIPE, "--output", "runs", "--json"]
DEFINITIONS = Path(__file__).parent.parent / "dinobench" / "tables" / "definitions"
TABLE = ["table", "--only", "tiny", "--definitions", str(DEFINITIONS), "--seeds", "0", "--workers", "1"]
TABLE += ["--output", "cells", "--records", "records"]
SYNC = ["runs", "sync", "--output", "runs"]
NEW_STORE = r"sqlite3\.connect .*/mlflow\.db$"
"""The store has its name, and its tables."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A run and its tables that nothing interrupted."""

    folder: Path
    seconds: dict[str, float]
    """Phase -> how long it takes."""
    table_events: int

    @property
    def run(self) -> RunFolder:
        (found,) = list_runs(self.folder / "runs")
        return found


def make_reference(starter: Starter, folder: Path) -> Reference:
    place = Place(starter, folder)
    trained = place.do(TRAIN)
    phases = {name: duration(trained.events, name) for name in ("training", "checkpointing", "caching")}
    forget_results(next(iter(list_runs(folder / "runs"))))
    phases["evaluation"] = duration(place.do(TRAIN).events, "evaluation")  # with features that are cached
    phases["syncing"] = _make_empty_store(place)
    table = place.do(TABLE)
    phases["tables"] = (table.events[-1][0] - table.events[0][0]) / len(table.events)
    return Reference(place.folder, phases, len(table.events))


def _make_empty_store(place: Place) -> float:
    """Beside the store of a place one without runs, `empty.db`; gives the seconds in which a run is logged to that."""
    store, kept, empty = (place.folder / name for name in ("mlflow.db", "kept.db", "empty.db"))
    store.rename(kept)
    made = run(place.starter, SYNC, place.folder, place.environment, Moment(signal.SIGKILL, NEW_STORE, 0, 0.0))
    assert made.killed is not None
    check_whole(place.folder)  # takes back what was not finished
    shutil.copyfile(store, empty)
    events = place.do(SYNC).events
    store.unlink()
    kept.rename(store)
    return events[-1][0] - next(moment for moment, event in events if "sqlite3.connect" in event)


def forget_results(found: RunFolder) -> None:
    """So that they are to be measured again."""
    for name in ("evals", "samples"):
        shutil.rmtree(found.path / name, ignore_errors=True)


def age(folder: Path) -> None:
    """As if the kills were long ago: only then are temporary files nobody's."""
    for path in files(folder):
        if TEMPORARY.search(path.name):
            os.utime(path, (0, path.stat().st_mtime - 2 * ABANDONED_SECONDS))


@dataclasses.dataclass
class Place:
    """A folder with a store and a cache of its own, and how commands are started in it."""

    starter: Starter
    folder: Path
    starts: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "DINOBENCH_CACHE": str(self.folder / "cache"),
        }

    def do(self, arguments: list[str], moment: Moment | None = None) -> End:
        """Run a command; one that nobody kills must succeed."""
        self.starts += 1
        end = run(self.starter, arguments, self.folder, self.environment, moment)
        if end.killed is None:
            assert end.code == 0, (arguments, end.code, end.err)
        return end
