"""Keeps MLflow in step with a run folder, from a thread of its own: training neither waits for it nor fails with it.

metrics.jsonl and evals/ are the truth, so the mirror keeps no journal of its own: when the store cannot be reached it
says so once, loudly, and drops what comes; `dinobench runs sync` logs what is missing, and nothing twice.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinobench import leaderboard, tracking
from dinobench.addresses import masked
from dinobench.entries import as_its_own, recipe_parameters, result_entry, row_label, run_description, run_name
from dinobench.journal import Point
from dinobench.loading import loading_of
from dinobench.results import Result, ResultStore
from dinobench.runs import RunFolder, describe_status
from dinobench.tracking import Store, TrackingUnavailable
from pretrain.errors import DinobenchError

FLUSH_POINTS = 50
FLUSH_SECONDS = 10.0
CAPACITY = 10_000
"""Most items that wait for the store; what comes on top is dropped here and replayed from metrics.jsonl at the end."""
MLFLOW_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "killed": "KILLED", "running": "RUNNING"}
"""Any other status of ours is FAILED."""
CELL_TAG = "dinobench.cell"
"""On a pretraining: the cell of a table that it was made for."""
FOLDER_TAG, HOST_TAG = "run.folder", "run.host"
"""Where the truth about a pretraining lies; a path says nothing on another machine."""
LARGEST_TABLE = 100_000
"""Rows of a table that is copied to MLflow; larger ones stay beside the result."""


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
            self.links = pages(store, run_id)
            self._connected.set()
            self._serve(store, run_id, known)
        except Exception as error:  # whatever it is, the training goes on
            self.failure = masked(str(error)) or type(error).__name__
            self._forget()
            self._warn(
                f"MLflow is out of reach: {self.failure}. The run goes on and keeps everything in {self.run.path}; "
                f"`dinobench runs sync {self.run.path}` logs it later"
            )
        finally:
            self._connected.set()

    def _forget(self) -> None:
        """Drop what waits; it is in the run folder."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

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
                if waiting:  # points come by their steps, so what lies before these cannot come again
                    known.difference_update([entry for entry in known if entry[1] < waiting[-1].step])
                waiting, flushed = [], time.monotonic()
            if isinstance(item, Result):
                log_result(store, self.run.path, item, self.run)
            elif isinstance(item, _Finish):
                close_pretraining(store, run_id, item.status)
            elif item is None:
                store.describe(run_id, run_description(self.run, ResultStore(self.run.path).all()))
                store.log_files(run_id, sorted(self.run.figures.glob("*.png")), "figures")
                self.links = pages(store, run_id)
                return

    def _replay(self) -> None:
        try:
            self.links = sync(self.run, self.uri)
            self.failure, self._gaps = None, False
        except Exception as error:
            self.failure = masked(str(error)) or type(error).__name__


def open_pretraining(store: Store, run: RunFolder, *, live: bool = True) -> str:
    """The MLflow run of a run folder, made on the first call and continued on a later one.

    Args:
        live: whether it trains now; else one that is closed stays closed.
    """
    recipe = run.recipe()
    params = recipe_parameters(recipe)
    arch = run.name.removeprefix(f"{params['method']}-").partition("-s")[0]
    row = row_label(recipe)
    tags = {
        "method": params["method"],
        "row": row,
        "data.train": params.get("train_data", ""),
        FOLDER_TAG: str(run.path.absolute()),
        HOST_TAG: socket.gethostname(),
    }
    if cell := run.cell():
        tags[CELL_TAG] = cell
    key = run.state().key
    new = store.find_pretraining(key) is None
    name = run_name(row or params["method"], params.get("seed", 0), arch)
    began = next((point.time for point in run.journal.read()), None) if new else None
    run_id = store.pretraining_run(key, name, params, tags, run_description(run, []), live=live, began=began)
    if new:
        store.log_dataset(run_id, params.get("train_data", "data"), training_images(recipe), "train")
        files = [run.recipe_file, run.path / "environment.json"]
        store.log_files(run_id, [file for file in files if file.is_file()], "config")
    return run_id


