"""What is done, what is to run, what that needs and how long it takes.

Times are those of measured cells: seconds per image of the same method, architecture and data, else of the same
architecture and data, in records of the CPU. GPU hours come from measured throughput (dinobench/throughput.yaml) and
are unknown where nothing was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dinobench.tables.cells import Cell, Cells
from dinobench.tables.records import Record, RecordStore
from pretrain.errors import UsageError

THROUGHPUT_FILE = Path(__file__).parent.parent / "throughput.yaml"


class Throughput(BaseModel):
    """One measurement on GPUs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    preset: str
    images_per_second: float = Field(gt=0)
    """Of all GPUs together."""
    gpus: int = Field(ge=1)
    device: str
    source: str
    """Where the measurement is recorded."""


@dataclass(frozen=True)
class Need:
    """Data or a checkpoint."""

    what: str
    """Its name, or where to put it."""
    here: bool


@dataclass(frozen=True)
class Step:
    """A cell and where it stands."""

    cell: Cell
    """With those of its suites whose data is here."""
    record: Record | None
    missing: tuple[str, ...]
    """Suites that have no result yet; empty: the cell is done."""
    source: Need
    """Training images, or released weights."""
    data: Mapping[str, Need]
    """Suite -> its images."""
    seconds: float | None
    """Estimated on this kind of machine; None: no similar cell was measured."""
    gpu_hours: float | None

    @property
    def done(self) -> bool:
        return not self.missing and self.record is not None

    @property
    def ready(self) -> bool:
        """Whether there is something that can be trained or measured here; a training without suites has its curves."""
        possible = set(self.missing) & set(self.cell.suites)
        return self.source.here and (bool(possible) or (self.record is None and not self.data))

    @property
    def absent(self) -> list[str]:
        """What is not here, of what is still missing."""
        if self.done:
            return []
        needs = [self.source, *(self.data[suite] for suite in self.missing)]
        return list(dict.fromkeys(need.what for need in needs if not need.here))

    def needs(self, suites: Sequence[str]) -> list[str]:
        """What some of its suites take."""
        needs = [self.source, *(self.data[suite] for suite in suites if suite in self.data)]
        return list(dict.fromkeys(need.what for need in needs))


@dataclass(frozen=True)
class Plan:
    """All cells of a call, in order."""

    cells: Cells
    steps: tuple[Step, ...]

    @cached_property
    def to_run(self) -> list[Step]:
        """What is missing and can run here."""
        return [step for step in self.steps if not step.done and step.ready]

    @property
    def waiting(self) -> list[Step]:
        """What is missing, wholly or in part, and something it needs is not here."""
        return [step for step in self.steps if not step.done and step.absent]

    @property
    def num_done(self) -> int:
        return sum(step.done for step in self.steps)

    def minutes(self, workers: int) -> float | None:
        """Estimated time of what runs, `workers` cells at a time; None when it is not known of every cell."""
        each = [step.seconds for step in self.to_run]
        if any(seconds is None for seconds in each):
            return None
        known = [seconds for seconds in each if seconds is not None]
        # the longest cell can be last, so it bounds the time however many workers there are
        return max(sum(known) / max(workers, 1), max(known, default=0.0)) / 60


def make_plan(cells: Cells, store: RecordStore) -> Plan:
    """Where every cell stands.

    Raises:
        DinobenchError: a record is damaged.
    """
    pace = _Pace(store.all())
    return Plan(cells, tuple(_step(cell, store, pace) for cell in cells.all))


@cache
def read_throughput(path: Path = THROUGHPUT_FILE) -> list[Throughput]:
    """The measured throughputs.

    Raises:
        UsageError: the file cannot be read or has an unknown key.
    """
    from pretrain.mapping import read_mapping

    entries = read_mapping(path, kind="list of throughputs", holds="entries: [...]").get("entries", [])
    try:
        return [Throughput.model_validate(entry) for entry in entries]
    except ValidationError as error:
        raise UsageError(f"{path}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from None


class _Pace:
    """Seconds per training image, from records."""

    def __init__(self, records: Sequence[Record]):
        self._by: dict[str, list[float]] = {}
        self._beside: list[float] = []
        for record in records:
            facts = record.content["provenance"]
            images, label = facts.get("images_seen") or 0, str(facts.get("label"))
            if images and record.content["seconds"] and record.content["receipt"].get("device") == "cpu":
                seconds = record.content["seconds"] / images
                for name in (label, _without_method(label, str(facts.get("method")))):
                    self._by.setdefault(name, []).append(seconds)
            if "other_seconds" in record.content:
                self._beside.append(record.content["other_seconds"])

    def seconds(self, cell: Cell) -> float | None:
        """Training, and what comes beside it: start and evaluation."""
        for name in (cell.label, _without_method(cell.label, cell.method)):
            if cell.num_images and (known := self._by.get(name)):
                beside = statistics.median(self._beside) if self._beside else 0.0
                return cell.num_images * statistics.median(known) + beside
        return None


def _without_method(label: str, method: str) -> str:
    return label.removeprefix(method)


def _step(cell: Cell, store: RecordStore, pace: _Pace) -> Step:
    record = store.find(cell)
    data = {suite: _suite_data(suite, cell) for suite in cell.suites}
    return Step(
        cell=replace(cell, suites=tuple(suite for suite in cell.suites if data[suite].here)),
        record=record,
        missing=tuple(record.lacks(cell.suites)) if record else cell.suites,
        source=_source(cell),
        data=data,
        seconds=pace.seconds(cell),
        gpu_hours=_gpu_hours(cell),
    )


def _source(cell: Cell) -> Need:
    if cell.released:
        path = cell.checkpoint
        return Need(str(path) if path else f"checkpoint {cell.weights} in checkpoints.yaml", bool(path))
    here = cell.data_fingerprint is not None
    return Need(cell.images if here else _ask_for(cell.images), here)


def _suite_data(suite: str, cell: Cell) -> Need:
    name = _dataset_of(suite)
    given = dict(cell.uris).get(name.rstrip(":")) if name.endswith(":") else None
    here = given is not None or _is_here(name)
    return Need(given or (name if here else _ask_for(name)), here)


def _ask_for(name: str) -> str:
    scheme, colon, path = name.partition(":")
    return f"--data {scheme}:/path" if colon and not path else f"{name} under DINOBENCH_DATA"


@cache
def _dataset_of(suite: str) -> str:
    from suites.suite import load_suite

    return load_suite(suite).dataset.name or ""


def _is_here(name: str) -> bool:
    from pretrain.data.datasets import data_root, dataset_names
    from suites.places import UNDER_DATA_ROOT

    if name in UNDER_DATA_ROOT:
        root = data_root()
        return root is not None and any((root / place).exists() for place in UNDER_DATA_ROOT[name])
    return any(info.available for info in dataset_names() if info.name == name)


def _gpu_hours(cell: Cell) -> float | None:
    for entry in read_throughput():
        if cell.num_images and (entry.method, entry.preset) == (cell.method, cell.preset):
            return cell.num_images / entry.images_per_second / 3600 * entry.gpus
    return None
