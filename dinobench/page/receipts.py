"""What scores were made from: checkpoint, recipe, code, packages, images; and the command that checks them.

A receipt is that of a file: of one suite where it is a stored result, of all its suites where it is a committed record,
whose baselines lie beside it.
"""

from __future__ import annotations

import os.path
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinobench.comparison.candidates import Candidate, Checkpoint, Score, dig
from dinobench.entries import BASELINES
from dinobench.files import read_json
from dinobench.results import read_result
from dinobench.tables import records

RETRAIN = "a record comes without its checkpoint; dinobench table --retrain COMMIT trains a recorded cell again"

Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Receipt:
    """The facts of one file."""

    anchor: str
    """Its place on the page."""
    title: str
    facts: list[tuple[str, str]]
    command: str
    """What measures the score again; empty for a record."""
    created: str
    """Time of the newest measurement, ISO 8601 in UTC; empty where it is not known."""
    baselines: Mapping[str, Mapping[str, Scores]]
    """Suite -> baseline -> scores."""

    def baseline(self, score: Score) -> dict[str, float | None]:
        """Name shown -> headline score of a suite."""
        own = self.baselines.get(score.suite, {})
        return {shown: own.get(name, {}).get(score.headline) for name, shown in BASELINES.items()}


@dataclass
class Receipts:
    """The receipts of a page, each file once; files below `output` are named from there, for the page travels."""

    output: Path
    by_file: dict[Path, Receipt] = field(default_factory=dict)

    def add(self, candidate: Candidate, at: Checkpoint, score: Score) -> Receipt:
        """The receipt of a score.

        Raises:
            DinobenchError: its file is damaged.
        """
        file = candidate.source if score.samples is None else result_file(score.samples)
        if file not in self.by_file:
            anchor = f"receipt-{len(self.by_file) + 1}"
            read = _of_record if score.samples is None else _of_result
            self.by_file[file] = read(file, anchor, candidate, at, score, self.output)
        return self.by_file[file]

    def all(self) -> list[Receipt]:
        return list(self.by_file.values())

    def anchors(self) -> dict[str, str]:
        """Absolute path of a file -> place of its receipt."""
        return {os.path.abspath(file): receipt.anchor for file, receipt in self.by_file.items()}


def result_file(samples: Path) -> Path:
    """The file of a stored result from that of its per-image values (dinobench/results.py has both)."""
    return samples.parents[2] / "evals" / samples.parent.name / f"{samples.stem}.json"


def shown_path(path: Path, output: Path) -> str:
    """A path from the folder of the runs on where it lies there, else as it was named."""
    absolute, root = path.absolute(), output.absolute()
    return (Path(root.name) / absolute.relative_to(root)).as_posix() if root in absolute.parents else path.as_posix()


def _of_result(file: Path, anchor: str, candidate: Candidate, at: Checkpoint, score: Score, output: Path) -> Receipt:
    stored = read_result(file)
    shown = shown_path(file, output)
    facts = {**stored.provenance, "checkpoint": shown_path(Path(stored.checkpoint), output)}
    return Receipt(
        anchor=anchor,
        title=f"{_title(candidate, at)}: {score.suite}",
        facts=[
            ("file", shown),
            *_facts(facts, stored.receipt, score.data),
            *_measurement(score.suite, stored.model_dump()),
        ],
        command=shlex.join(["dinobench", "verify", shown]),
        created=stored.created,
        baselines={score.suite: stored.baselines},
    )


def _of_record(file: Path, anchor: str, candidate: Candidate, at: Checkpoint, score: Score, output: Path) -> Receipt:
    record = read_json(file)
    provenance, results = record["provenance"], record["results"]
    measured = [fact for suite, result in sorted(results.items()) for fact in _measurement(suite, result)]
    beside = file.with_name(records.BASELINES)
    return Receipt(
        anchor=anchor,
        title=_title(candidate, at),
        facts=[
            ("file", shown_path(file, output)),
            *_facts({**provenance, "checkpoint": provenance.get("path")}, record["receipt"], score.data),
            *measured,
            ("check", RETRAIN),
        ],
        command="",
        created=max((result.get("created") or "" for result in results.values()), default=""),
        baselines=read_json(beside) if beside.is_file() else {},
    )


def _title(candidate: Candidate, at: Checkpoint) -> str:
    seed = "" if candidate.seed is None else f", seed {candidate.seed}"
    return f"{candidate.method}{seed}, step {at.step}"


def _facts(facts: Mapping[str, Any], made: Mapping[str, Any], data: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    code = made.get("code") or {}
    dirty = ", with changes that are not committed" if code.get("dirty") else ""
    packages = made.get("packages") or {}
    stated = {
        "checkpoint": facts.get("checkpoint"),
        "checkpoint SHA-256": facts.get("sha256"),
        "network": " ".join(str(facts[key]) for key in ("network", "arch") if facts.get(key)),
        "images seen": facts.get("images_seen"),
        "recipe hash": facts.get("recipe_hash"),
        "code commit": f"{code['commit']}{dirty}" if code.get("commit") else None,
        "packages": ", ".join(f"{name} {version}" for name, version in sorted(packages.items())),
        "device": " ".join(str(made[key]) for key in ("device", "precision") if made.get(key)),
    }
    yield from ((name, str(value)) for name, value in stated.items() if value not in (None, ""))
    for role, fingerprint in sorted(data.items()):
        count = dig(made, f"dataset.{role}.n")
        yield f"{role} images", f"{fingerprint}{f' ({count} images)' if count else ''}"


def _measurement(suite: str, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    created = f", measured {result['created']}" if result.get("created") else ""
    yield suite, f"definition {result['suite_fingerprint']}{created}"
    yield from (("note", str(note)) for note in result.get("notes") or [])
