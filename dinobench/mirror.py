"""Keeps MLflow in step with a run folder, from a thread of its own: training neither waits for it nor fails with it.

metrics.jsonl and evals/ are the truth, so the mirror keeps no journal of its own: when the store cannot be reached it
says so once, loudly, and drops what comes; `dinobench runs sync RUN` logs what is missing, and nothing twice.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinobench import tracking
from dinobench.entries import recipe_parameters, result_entry, row_label, run_description, run_name
from dinobench.journal import Point
from dinobench.results import Result, ResultStore
from dinobench.runs import RunFolder, describe_status
from dinobench.tracking import Store, TrackingUnavailable

FLUSH_POINTS = 50
FLUSH_SECONDS = 10.0
CAPACITY = 10_000
"""Most items that wait for the store; what comes on top is dropped here and replayed from metrics.jsonl at the end."""
MLFLOW_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "killed": "KILLED", "running": "RUNNING"}
"""Any other status of ours is FAILED."""


@dataclass(frozen=True)
class _Finish:
    status: str


@dataclass(frozen=True)
class _Tick:
    """Nothing came for a while: time to flush."""


class Mirror:
    """Takes points and results and logs them in the background. No method of it raises, waits long or blocks."""

    def __init__(self, run: RunFolder, uri: str, warn: Callable[[str], None]):
        self.run, self.uri, self._warn = run, uri, warn
        self.failure: str | None = None
        self.links: dict[str, str] = {}
        self._gaps = False
        self._queue: queue.Queue[Point | Result | _Finish | None] = queue.Queue(CAPACITY)
        self._connected = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Wait for the connection.

        Raises:
            TrackingUnavailable: there is none, and tracking.require asks for one.
        """
        self._connected.wait()
        if self.failure:
            raise TrackingUnavailable(f"{self.failure}. tracking.require=true stops here; leave it out to train anyway")

    def log(self, point: Point) -> None:
        self._put(point)

    def result(self, result: Result) -> None:
        self._put(result)

    def finish(self, status: str) -> None:
        """The training ended; results may follow."""
        self._put(_Finish(status))

    def close(self, timeout: float = 60.0) -> bool:
        """Wait for the rest, at most `timeout` seconds; what could not be logged is tried once more.

        Returns:
            Whether MLflow now shows all that the run folder holds.
        """
        deadline = time.monotonic() + timeout
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=timeout)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if not self._thread.is_alive() and (self.failure or self._gaps):
            # a server that was away for a while: replay, in a thread so that a black hole cannot hold us
            self._thread = threading.Thread(target=self._replay, name="mlflow-replay", daemon=True)
            self._thread.start()
            self._thread.join(max(1.0, deadline - time.monotonic()))
        complete = not self._thread.is_alive() and not self.failure
        if not complete:
            self._warn(
                f"MLflow does not show all of this run ({self.failure or 'the store is slow'}). Nothing is lost: "
                f"when it is back, run `dinobench runs sync {self.run.path}`"
            )
        return complete

    def _put(self, item: Point | Result | _Finish) -> None:
        if self.failure:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._gaps = True

    def _work(self) -> None:
        try:
            store = tracking.connect(self.uri)
            run_id = open_pretraining(store, self.run)
            known = store.logged(run_id)
            store.log_points(run_id, self.run.journal.read(), known)
            self.links = store.links("")
            self._connected.set()
            self._serve(store, run_id, known)
        except Exception as error:  # whatever it is, the training goes on
            self.failure = str(error) or type(error).__name__
            self._warn(
                f"MLflow is out of reach: {self.failure}. The run goes on and keeps everything in {self.run.path}; "
                f"`dinobench runs sync {self.run.path}` logs it later"
            )
        finally:
            self._connected.set()

    def _serve(self, store: Store, run_id: str, known: set[tuple[str, int]]) -> None:
        waiting: list[Point] = []
        flushed = time.monotonic()
        while True:
            try:
                item: Point | Result | _Finish | _Tick | None = self._queue.get(timeout=FLUSH_SECONDS)
            except queue.Empty:
                item = _Tick()
            if isinstance(item, Point):
                waiting.append(item)
            due = time.monotonic() - flushed >= FLUSH_SECONDS or len(waiting) >= FLUSH_POINTS
            if due or not isinstance(item, Point):
                store.log_points(run_id, waiting, known)
                waiting, flushed = [], time.monotonic()
            if isinstance(item, Result):
                log_result(store, self.run, item, run_id)
            elif isinstance(item, _Finish):
                close_pretraining(store, self.run, run_id, item.status)
            elif item is None:
                store.describe(run_id, run_description(self.run, ResultStore(self.run.path).all()))
                store.log_files(run_id, sorted(self.run.figures.glob("*.png")), "figures")
                self.links = store.links("")
                return

    def _replay(self) -> None:
        try:
            self.links = sync(self.run, self.uri)
            self.failure, self._gaps = None, False
        except Exception as error:
            self.failure = str(error) or type(error).__name__


def open_pretraining(store: Store, run: RunFolder) -> str:
    """The MLflow run of a run folder, made on the first call and continued on a later one."""
    recipe = run.recipe()
    params = recipe_parameters(recipe)
    arch = run.name.removeprefix(f"{params['method']}-").partition("-s")[0]
    row = row_label(recipe)
    tags = {
        "method": params["method"],
        "row": row,
        "data.train": params.get("train_data", ""),
        "run.folder": str(run.path.absolute()),
    }
    key = run.state().key
    new = store.find_pretraining(key) is None
    name = run_name(row or params["method"], params.get("seed", 0), arch)
    run_id = store.pretraining_run(key, name, params, tags, run_description(run, []))
    if new:
        store.log_dataset(run_id, params.get("train_data", "data"), "unknown", "train")
        files = [run.recipe_file, run.path / "environment.json"]
        store.log_files(run_id, [file for file in files if file.is_file()], "config")
    return run_id


def close_pretraining(store: Store, run: RunFolder, run_id: str, status: str) -> None:
    """Give the MLflow run its final status."""
    store.finish(run_id, MLFLOW_STATUS.get(status, "FAILED"))


def log_result(store: Store, run: RunFolder | None, result: Result, pretraining: str | None) -> None:
    """Log one result, from a run folder or of a lone checkpoint."""
    siblings: list[Result] = [result]
    recipe = None
    if run is not None:
        recipe = run.recipe()
        digest = result.provenance["sha256"]
        siblings = [other for other in ResultStore(run.path).all() if other.provenance["sha256"] == digest]
    store.log_result(result_entry(result, siblings, recipe), pretraining)


def log_figures(run: RunFolder, uri: str, files: Sequence[Path]) -> bool:
    """Copy files to the figures of a run; False when MLflow does not have the run yet.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    store = tracking.connect(uri)
    run_id = store.find_pretraining(run.state().key)
    if run_id is not None:
        store.log_files(run_id, files, "figures")
    return run_id is not None


def sync(run: RunFolder, uri: str) -> dict[str, str]:
    """Log whatever of a run MLflow lacks. Running it twice changes nothing.

    Returns:
        The pages that show it, by experiment, without the address of the server.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    status = describe_status(run)
    store = tracking.connect(uri)
    run_id = open_pretraining(store, run)
    store.log_points(run_id, run.journal.read(), store.logged(run_id))
    results = ResultStore(run.path).all()
    for result in results:
        log_result(store, run, result, run_id)
    store.describe(run_id, run_description(run, results))
    store.log_files(run_id, sorted(run.figures.glob("*.png")), "figures")
    if status != "running":
        close_pretraining(store, run, run_id, status)
    return store.links("")
