"""Lives of runs: killed again and again, continued each time, and compared with what nothing interrupted."""

from __future__ import annotations

import dataclasses
import random
import shutil
import signal
from pathlib import Path

from dinobench.files import read_json
from dinobench.runs import RunFolder, list_runs
from kills import End, Moment, Starter
from kills_checks import (
    Store,
    check_mirror,
    check_same,
    check_status,
    check_whole,
    different,
    files,
    leftovers,
    untimed,
)
from kills_reference import SYNC, TABLE, TRAIN, Place, Reference, age, forget_results

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PLAN = ("training", "checkpointing", "training", "checkpointing", "evaluation", "caching", "syncing", "syncing")
"""What the kills of a run's life aim at, in the order in which a run comes to it."""
TABLE_PLAN = ("tables",) * 4
CODES = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {128 + signal.SIGTERM},
    signal.SIGINT: {128 + signal.SIGINT},
    signal.SIGUSR1: {128 + signal.SIGTERM, 128 + signal.SIGUSR1},
}
"""How a process ends that was told to: the training says 143 after a checkpoint, whatever the signal was."""


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill: the signal, and what the process was doing."""

    signal: signal.Signals
    doing: str


class Life:
    """A run that is killed at the moments of a plan and must come out as if nothing had happened."""

    def __init__(self, starter: Starter, folder: Path, reference: Reference, seed: int):
        self.starter, self.root, self.reference = starter, folder, reference
        self.random = random.Random(seed)
        self.kills: list[Kill] = []
        self._places: list[Place] = []
        self._signals = list(SIGNALS)
        self.random.shuffle(self._signals)
        self.place = self._new_place()

    def live(self, plan: tuple[str, ...]) -> None:
        for aim in plan:
            self._kill(aim)
        self._finish_tables() if "tables" in plan else self._finish()

    def _new_place(self) -> Place:
        self._places.append(Place(self.starter, self.root / f"life{len(self._places)}"))
        return self._places[-1]

    @property
    def starts(self) -> int:
        """Processes started."""
        return sum(place.starts for place in self._places)

    def _kill(self, aim: str) -> None:
        """Kill a command while it does what is aimed at, or something near it."""
        for _ in range(30):
            arguments = self._prepare(aim)
            moment = self._moment(aim)
            end = self.place.do(arguments, moment)
            if end.killed is None or end.is_late:
                continue
            doing = {"syncing": "syncing", "tables": "tables"}.get(aim) or end.doing
            self.kills.append(Kill(moment.signal, doing))
            self._check(end, moment, doing)
            return
        raise AssertionError(f"no kill while {aim}: the command was always faster")

    def _moment(self, aim: str) -> Moment:
        if not self._signals:
            self._signals = self.random.sample(SIGNALS, len(SIGNALS))
        number = self._signals.pop()
        seconds = self.random.uniform(0, self.reference.seconds[aim])
        if aim == "tables":
            skip = self.random.randrange(self.reference.table_events // 2)
            return Moment(number, "", skip, seconds, worker=self.random.random() < 0.25)
        event, most = {
            "training": (r"open .*/metrics\.jsonl$", 3),
            "checkpointing": (r"open .*/checkpoints/\.[^/]*\.tmp$", 2),
            "evaluation": (r"open .*/evals/.*\.lock$", 0),
            "caching": (r"open .*/cache/(features|scores)/../\.writing-", 8),
            "syncing": (r"sqlite3\.connect", 0),
        }[aim]
        return Moment(number, event, self.random.randint(0, most), seconds)

    def _prepare(self, aim: str) -> list[str]:
        """The command that does what is aimed at; where it was done, it is to be done again."""
        if aim == "tables":
            if self._is_tabled():
                self._finish_tables()
                self.place = self._new_place()
            return TABLE
        run = self._run()
        finished = run is not None and run.state().status == "finished"
        if aim in ("training", "checkpointing"):
            if finished:
                self._finish()
                self.place = self._new_place()
                run = None
            return TRAIN if run is None else [*TRAIN, "--resume"]
        if not finished:
            self.place.do([*TRAIN, "--resume", "--no-eval"])
            run = self._run()
        assert run is not None
        if aim in ("evaluation", "caching"):
            forget_results(run)
            if aim == "caching":
                shutil.rmtree(self.place.folder / "cache", ignore_errors=True)
            return [*TRAIN, "--resume"]
        if not self._is_evaluated(run):
            self.place.do([*TRAIN, "--resume"])
        if self._is_synced():
            self._forget_store()
        return SYNC

    def _run(self) -> RunFolder | None:
        """The run in the place of now; None before its first start has come so far."""
        return next(iter(list_runs(self.place.folder / "runs")), None)

    def _is_evaluated(self, run: RunFolder) -> bool:
        return len(list(run.path.glob("evals/*/*.json"))) == len(run.kept_checkpoints())

    def _is_synced(self) -> bool:
        run = self._run()
        return run is not None and run.state().mirrored and (self.place.folder / "mlflow.db").is_file()

    def _forget_store(self) -> None:
        """As if the tracking server were a new one; mostly one that has its tables, which take longest."""
        store = self.place.folder / "mlflow.db"
        store.unlink()
        shutil.rmtree(self.place.folder / "mlartifacts", ignore_errors=True)
        if self.random.random() < 0.8:
            shutil.copyfile(self.reference.folder / "empty.db", store)

    def _is_tabled(self) -> bool:
        return (self.place.folder / "records" / "tables" / "README.md").is_file()

    def _check(self, end: End, moment: Moment, doing: str) -> None:
        """After each kill: how it ended, every file, and what the run says of itself."""
        told = f"{moment.signal.name} while {doing}: exit {end.code}, {end.err[-2000:]}"
        expected = {3, 0} | CODES[moment.signal] if moment.worker else CODES[moment.signal]
        assert end.code in expected, told
        if moment.signal != signal.SIGKILL:
            assert "Traceback" not in end.err and "bug:" not in end.err, told
        check_whole(self.place.folder)
        run = self._run()
        if run is not None:
            check_status(run, end.code if doing != "syncing" else 0)
            if self.random.random() < 0.3 and (self.place.folder / "mlflow.db").is_file():
                self._reap(run)

    def _reap(self, run: RunFolder) -> None:
        """MLflow says of every run what its folder says."""
        self.place.do(["runs", "reap", "--output", "runs"])
        store = Store(self.place.folder / "mlflow.db")
        try:
            finished = run.state().status == "finished"
            assert store.statuses("pretrain") in ([], ["FINISHED"] if finished else ["KILLED"])
            assert "RUNNING" not in [status for _, status, *_ in store.runs]
        finally:
            store.close()

    def _finish(self) -> None:
        """Continue to the end; all must be as if nothing had happened, and nothing be left to do."""
        age(self.place.folder)
        self.place.do([*TRAIN, "--resume"])
        run = self._run()
        assert run is not None
        assert run.state().status == "finished"
        check_whole(self.place.folder)
        check_same(run, self.reference.run)
        again = self.place.do([*TRAIN])
        assert "nothing to train" in again.err
        self.place.do(SYNC)
        check_mirror(self.place.folder / "mlflow.db", run, self.reference.folder / "mlflow.db")
        assert not (left := leftovers(run.path)), left

    def _finish_tables(self) -> None:
        age(self.place.folder)
        self.place.do(TABLE)
        ours, theirs = self.place.folder / "records", self.reference.folder / "records"
        names = [path.relative_to(ours) for path in files(ours)]
        assert names == [path.relative_to(theirs) for path in files(theirs)]
        for name in names:
            if name.suffix == ".json":
                difference = different(untimed(read_json(ours / name)), untimed(read_json(theirs / name)))
                assert not difference, f"{name}: {difference}"
            elif name.suffix in (".md", ".csv", ".tex"):
                assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
        again = self.place.do(TABLE)
        assert "0 files written" in again.err
        for cell in list_runs(self.place.folder / "cells"):
            assert not (left := leftovers(cell.path)), left


def lives(kills: int) -> list[tuple[str, int, tuple[str, ...]]]:
    """(kind, seed, plan) of the lives with so many kills in all: two cold ones, then every fifth builds tables."""
    found: list[tuple[str, int, tuple[str, ...]]] = []
    plans = [("cold", PLAN[:7]), ("cold", TABLE_PLAN[:3])] if kills >= 50 else [("cold", PLAN[:1])]
    number = 0
    while kills > 0:
        kind, plan = plans[number] if number < len(plans) else ("fork", TABLE_PLAN if number % 4 == 0 else PLAN)
        found.append((kind, number, plan[:kills]))
        kills -= len(plan)
        number += 1
    return found