def training_images(recipe: dict[str, Any]) -> str:
    """Fingerprint of the images a run was trained on, where it is found at once: folders may hold millions of files."""
    from pretrain.data.datasets import open_dataset

    data = recipe["data"]
    try:
        return "unknown" if ":" in data["name"] else open_dataset(data["name"], data["split"]).fingerprint
    except (DinobenchError, KeyError):
        return "unknown"


def close_pretraining(store: Store, run_id: str, status: str, ended: float | None = None) -> None:
    """Give the MLflow run its final status, in our words; at a time in seconds, or now."""
    store.finish(run_id, MLFLOW_STATUS.get(status, "FAILED"), ended)


def log_result(store: Store, root: Path, result: Result, run: RunFolder | None = None) -> None:
    """Log one result.

    Args:
        root: the folder of its store without the label of another network, a run folder or an output folder.
        run: whose checkpoint it was measured on.
    """
    label = loading_of(result).label
    results = ResultStore(root / label)
    digest = result.provenance["sha256"]
    siblings = [other for other in results.all() if other.provenance["sha256"] == digest] or [result]
    tables = {name: table for name, table in results.tables(result).items() if len(table) <= LARGEST_TABLE}
    # the curves of a run are those of its teacher; asked for each time: a run that is watched may enter MLflow late
    pretraining = store.find_pretraining(run.state().key) if run and not label else None
    entry = result_entry(as_its_own(result), siblings, run.recipe() if run else None, tables)
    recipe = run.recipe_file.read_text(encoding="utf-8") if run else ""
    leaderboard.log_result(store, replace(entry, recipe=recipe), pretraining)


def pages(store: Store, run_id: str | None) -> dict[str, str]:
    """Pages of what this process logged, below the address of the server; that of the run first."""
    own = {"run page": store.run_page("", run_id)} if run_id else {}
    return own | store.links("")


def log_figures(run: RunFolder, uri: str, files: Sequence[Path]) -> dict[str, str]:
    """Copy files to the figures of a run; its page, or nothing when MLflow does not have the run yet.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    store = tracking.connect(uri)
    run_id = store.find_pretraining(run.state().key)
    if run_id is None:
        return {}
    store.log_files(run_id, files, "figures")
    return pages(store, run_id)


def sync(run: RunFolder, uri: str) -> dict[str, str]:
    """Log whatever of a run MLflow lacks. Running it twice changes nothing.

    Returns:
        The pages that show it, without the address of the server.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    status = describe_status(run)
    store = tracking.connect(uri)
    run_id = open_pretraining(store, run, live=status == "running")
    points = run.journal.read()
    store.log_points(run_id, points, store.logged(run_id))
    for result in stored_results(run.path):
        log_result(store, run.path, result, run)
    store.describe(run_id, run_description(run, ResultStore(run.path).all()))
    store.log_files(run_id, sorted(run.figures.glob("*.png")), "figures")
    if status != "running":
        close_pretraining(store, run_id, status, max((point.time for point in points), default=None))
        with contextlib.suppress(DinobenchError):  # of someone else, we may only read it
            run.update(mirrored=True)
    return pages(store, run_id)


def sync_checkpoints(output: Path, uri: str) -> tuple[int, dict[str, str]]:
    """Log the results of checkpoints outside run folders.

    Returns:
        How many results there are, and the pages that show them.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    results = stored_results(output)
    if not results:
        return 0, {}
    store = tracking.connect(uri)
    for result in results:
        log_result(store, output, result)
    return len(results), pages(store, None)


def stored_results(root: Path) -> list[Result]:
    """The results below a folder, then those of other networks of its checkpoints."""
    labelled = [path.parent for path in sorted(root.glob("*/evals")) if not RunFolder(path.parent).exists]
    return [result for folder in (root, *labelled) for result in ResultStore(folder).all()]
