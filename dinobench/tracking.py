"""MLflow, and the only file that imports it. It mirrors what lies in the run folders, so it may fail without harm.

    dinobench/pretrain             one run per pretraining: step metrics, and each headline metric at its training step
    dinobench/<dataset>-v<N>       comparable numbers only; per checkpoint one run and one LoggedModel with the
                                   headline metrics, below it one nested run per suite with all its scores
    dinobench/tables               one run per table and scale, with its files and links to the runs of its cells
leaderboard.py fills the second, tables/overview.py the third, housekeeping.py clears up after kills.
Metric names have exactly one slash (`knn/digits_top1`): the Chart tab makes its sections from what is before it.
Everything here can be repeated: what is already logged is found by its tags and left alone.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from dinobench import addresses
from dinobench.addresses import (
    TrackingUnavailable,
    as_unavailable,
    database_file,
    give_home,
    is_server,
    lock_file,
    masked,
    probe,
    tracking_uri,
    without_credentials,
)
from dinobench.files import make_folder
from dinobench.journal import Point

__all__ = [
    "Store",
    "TrackingUnavailable",
    "connect",
    "database_file",
    "is_server",
    "masked",
    "probe",
    "tracking_uri",
    "without_credentials",
]

PREFIX = "dinobench/"
PRETRAIN_EXPERIMENT = f"{PREFIX}pretrain"
TABLE_EXPERIMENT = f"{PREFIX}tables"
PRETRAIN_TEXT = (
    "One run per pretraining: curves by step, and the scores of its checkpoints in percent.\n\n"
    "Chart has a section for losses, one for health, one per suite. The experiments dinobench/<data set>-v<N> compare "
    "the checkpoints."
)
DEFAULTS = {
    # mlflow would report to its makers what it is used for
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # mlflow prints a link to stdout, which belongs to results
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
    # mlflow's own: 7 retries of 120 s, a dead server would hold a call for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
BATCH = 1000
"""Most metrics MLflow takes in one call."""
SOURCE = "dinobench"
"""What MLflow shows as the program; it would take the path of the interpreter's script."""
DIGEST_DIGITS = 12
"""Of a data set's fingerprint: pages show it in full, beside the name. The whole one is in the receipt."""
LOCK_SECONDS = 60.0
LONGEST_TEXT = 8000
"""Characters of a description; MLflow cuts it without a word."""


def connect(uri: str) -> Store:
    """A store that is there and has its tables.

    Raises:
        TrackingUnavailable: MLflow is absent, or its store cannot be reached.
    """
    probe(uri)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if file := database_file(uri):
        make_folder(file.parent)
    give_home()
    try:
        mlflow = importlib.import_module("mlflow")
    except ImportError as error:
        raise TrackingUnavailable(f"MLflow cannot be imported ({error}): pip install mlflow") from error
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with as_unavailable(uri):
        return Store(mlflow, uri)


