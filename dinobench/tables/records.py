"""Records: one JSON file per cell, what the tables are written from. Once it is there, the run folder may go.

    <root>/<scale>/records/<method>-s<seed>.json         scores, receipt, curves and the last logging interval
    <root>/<scale>_ablations/records/<row>-s<seed>.json  the same, where something differs from the method's own recipe
    <root>/<scale>/records/baselines.json                suite -> baseline -> scores

A record belongs to a cell by what it was made from (recipe, seed, images, version of the code), whatever its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from dinobench.files import read_json, slug, write_text
from dinobench.tables.cells import Cell
from pretrain.errors import DinobenchError

BASELINES = "baselines.json"
KEYS = frozenset({"name", "seed", "steps", "seconds", "provenance", "receipt", "results", "curve", "last_interval"})
"""What every record has."""


@dataclass(frozen=True)
class Record:
    """What was measured on one cell."""

    file: Path
    content: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return self.content["seed"]

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """science, data and version, as those of a cell. Records without `cell` are older than the versions."""
        if "cell" in self.content:
            return dict(self.content["cell"])
        data = self.content["receipt"]["dataset"]["train"]["fingerprint"]
        return {"science": self.content["provenance"]["recipe_hash"], "data": data, "version": 1}

    def belongs_to(self, cell: Cell) -> bool:
        """Whether it was made from what the cell says; images that are not here cannot speak against it."""
        own = self.made_from
        same_data = cell.data_fingerprint in (None, own["data"])
        return own["science"] == cell.science and own["version"] == cell.version and same_data

    def lacks(self, suites: Sequence[str]) -> list[str]:
        """The suites that were not measured, or measured with another definition."""
        results = self.content["results"]
        return [suite for suite in suites if results.get(suite, {}).get("suite_fingerprint") != _fingerprint(suite)]

    def score(self, suite: str, name: str) -> float | None:
        """A score; None where the suite says nothing about this cell."""
        return self.content["results"].get(suite, {}).get("scores", {}).get(name)

    def interval(self, suite: str, name: str) -> tuple[float, float] | None:
        """95 % over images; only headline scores have one."""
        result = self.content["results"].get(suite, {})
        low_high = result.get("interval") if result.get("headline") == name else None
        return (low_high[0], low_high[1]) if low_high else None


@dataclass(frozen=True)
class RecordStore:
    """The records below a folder, of every scale and experiment."""

    root: Path

    def folder(self, scale: str, *, ablation: bool = False) -> Path:
        """Where new records of a scale are written; those of ablations apart, because nobody compares all of them."""
        return self.root / (f"{scale}_ablations" if ablation else scale) / "records"

    @cached_property
    def _by_science(self) -> dict[str, list[Record]]:
        found: dict[str, list[Record]] = {}
        for file in sorted(self.root.glob("*/records/*.json")):
            if file.name != BASELINES:
                record = read_record(file)
                found.setdefault(record.made_from["science"], []).append(record)
        return found

    def all(self) -> list[Record]:
        return [record for records in self._by_science.values() for record in records]

    def find(self, cell: Cell) -> Record | None:
        """The record of a cell, the most complete one."""
        own = [record for record in self._by_science.get(cell.science, []) if record.belongs_to(cell)]
        return min(own, key=lambda record: (len(record.lacks(cell.suites)), str(record.file)), default=None)

    def is_done(self, cell: Cell) -> bool:
        """Whether there is nothing left to train or measure."""
        record = self.find(cell)
        return record is not None and not record.lacks(cell.suites)

    def path(self, cell: Cell) -> Path:
        """Where the record of a cell is written."""
        changed = f"-{cell.science[:8]}" if cell.overrides else ""
        seed = "" if cell.released else f"-s{cell.seed}"
        folder = self.folder(cell.scale, ablation=bool(cell.overrides) or "/" in cell.name)
        return folder / f"{slug(cell.name.replace('/', '-'))}{seed}{changed}.json"

    def save(self, cell: Cell, content: dict[str, Any], baselines: dict[str, Any]) -> Path:
        """Write a record whole or not at all, and the baselines that are not there yet; one process at a time."""
        path = self.path(cell)
        self._save_baselines(cell.scale, baselines)
        write_text(path, json.dumps(content, sort_keys=True, allow_nan=False) + "\n")
        return path

    def baselines(self, scale: str) -> dict[str, Any]:
        """Suite -> baseline -> scores."""
        file = self.folder(scale) / BASELINES
        return read_json(file) if file.is_file() else {}

    def _save_baselines(self, scale: str, baselines: dict[str, Any]) -> None:
        stored = self.baselines(scale)
        if new := {suite: scores for suite, scores in baselines.items() if scores and suite not in stored}:
            text = json.dumps({**stored, **new}, indent=1, sort_keys=True, allow_nan=False)
            write_text(self.folder(scale) / BASELINES, text + "\n")


def read_record(file: Path) -> Record:
    """A record from its file.

    Raises:
        DinobenchError: it is not one.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        lacking = sorted(KEYS - set(content if isinstance(content, dict) else ()))
        raise DinobenchError(f"{file} is not a record: it lacks {', '.join(lacking)}; move it away to measure again")
    record = Record(file, content)
    try:
        made_from = record.made_from
        sound = isinstance(made_from["science"], str) and all(hasattr(r, "get") for r in content["results"].values())
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise DinobenchError(f"{file} was altered or damaged: it does not say what it was made from; move it away")
    return record


@cache
def _fingerprint(suite: str) -> str:
    from suites.suite import load_suite

    return load_suite(suite).fingerprint()
