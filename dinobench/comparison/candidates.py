"""What can be compared, read into one form: run folders, checkpoint files, stored results and committed records.

Nothing is measured here; what was not evaluated has no scores.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from dinobench.entries import row_label
from dinobench.files import read_json, sha256
from dinobench.journal import Journal
from dinobench.results import HASH_DIGITS, Result, read_result
from dinobench.runs import RunFolder, list_runs, run_of_checkpoint
from pretrain.errors import DinobenchError

if TYPE_CHECKING:
    import pandas as pd

Curve = list[tuple[int, float]]
"""(step, value)"""


@dataclass(frozen=True)
class Score:
    """The scores of one suite on one checkpoint, and where its per-image values are."""

    suite: str
    """<name>@<version>, and the data set where it is not the suite's own."""
    suite_fingerprint: str
    headline: str
    scores: dict[str, float | None]
    interval: tuple[float, float] | None
    n: int
    data: dict[str, str]
    """Role -> fingerprint of the images."""
    samples: Path | None = None
    """Where the per-image values would be; None for a committed record."""

    @property
    def value(self) -> float:
        found = self.scores.get(self.headline)
        return float("nan") if found is None else found

    def frame(self, table: str = "") -> pd.DataFrame | None:
        """The stored per-image values, or a named table beside them; None where there is none."""
        if self.samples is None:
            return None
        file = self.samples.with_name(f"{self.samples.stem}-{table}.parquet") if table else self.samples
        if not file.is_file():
            return None
        import pandas as pd

        try:
            return pd.read_parquet(file)
        except (OSError, ValueError) as error:
            raise _damaged(file) from error

    def per_image(self) -> pd.DataFrame | None:
        """`value` in points by image (its number is the index), and its `label` where it has one.

        The column is the one whose mean is the headline score; None where no column is that.

        Raises:
            DinobenchError: the file was damaged.
        """
        frame = self.frame()
        if frame is None or self.samples is None:
            return None
        try:
            return self._headline_values(frame)
        except (KeyError, TypeError, ValueError) as error:  # a bit of a column's name or type differs
            raise _damaged(self.samples) from error

    def _headline_values(self, frame: pd.DataFrame) -> pd.DataFrame | None:
        columns = [name for name in frame.columns if name == "correct" or name.startswith("ap")]
        for name in columns:
            values = frame[name].to_numpy(dtype=np.float64) * (100 if name == "correct" else 1)
            if np.isfinite(values).any() and abs(np.nanmean(values) - self.value) < 1e-6:
                found = frame[["index", *(["label"] if "label" in frame else [])]].assign(value=values)
                return found.set_index("index").sort_index()
        return None