class Store:
    """A tracking store. Every public method may raise TrackingUnavailable, except those that say otherwise.

    `client`, `entities` and `mlflow` are MLflow's own, for the files that know what they log.
    """

    def __init__(self, mlflow: Any, uri: str):
        self.uri = uri
        self.mlflow, self.entities = mlflow, importlib.import_module("mlflow.entities")
        self._experiments: dict[str, str] = {}
        self._lock = FileLock(lock_file(uri), timeout=LOCK_SECONDS)  # one object, so that blocks can be nested
        with self.lock():  # several processes that make one new database at once break it
            if (file := database_file(uri)) and not file.exists():
                _make_database(mlflow, file)
            mlflow.set_tracking_uri(uri)
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            self._pretrain = self.experiment(PRETRAIN_EXPERIMENT, PRETRAIN_TEXT)
            self._experiments.clear()  # it was not shown anything yet

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps find-or-make pairs of several processes of this machine apart."""
        with self._lock:
            yield

    def pretraining_run(
        self,
        key: str,
        name: str,
        params: dict[str, str],
        tags: dict[str, str],
        text: str,
        *,
        live: bool = True,
        began: float | None = None,
    ) -> str:
        """The id of the run with this key, made on the first call.

        Args:
            live: whether it trains now: one that is closed is set running again.
            began: time in seconds, where it began before it was logged.
        """
        with as_unavailable(self.uri), self.lock():
            self._experiments[PRETRAIN_EXPERIMENT] = self._pretrain
            if found := self.find(self._pretrain, {"dinobench.run": key}):
                if live:
                    self.client.update_run(found.info.run_id, status="RUNNING")
                for tag, value in tags.items():
                    if found.data.tags.get(tag, "") != value:  # moved, or continued on another machine
                        self.client.set_tag(found.info.run_id, tag, value)
                return found.info.run_id
            tags = {"dinobench.kind": "pretrain", "dinobench.run": key, **tags}
            return self.create(self._pretrain, name, params, tags, text, began)

    def find_pretraining(self, key: str) -> str | None:
        """The id of the pretraining with this key, if it was ever logged."""
        with as_unavailable(self.uri):
            found = self.find(self._pretrain, {"dinobench.run": key})
        return found.info.run_id if found else None

    def logged(self, run_id: str) -> set[tuple[str, int]]:
        """(metric, step) of every point that the run has: a point logged twice would be drawn twice."""
        with as_unavailable(self.uri):
            keys = self.client.get_run(run_id).data.metrics
            return {(key, m.step) for key in keys for m in self.client.get_metric_history(run_id, key)}

    def log_points(self, run_id: str, points: Sequence[Point], known: set[tuple[str, int]]) -> None:
        """Log the points that are not `known` and add them to it."""
        new = {
            (key, point.step): self.entities.Metric(key, value, int(point.time * 1000), point.step)
            for point in points
            for key, value in point.finite().items()
            if (key, point.step) not in known
        }
        metrics = list(new.values())
        with as_unavailable(self.uri):
            for start in range(0, len(metrics), BATCH):
                self.client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        known.update(new)

    def log_dataset(self, run_id: str, name: str, digest: str, context: str) -> None:
        """Fill the Dataset column of a run."""
        entities = self.entities
        dataset = entities.Dataset(
            name=name, digest=digest[:DIGEST_DIGITS], source_type="dinobench", source=f'{{"name": "{name}"}}'
        )
        tag = entities.InputTag("mlflow.data.context", context)
        inputs = [entities.DatasetInput(dataset, [tag])]
        with as_unavailable(self.uri), self.lock():  # two that enter a new data set at once: one of them fails
            try:
                self.client.log_inputs(run_id, inputs)
            except self.mlflow.exceptions.MlflowException:  # the other was on another machine
                self.client.log_inputs(run_id, inputs)

    def log_files(self, run_id: str, files: Iterable[Path], folder: str) -> None:
        """Copy files to the run's artifacts."""
        with as_unavailable(self.uri):
            for file in files:
                self.client.log_artifact(run_id, str(file), folder)

    def log_texts(self, run_id: str, texts: Mapping[str, str]) -> None:
        """Write artifacts, by their path."""
        with as_unavailable(self.uri):
            for path, text in texts.items():
                self.client.log_text(run_id, text, path)

    def describe(self, run_id: str, text: str) -> None:
        """Set the description; its first lines are what a visitor sees."""
        with as_unavailable(self.uri):
            self.client.set_tag(run_id, "mlflow.note.content", text[:LONGEST_TEXT])

    def finish(self, run_id: str, status: str, ended: float | None = None) -> None:
        """Close a run: FINISHED, FAILED or KILLED; at a time in seconds, or now. A run closed so is left as it is."""
        with as_unavailable(self.uri):
            run = self.client.get_run(run_id).info
            if run.status != status:
                end = round((ended or time.time()) * 1000)
                self.client.set_terminated(run_id, status, max(end, run.start_time))  # a clock may be set back

    def links(self, base: str, *, everything: bool = False) -> dict[str, str]:
        """Pages worth opening, below the address of a server: of what was logged here, or of all there is."""
        pages = {}
        for name, experiment in (self.experiments() if everything else self._experiments).items():
            short = name.removeprefix(PREFIX)
            if name == TABLE_EXPERIMENT:  # its runs hold files, no numbers to draw
                pages[short] = addresses.runs_page(base, experiment)
                continue
            pages[f"{short} charts"] = addresses.charts_page(base, experiment)
            if name != PRETRAIN_EXPERIMENT:
                pages[f"{short} models"] = addresses.models_page(base, experiment)
        return pages

    def run_page(self, base: str, run_id: str) -> str:
        """The page of one run."""
        with as_unavailable(self.uri):
            return addresses.run_page(base, self.client.get_run(run_id).info.experiment_id, run_id)

    def experiments(self) -> dict[str, str]:
        """Name -> id of all experiments of ours, the oldest first."""
        with as_unavailable(self.uri):
            found = self.client.search_experiments(filter_string=f"name LIKE '{PREFIX}%'")
        return {e.name: e.experiment_id for e in sorted(found, key=lambda e: int(e.experiment_id))}

    def experiment(self, name: str, description: str) -> str:
        """The id of an experiment, made on the first call."""
        if name not in self._experiments:
            found = self.client.get_experiment_by_name(name)
            if found and found.lifecycle_stage == "deleted":  # thrown away by hand: its name stays taken
                self.client.restore_experiment(found.experiment_id)
            self._experiments[name] = found.experiment_id if found else self._new_experiment(name, description)
        return self._experiments[name]

    def _new_experiment(self, name: str, description: str) -> str:
        try:
            return self.client.create_experiment(name, **self._place(description))
        except self.mlflow.exceptions.MlflowException:
            if found := self.client.get_experiment_by_name(name):  # another machine was faster
                return found.experiment_id
            raise

    def _place(self, description: str) -> dict[str, Any]:
        """Artifacts of a sqlite store lie beside it; MLflow would put them below the folder we are in."""
        file = database_file(self.uri)
        folder = {"artifact_location": (file.parent / "mlartifacts").absolute().as_uri()} if file else {}
        return {"tags": {"mlflow.note.content": description}, **folder}

    def find(self, experiment: str, tags: dict[str, str]) -> Any:
        """A run with these tags, or None."""
        return next(self.search([experiment], tags), None)

    def search(self, experiments: Sequence[str], tags: dict[str, str], more: str = "") -> Iterator[Any]:
        """All runs with these tags; `more` goes on with MLflow's query."""
        query = " and ".join([*(f"tags.`{key}` = '{value}'" for key, value in tags.items()), *([more] if more else [])])
        page = None
        while experiments:
            found = self.client.search_runs(list(experiments), filter_string=query, max_results=BATCH, page_token=page)
            yield from found
            page = found.token
            if not page:
                return

    def create(
        self,
        experiment: str,
        name: str,
        params: dict[str, str],
        tags: dict[str, str],
        text: str,
        began: float | None = None,
    ) -> str:
        """A new run; gives its id."""
        tags = {key: value for key, value in tags.items() if value != ""}
        tags |= {"mlflow.note.content": text[:LONGEST_TEXT], "mlflow.source.name": SOURCE}
        start = round(began * 1000) if began else None
        run_id = self.client.create_run(experiment, start_time=start, tags=tags, run_name=name).info.run_id
        self.client.log_batch(run_id, params=[self.entities.Param(key, value) for key, value in params.items()])
        return run_id


def _make_database(mlflow: Any, file: Path) -> None:
    """A database with all its tables, in place at once.

    MLflow makes them in many steps, and one that a kill left half made is refused for ever after.
    """
    unfinished = file.with_name(f"{file.name}.new")
    for part in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
        part.unlink(missing_ok=True)
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{unfinished.absolute()}").search_experiments(max_results=1)
    unfinished.replace(file)
