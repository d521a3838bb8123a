"""MLflow, and the only file that knows it. It mirrors what lies in the run folders, so it may fail without harm.

    dinobench/pretrain             one run per pretraining: step metrics, and each headline metric at its training step
    dinobench/<dataset>-v<N>       comparable numbers only; per checkpoint one run and one LoggedModel with the
                                   headline metrics, below it one nested run per suite with all its scores
Metric names have exactly one slash (`knn/digits_top1`): the Chart tab makes its sections from what is before it.
Everything here can be repeated: what is already logged is found by its tags and left alone.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from dinobench.files import make_folder
from dinobench.journal import Point
from pretrain.errors import DinobenchError

PRETRAIN_EXPERIMENT = "dinobench/pretrain"
DEFAULTS = {
    # mlflow prints a link to stdout, which belongs to results
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
    # mlflow's own: 7 retries of 120 s, a dead server would hold a call for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
BATCH = 1000
"""Most metrics MLflow takes in one call."""
DECIMALS = 3
"""Of a score: the model table shows a number in full."""


class TrackingUnavailable(DinobenchError):
    """MLflow is not installed, or its store cannot be reached."""


@dataclass(frozen=True)
class Entry:
    """A result as MLflow gets it. `tags` and `params` say what was measured, `files` are shown with the suite."""

    dataset: str
    dataset_digest: str
    version: int
    suite: str
    checkpoint: str
    """SHA-256 of the checkpoint."""
    name: str
    """<method>/ep<N>/s<seed>/<arch>: what differs first, the run table cuts names."""
    step: int
    metrics: dict[str, float]
    """All scores, under their MLflow names."""
    headline: str
    params: dict[str, str]
    tags: dict[str, str]
    description: str
    baselines: dict[str, float] = field(default_factory=dict)
    """Name of a baseline -> its headline score."""

    @property
    def experiment(self) -> str:
        return f"dinobench/{self.dataset}-v{self.version}"


def tracking_uri(output: Path) -> str:
    """MLFLOW_TRACKING_URI, or <output>/mlflow.db, absolute: MLflow's own default depends on the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(output / 'mlflow.db').absolute()}"


def masked(text: str) -> str:
    """Text with the passwords of its URLs hidden."""
    return re.sub(r"(://[^/\s:@]*):[^@\s/]+@", r"\1:***@", text)