def _damaged(file: Path) -> DinobenchError:
    return DinobenchError(f"{file} cannot be read: it was altered or damaged; measure again")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint and what was measured on it."""

    step: int
    images_seen: int
    scores: dict[str, Score]


@dataclass(frozen=True)
class Candidate:
    """A run, a lone checkpoint or a committed record."""

    source: Path
    method: str
    """The row of an ablation where it is one."""
    seed: int | None
    facts: dict[str, Any]
    """Provenance of the last checkpoint."""
    checkpoints: tuple[Checkpoint, ...]
    """By training step; only those with scores."""
    named: bool = False
    """Whether one checkpoint was asked for: it is compared as it is, whatever the others' steps."""
    recipe: dict[str, Any] | None = None
    recorded: dict[str, Curve] = field(default_factory=dict)
    """The training curves of a record."""

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Training metrics by name."""
        if self.recorded or not (self.source / "metrics.jsonl").is_file():
            return self.recorded
        curves: dict[str, Curve] = {}
        for point in Journal(self.source / "metrics.jsonl").read():
            for key, value in point.finite().items():
                curves.setdefault(key, []).append((point.step, value))
        return curves

    @property
    def images_per_step(self) -> float | None:
        """Images seen in one training step."""
        seen = [at.images_seen / at.step for at in self.checkpoints if at.step and at.images_seen]
        return seen[-1] if seen else None

    def only(self, suites: Sequence[str]) -> Candidate:
        """With the scores of these suites (patterns of name or name@version) alone."""

        def wanted(score: Score) -> bool:
            name = score.suite.partition("@")[0]
            return any(fnmatchcase(name, pattern) or fnmatchcase(score.suite, pattern) for pattern in suites)

        kept = tuple(
            replace(at, scores={key: score for key, score in at.scores.items() if wanted(score)})
            for at in self.checkpoints
        )
        return replace(self, checkpoints=tuple(at for at in kept if at.scores))


class _RecordResult(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    headline: str
    scores: dict[str, float | None]
    interval: tuple[float, float] | None = None
    n: int
    suite_fingerprint: str


class Record(BaseModel):
    """What is read of a committed record (results/*/records): the last checkpoint of a run, without images."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    command: str = ""
    seed: int | None = None
    provenance: dict[str, Any]
    receipt: dict[str, Any]
    results: dict[str, _RecordResult]
    curve: dict[str, list[tuple[int, float]]] = {}


def read(path: Path, output: Path) -> list[Candidate]:
    """What one path holds: a run folder, a checkpoint, a result or a record; or a folder of runs and records.

    Raises:
        DinobenchError: there is nothing there, or nothing measured.
    """
    if RunFolder(path).exists:
        return [read_run(RunFolder(path))]
    if path.is_dir():
        found = collect(path)
        if not found:
            raise DinobenchError(f"{path} holds neither runs (RUN/run.json) nor records (*.json)")
        return found
    if not path.is_file():
        raise DinobenchError(
            f"no file or folder {path}: expected a run folder, a checkpoint, a record or a query like method=dino"
        )
    if path.suffix != ".json":
        return [read_checkpoint(path, output)]
    document = read_json(path)
    if isinstance(document, dict) and "schema_version" in document:
        return [_candidate(path, [_stored(path)], named=True)]
    return [read_record(path)]


def collect(folder: Path) -> list[Candidate]:
    """All runs below a folder and all records in it; JSON files that are something else are passed over."""
    records = [path for path in sorted(folder.glob("*.json")) if _is_record(read_json(path))]
    return [*map(read_run, list_runs(folder)), *map(read_record, records)]


def read_run(run: RunFolder) -> Candidate:
    """A run with the results of all its checkpoints."""
    results = [_stored(path) for path in sorted(run.path.glob("evals/*@*/*.json"))]
    return _candidate(run.path, results, recipe=run.recipe())


def read_checkpoint(path: Path, output: Path) -> Candidate:
    """A checkpoint file with its stored results, in its run folder or in `output`.

    Raises:
        DinobenchError: nothing was measured on it.
    """
    run = run_of_checkpoint(path)
    root, digest = run.path if run else output, sha256(path)[:HASH_DIGITS]
    results = [_stored(file) for file in sorted(root.glob(f"evals/*@*/{digest}*.json"))]
    if not results:
        raise DinobenchError(f"nothing was measured on {path}: `dinobench eval --suite NAME {path}` does")
    return _candidate(path, results, named=True, recipe=run.recipe() if run else None)


def read_record(path: Path) -> Candidate:
    """A committed record.

    Raises:
        DinobenchError: it is not one.
    """
    try:
        record = Record.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DinobenchError(f"{path} is neither a result nor a record: {where}: {first['msg'].lower()}") from error
    data = _fingerprints(record.receipt)
    scores = {
        suite: Score(suite, entry.suite_fingerprint, entry.headline, entry.scores, entry.interval, entry.n, data)
        for suite, entry in record.results.items()
    }
    facts = record.provenance
    if not all(isinstance(facts.get(name), int | None) for name in ("step", "images_seen")):
        raise DinobenchError(f"{path} was altered or damaged: its step or images_seen is no number; move it away")
    checkpoint = Checkpoint(facts.get("step") or 0, facts.get("images_seen") or 0, scores)
    return Candidate(path, _method(record), record.seed, facts, (checkpoint,), recorded=dict(record.curve))


def dig(values: Any, dotted: str) -> Any:
    """The value of a dotted key, None where there is none."""
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _method(record: Record) -> str:
    """The recipe's name, with what the command changed of it: under other settings it is another method."""
    changed = [word for word in shlex.split(record.command) if "=" in word and not word.startswith("-")]
    return " ".join([record.name, *changed])


def _is_record(document: Any) -> bool:
    return isinstance(document, dict) and {"name", "provenance", "receipt", "results"} <= set(document)


def _stored(path: Path) -> tuple[Result, Path]:
    """A result, and where its per-image values lie."""
    result = read_result(path)
    return result, path.parents[2] / "samples" / result.suite / f"{path.stem}.parquet"


def _candidate(
    source: Path, results: Sequence[tuple[Result, Path]], *, named: bool = False, recipe: dict[str, Any] | None = None
) -> Candidate:
    at: dict[int, Checkpoint] = {}
    facts: dict[str, Any] = {}
    # by step: last.pt and the kept file of the same step hold the same weights
    for result, samples in sorted(results, key=lambda pair: (pair[0].provenance.get("step") or 0, pair[0].created)):
        facts = result.provenance
        step = int(facts.get("step") or 0)
        score = _score(result, samples)
        checkpoint = at.setdefault(step, Checkpoint(step, int(facts.get("images_seen") or 0), {}))
        checkpoint.scores[score.suite] = score
    method = row_label(recipe or {}) or facts.get("method") or dig(recipe, "method.name") or facts.get("label")
    seed = facts.get("seed", dig(recipe, "seed"))
    name = str(method or source.stem)
    return Candidate(source, name, seed, facts, tuple(at.values()), named=named, recipe=recipe)


def _score(result: Result, samples: Path) -> Score:
    other = result.receipt.get("data")
    return Score(
        suite=f"{result.suite} on {other}" if other else result.suite,
        suite_fingerprint=result.suite_fingerprint,
        headline=result.headline,
        scores=result.scores,
        interval=result.interval,
        n=result.n,
        data=_fingerprints(result.receipt),
        samples=samples,
    )


def _fingerprints(receipt: dict[str, Any]) -> dict[str, str]:
    parts = receipt.get("dataset")
    if not isinstance(parts, dict):
        return {}
    return {role: str(part["fingerprint"]) for role, part in parts.items() if dig(part, "fingerprint")}
