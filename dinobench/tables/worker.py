"""One cell, from recipe to record. It may be killed anywhere: done again, it goes on from the last checkpoint.

A lock per cell, freed by the system when its process dies, keeps two workers from the same cell. The run folder carries
the key of the cell it was made for; one of another version of the code or of other images is left alone and a new one
begun. Once the record is written, nothing needs the run folder any more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from dinobench import train
from dinobench.evaluate import Evaluation, Failure, evaluate
from dinobench.files import make_folder, write_json
from dinobench.reporter import Reporter
from dinobench.results import Result
from dinobench.runs import RunFolder, find_run
from dinobench.tables.cells import Cell
from dinobench.tables.records import RecordStore
from pretrain.errors import DinobenchError

if TYPE_CHECKING:
    from pretrain.training.recipe import Recipe
    from suites.suite import Suite

CURVES = (
    "health/feature_std",
    "health/mean_target_entropy",
    "health/target_entropy",
    "patch/target_entropy",
    "loss/total",
    "prototypes/redundancy",
    "prototypes/unique",
    "prototypes/used",
)
CURVE_POINTS = 25
"""A record keeps about so many points of a curve."""
SHARED_RECEIPT = ("code", "dataset", "device", "feature", "packages", "precision", "seed", "transform")


@dataclass(frozen=True)
class Workplace:
    """Where cells are worked on."""

    output: Path
    """Run folders and locks; shared by all who work on the same cells."""
    records: Path
    track: bool = False
    """Whether the runs are logged to MLflow."""
    device: str = "auto"

    def lock(self, name: str) -> FileLock:
        return FileLock(make_folder(self.output / "locks") / f"{name}.lock")


class Interrupted(Exception):
    """The training was told to stop, and has written a checkpoint."""


def run_cell(cell: Cell, place: Workplace, say: Callable[[str], None]) -> bool:
    """Train, measure and record a cell; False when another process has it.

    Raises:
        Interrupted: by a signal.
        DinobenchError: the data is not here, the training failed, or a suite could not be measured.
    """
    lock = place.lock(cell.key)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        # read now: another process may have written it since the plan was made
        if not RecordStore(place.records).is_done(cell):
            content, baselines = _released(cell, place, say) if cell.released else _trained(cell, place, say)
            with place.lock("records"):
                path = RecordStore(place.records).save(cell, content, baselines)
            say(f"{cell.command}: {path}")
    finally:
        lock.release()
    return True


def _trained(cell: Cell, place: Workplace, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Any]]:
    started = time.monotonic()
    recipe = cell.recipe()
    tracking = recipe.tracking.model_copy(update={"enabled": place.track})
    runtime = recipe.runtime.model_copy(update={"device": place.device})
    changed: Recipe = recipe.model_copy(update={"tracking": tracking, "runtime": runtime})
    request = train.Request(
        output=place.output, command=cell.command, resume=True, new=_other_cell(recipe, place, cell), evaluate=False
    )
    reporter = Reporter(silent=True)
    _mark(find_run(changed, place.output, new=request.new), cell)
    summary = train.pretrain(changed, request, reporter)
    assert summary is not None, "cells are trained by one process"
    if summary.state.status != "finished":
        raise Interrupted(summary.state.note)
    checkpoint = summary.run.kept_checkpoints()[-1]
    results = _measure(checkpoint, cell, place, say)
    if place.track:
        _show(summary.run, place, say)
    beside = time.monotonic() - started - summary.state.seconds if summary.trained else None
    return _record(cell, results, summary.run, beside), _baselines(results)


def _show(run: RunFolder, place: Workplace, say: Callable[[str], None]) -> None:
    """Bring MLflow up to date; that it cannot be reached takes nothing from the cell."""
    from dinobench import mirror, tracking

    try:
        mirror.sync(run, tracking.tracking_uri(place.output))
    except tracking.TrackingUnavailable as error:
        say(f"{run.name}: not logged to MLflow ({error}); `dinobench runs sync {run.path}` logs it later")


def _released(cell: Cell, place: Workplace, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, Any]]:
    assert cell.checkpoint is not None
    results = _measure(cell.checkpoint, cell, place, say)
    if place.track:
        from dinobench import mirror, tracking

        try:
            mirror.sync_checkpoints(place.output, tracking.tracking_uri(place.output))
        except tracking.TrackingUnavailable as error:
            say(f"{cell.weights}: not logged to MLflow ({error})")
    return _record(cell, results, None, None), _baselines(results)


def _other_cell(recipe: Recipe, place: Workplace, cell: Cell) -> bool:
    """Whether the run folder of this recipe was made for another cell: other images, or another version of the code."""
    run = find_run(recipe, place.output)
    return run.exists and run.cell() not in (None, cell.key)


def _mark(run: RunFolder, cell: Cell) -> None:
    """Say in the run folder which cell it is made for."""
    write_json(run.cell_file, {"key": cell.key})


def _measure(checkpoint: Path, cell: Cell, place: Workplace, say: Callable[[str], None]) -> list[Result]:
    """The suites of a cell, those on its own data first."""
    from suites.suite import load_suite

    results: list[Result] = []
    failures: list[Failure] = []
    by_data: dict[str | None, list[Suite]] = {}
    for suite in [load_suite(name) for name in cell.suites]:
        # a suite that leaves its path open gets the one that the reader gave
        by_data.setdefault(dict(cell.uris).get((suite.dataset.name or "").rstrip(":")), []).append(suite)
    for data, suites in by_data.items():
        settings = Evaluation(output=place.output, data=data, device=place.device)
        done, failed = evaluate(checkpoint, suites, settings, say)
        results += done
        failures += failed
    if failures:
        raise DinobenchError("; ".join(f"{failure.suite} not measured: {failure.reason}" for failure in failures))
    return results


def _record(cell: Cell, results: Sequence[Result], run: RunFolder | None, beside: float | None) -> dict[str, Any]:
    """What is kept of a cell. All of it comes from the results and from the journal of the run."""
    state = run.state() if run else None
    receipt = {key: value for key, value in results[0].receipt.items() if key in SHARED_RECEIPT}
    record = {
        "name": cell.name,
        "seed": cell.seed,
        "steps": state.step if state else results[0].provenance.get("step"),
        "seconds": round(state.seconds, 1) if state else 0.0,
        "images_per_second": round(state.images_per_second, 1) if state else 0.0,
        "run": run.name if run else "",
        "command": cell.command,
        "cell": {"science": cell.science, "data": cell.data_fingerprint, "version": cell.version},
        "provenance": {**results[0].provenance, "path": _relative(Path(results[0].checkpoint), cell)},
        "receipt": receipt,
        "results": {result.suite: _scores(result, receipt) for result in results},
        **_journal(run),
    }
    return record if beside is None else {**record, "other_seconds": round(beside, 1)}


def _relative(checkpoint: Path, cell: Cell) -> str:
    """A path that says what the file is and nothing of the machine."""
    if cell.released:
        return checkpoint.name
    return "/".join(("runs", *checkpoint.parts[-3:]))


def _scores(result: Result, shared: dict[str, Any]) -> dict[str, Any]:
    """A result without what all results of the checkpoint have in common."""
    own = {key: value for key, value in result.receipt.items() if key in SHARED_RECEIPT and value != shared.get(key)}
    kept = {
        "suite_fingerprint": result.suite_fingerprint,
        "headline": result.headline,
        "scores": result.scores,
        "n": result.n,
        "interval": list(result.interval) if result.interval else None,
        "parameters": result.receipt.get("parameters"),
        "notes": result.notes,
        "created": result.created,
    }
    return {**kept, "receipt": own} if own else kept


def _journal(run: RunFolder | None) -> dict[str, Any]:
    """Thinned curves, the last logging interval, and the first steps that looked collapsed."""
    points = run.journal.read() if run else []
    last = points[-1].step if points else 0
    merged = {key: value for point in points if point.step == last for key, value in point.finite().items()}
    collapsed = [point.step for point in points if point.metrics.get("health/collapsed", 0.0) > 0]
    curves = {key: run.journal.curve(key) for key in CURVES} if run else {}
    return {
        "curve": {key: _thinned(*curve) for key, curve in curves.items() if curve[0]},
        "last_interval": {key: round(value, 5) for key, value in sorted(merged.items())},
        "collapse": collapsed[:3],
    }


def _thinned(steps: Sequence[int], values: Sequence[float]) -> list[list[float | None]]:
    points = list(dict(zip(steps, values, strict=True)).items())  # a kept checkpoint logs its step once more
    every = math.ceil(len(points) / CURVE_POINTS)
    return [[step, round(value, 4) if math.isfinite(value) else None] for step, value in points[::every]]


def _baselines(results: Sequence[Result]) -> dict[str, Any]:
    return {result.suite: result.baselines for result in results}