def database_file(uri: str) -> Path | None:
    """The file of a sqlite store, or None."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def probe(uri: str, timeout: float = 3.0) -> None:
    """Ask a server whether it is there, before a call of the client could wait for it.

    Raises:
        TrackingUnavailable: it is not, or the store cannot be used.
    """
    if not uri.startswith(("http://", "https://")):
        return
    plain = re.sub(r"://[^/@]*@", "://", uri)
    try:
        urllib.request.urlopen(f"{plain.rstrip('/')}/health", timeout=timeout).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in is seen at the first call
    except (OSError, ValueError) as error:
        raise TrackingUnavailable(f"the MLflow server {masked(uri)} does not answer ({error})") from error


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
    try:
        mlflow = importlib.import_module("mlflow")
    except ImportError as error:
        raise TrackingUnavailable(f"MLflow cannot be imported ({error}): pip install mlflow") from error
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _as_unavailable(uri):
        return Store(mlflow, uri)


class Store:
    """A tracking store. Every method may raise TrackingUnavailable."""

    def __init__(self, mlflow: Any, uri: str):
        self.uri = uri
        self._mlflow, self._entities = mlflow, importlib.import_module("mlflow.entities")
        self._experiments: dict[str, str] = {}
        with self.lock():  # several processes that make one new database at once break it
            if (file := database_file(uri)) and not file.exists():
                _make_database(mlflow, file)
            mlflow.set_tracking_uri(uri)
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._experiment(PRETRAIN_EXPERIMENT, "Pretraining runs: curves by step; scores in percent at their step.")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps find-or-make pairs of several processes on one database apart."""
        file = database_file(self.uri)
        with FileLock(f"{file}.lock", timeout=60) if file else contextlib.nullcontext():
            yield

    def pretraining_run(self, key: str, name: str, params: dict[str, str], tags: dict[str, str], text: str) -> str:
        """The id of the run with this key, made on the first call; a finished one is set running again."""
        experiment = self._experiments[PRETRAIN_EXPERIMENT]
        with _as_unavailable(self.uri), self.lock():
            if found := self._find(experiment, {"dinobench.run": key}):
                self._client.update_run(found.info.run_id, status="RUNNING")
                return found.info.run_id
            tags = {"dinobench.kind": "pretrain", "dinobench.run": key, **tags}
            return self._create(experiment, name, params, tags, text)

    def find_pretraining(self, key: str) -> str | None:
        """The id of the pretraining with this key, if it was ever logged."""
        with _as_unavailable(self.uri):
            found = self._find(self._experiments[PRETRAIN_EXPERIMENT], {"dinobench.run": key})
        return found.info.run_id if found else None

    def logged(self, run_id: str) -> set[tuple[str, int]]:
        """(metric, step) of every point that the run has: a point logged twice would be drawn twice."""
        with _as_unavailable(self.uri):
            keys = self._client.get_run(run_id).data.metrics
            return {(key, m.step) for key in keys for m in self._client.get_metric_history(run_id, key)}

    def log_points(self, run_id: str, points: Sequence[Point], known: set[tuple[str, int]]) -> None:
        """Log the points that are not `known` and add them to it."""
        new = {
            (key, point.step): self._entities.Metric(key, value, int(point.time * 1000), point.step)
            for point in points
            for key, value in point.finite().items()
            if (key, point.step) not in known
        }
        metrics = list(new.values())
        with _as_unavailable(self.uri):
            for start in range(0, len(metrics), BATCH):
                self._client.log_batch(run_id, metrics=metrics[start : start + BATCH])
        known.update(new)

    def log_dataset(self, run_id: str, name: str, digest: str, context: str) -> None:
        """Fill the Dataset column of a run."""
        entities = self._entities
        dataset = entities.Dataset(
            name=name, digest=digest[:36], source_type="dinobench", source=f'{{"name": "{name}"}}'
        )
        tag = entities.InputTag("mlflow.data.context", context)
        with _as_unavailable(self.uri):
            self._client.log_inputs(run_id, [entities.DatasetInput(dataset, [tag])])

    def log_files(self, run_id: str, files: Iterable[Path], folder: str) -> None:
        """Copy files to the run's artifacts."""
        with _as_unavailable(self.uri):
            for file in files:
                self._client.log_artifact(run_id, str(file), folder)

    def describe(self, run_id: str, text: str) -> None:
        """Set the description; its first lines are what a visitor sees."""
        with _as_unavailable(self.uri):
            self._client.set_tag(run_id, "mlflow.note.content", text)

    def finish(self, run_id: str, status: str) -> None:
        """Close a run: FINISHED, FAILED or KILLED."""
        with _as_unavailable(self.uri):
            self._client.set_terminated(run_id, status)

    def log_result(self, entry: Entry, pretraining: str | None) -> None:
        """One suite on one checkpoint: run and LoggedModel of it, nested run of the suite, point of the curve."""
        text = f"{entry.dataset}, suites of version {entry.version}: one run per checkpoint, accuracies in percent."
        with _as_unavailable(self.uri), self.lock():
            experiment = self._experiment(entry.experiment, text)
            parent = self._checkpoint_run(experiment, entry, pretraining)
            self._suite_run(experiment, parent, entry, pretraining)
            for name, score in entry.baselines.items():
                self._baseline_run(experiment, entry, name, score)
            if pretraining:  # under the lock: the training and an evaluator may log the same point at once
                score = round(entry.metrics[entry.headline], DECIMALS)
                point = Point(entry.step, time.time(), {entry.headline: score})
                history = self._client.get_metric_history(pretraining, entry.headline)
                self.log_points(pretraining, [point], {(m.key, m.step) for m in history})

    def links(self, base: str) -> dict[str, str]:
        """Pages worth opening, below the address of a server. MLflow opens in its GenAI view without the last part."""
        with _as_unavailable(self.uri):
            found = self._client.search_experiments(filter_string="name LIKE 'dinobench/%'")
        pages = {}
        for experiment in sorted(found, key=lambda experiment: int(experiment.experiment_id)):
            name = experiment.name.partition("/")[2]
            page = f"{base}/#/experiments/{experiment.experiment_id}"
            pages[f"{name} charts"] = f"{page}/runs?compareRunsMode=CHART&workflowType=machine_learning"
            if experiment.name != PRETRAIN_EXPERIMENT:
                pages[f"{name} models"] = f"{page}/models?workflowType=machine_learning"
        return pages

    def _checkpoint_run(self, experiment: str, entry: Entry, pretraining: str | None) -> str:
        found = self._find(experiment, {"dinobench.kind": "checkpoint", "checkpoint.sha256": entry.checkpoint})
        if found:
            return found.info.run_id
        tags = {"dinobench.kind": "checkpoint", "checkpoint.sha256": entry.checkpoint, **entry.tags}
        if pretraining:
            tags["pretrain_run_id"] = pretraining
        run_id = self._create(experiment, entry.name, entry.params, tags, entry.description)
        self.log_dataset(run_id, entry.dataset, entry.dataset_digest, "eval")
        return run_id

    def _suite_run(self, experiment: str, parent: str, entry: Entry, pretraining: str | None) -> None:
        tags = {"mlflow.parentRunId": parent, "dinobench.suite": entry.suite}
        if found := self._find(experiment, tags):
            run_id = found.info.run_id
            if entry.headline in found.data.metrics:  # all is logged; a kill may have left the runs open
                return self._close(run_id, parent)
        else:
            name = f"{entry.suite} · {entry.name.partition('/')[0]}"
            run_id = self._create(experiment, name, {"suite": entry.suite}, {"dinobench.kind": "suite", **tags}, "")
            self.log_dataset(run_id, entry.dataset, entry.dataset_digest, "eval")
        model = self._logged_model(experiment, entry, pretraining, parent)
        if entry.headline not in self._client.get_run(parent).data.metrics:  # a kill may have come after it
            self._client.log_batch(parent, metrics=[self._score(entry, entry.headline, parent, model)])
        self._client.set_tag(parent, "mlflow.note.content", entry.description)
        self._client.log_batch(run_id, metrics=[self._score(entry, key, run_id) for key in entry.metrics])
        self._close(run_id, parent)

    def _close(self, *run_ids: str) -> None:
        for run_id in run_ids:
            if self._client.get_run(run_id).info.status != "FINISHED":
                self._client.set_terminated(run_id, "FINISHED")

    def _baseline_run(self, experiment: str, entry: Entry, name: str, score: float) -> None:
        """A run of its own for each baseline: a bar beside those of the checkpoints."""
        found = self._find(experiment, {"dinobench.kind": "baseline", "dinobench.baseline": name})
        if found and entry.headline in found.data.metrics:
            return self._close(found.info.run_id)
        tags = {"dinobench.kind": "baseline", "dinobench.baseline": name}
        run_id = found.info.run_id if found else self._create(experiment, name, {"method": name}, tags, "")
        if not found:
            self.log_dataset(run_id, entry.dataset, entry.dataset_digest, "eval")
        self._client.log_metric(run_id, entry.headline, round(score, DECIMALS), step=0)
        self._client.set_terminated(run_id, "FINISHED")

    def _score(self, entry: Entry, key: str, run_id: str, model: str | None = None) -> Any:
        dataset = {"dataset_name": entry.dataset, "dataset_digest": entry.dataset_digest[:36]} if model else {}
        now = int(time.time() * 1000)
        value = round(entry.metrics[key], DECIMALS)
        return self._entities.Metric(key, value, now, 0, model_id=model, run_id=run_id, **dataset)

    def _logged_model(self, experiment: str, entry: Entry, pretraining: str | None, parent: str) -> str:
        query = f"tags.`checkpoint.sha256` = '{entry.checkpoint}'"
        for model in self._client.search_logged_models([experiment], filter_string=query, max_results=1):
            return model.model_id
        model = self._mlflow.create_external_model(
            name=entry.name.replace("/", "-"),
            source_run_id=pretraining or parent,
            tags={"checkpoint.sha256": entry.checkpoint, **entry.tags},
            params=entry.params,
            model_type="ssl-backbone",
            experiment_id=experiment,
        )
        self._client.log_outputs(parent, [self._entities.LoggedModelOutput(model.model_id, step=entry.step)])
        return model.model_id

    def _experiment(self, name: str, description: str) -> str:
        if name not in self._experiments:
            found = self._client.get_experiment_by_name(name)
            self._experiments[name] = (
                found.experiment_id if found else self._client.create_experiment(name, **self._place(description))
            )
        return self._experiments[name]

    def _place(self, description: str) -> dict[str, Any]:
        """Artifacts of a sqlite store lie beside it; MLflow would put them below the folder we are in."""
        file = database_file(self.uri)
        folder = {"artifact_location": (file.parent / "mlartifacts").absolute().as_uri()} if file else {}
        return {"tags": {"mlflow.note.content": description}, **folder}

    def _find(self, experiment: str, tags: dict[str, str]) -> Any:
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self._client.search_runs([experiment], filter_string=query, max_results=1)
        return found[0] if found else None

    def _create(self, experiment: str, name: str, params: dict[str, str], tags: dict[str, str], text: str) -> str:
        tags = {**tags, "mlflow.note.content": text, "mlflow.source.name": "dinobench"}
        run_id = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
        self._client.log_batch(run_id, params=[self._entities.Param(key, value) for key, value in params.items()])
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


@contextlib.contextmanager
def _as_unavailable(uri: str) -> Iterator[None]:
    """Whatever goes wrong inside MLflow (its exceptions, those of requests, sqlalchemy, alembic) is one case to us."""
    try:
        yield
    except TrackingUnavailable:
        raise
    except Exception as error:
        reason = masked(" ".join(str(error).split()))[:300]
        raise TrackingUnavailable(f"MLflow store {masked(uri)}: {reason}") from error
