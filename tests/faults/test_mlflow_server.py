"""MLflow away, silent, dying, coming back, locked or damaged: a training does not wait for it, nothing is doubled."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from breaking import Listener, run_of, start, tiny
from dinobench import mirror, tracking
from dinobench.addresses import TrackingUnavailable
from dinobench.mirror import Mirror

# mlflow and what it imports announce their own deprecations
pytestmark = pytest.mark.filterwarnings("ignore")

LOGGED = "evaluation.suites=[]"
LONGEST_GAP = 1.0
"""Seconds between two steps that MLflow may cost; a step takes a few hundredths."""
SLACK = 3.0
"""Machines that do other work beside are slower."""


class Gaps:
    """The longest time between two steps."""

    def __init__(self, pause: float = 0.0) -> None:
        self.longest, self._last, self._pause = 0.0, 0.0, pause

    def __call__(self, step: int) -> None:
        now = time.monotonic()
        if self._last:
            self.longest = max(self.longest, now - self._last)
        time.sleep(self._pause)
        self._last = time.monotonic()


@contextmanager
def black_hole(*, healthy: bool) -> Iterator[str]:
    """A server that accepts and never answers; with `healthy` it answers the first question, whether it is there."""
    listening, held = socket.create_server(("127.0.0.1", 0)), []

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            held.append(connection)
            if healthy and len(held) == 1:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK")

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(10)
        for connection in held:
            connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(uri: str, key: str) -> list[int]:
    """Steps of the points that MLflow has, as it stores them: one of a doubled pair is not left out."""
    store = tracking.connect(uri)
    run_id = store.find_pretraining(key)
    assert run_id is not None
    return [point.step for point in store.client.get_metric_history(run_id, "loss/total")]


@pytest.mark.promise("MLflow server refused", "no step waits a second; all points are in the journal; exit 0")
@pytest.mark.promise("MLflow server black-holed: accepts, never answers", "no step waits a second; exit 0")
@pytest.mark.parametrize("kind", ["refused", "black hole"])
def test_a_server_that_does_not_answer_costs_no_step(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[..., None]
) -> None:
    monkeypatch.setattr("dinobench.mirror.Mirror.close", lambda self, timeout=1.0: CLOSE(self, timeout))
    gaps = Gaps()
    listener = Listener(gaps)
    with black_hole(healthy=False) as hole:
        uri = hole if kind == "black hole" else f"http://127.0.0.1:{free_port()}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        summary = start(tiny(LOGGED), tmp_path, listener)
    assert summary.state.status == "finished" and not summary.state.mirrored
    assert gaps.longest < SLACK * LONGEST_GAP
    assert listener.warned("runs sync")
    assert len([point for point in summary.run.journal.read() if "loss/total" in point.metrics]) == 5
    figure(mlflow_away_longest_seconds_between_steps=round(gaps.longest, 3))


CLOSE = Mirror.close


@pytest.mark.faults
@pytest.mark.promise("MLflow server that dies after its first answer (black hole)", "no step waits a second for it")
def test_a_server_that_falls_silent_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[..., None]
) -> None:
    # MLflow is imported beside the training then, so the steps are watched for longer than that takes
    gaps = Gaps(pause=0.05)
    listener = Listener(gaps)
    with black_hole(healthy=True) as hole:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", hole)
        summary = start(tiny(LOGGED, "schedule.steps_per_epoch=150", "runtime.log_every=10"), tmp_path, listener)
    assert summary.state.status == "finished" and not summary.state.mirrored
    assert gaps.longest < SLACK * LONGEST_GAP
    figure(mlflow_silent_longest_seconds_between_steps=round(gaps.longest, 3))


class Server:
    """A real MLflow server whose store outlives it."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder, self._process = folder, None

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        files = ["--artifacts-destination", str(self._folder / "artifacts")]
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", *store, *files, *address]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=self._folder
        )
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(f"no MLflow server at {self.uri}")

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.faults
@pytest.mark.promise("MLflow server killed in mid-run, coming back before the end", "MLflow has every point, once")
@pytest.mark.promise("MLflow server killed in mid-run, coming back later", "`runs sync` brings every point, once")
def test_a_server_that_dies_and_comes_back_has_every_point_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(mirror, "FLUSH_POINTS", 1)
    monkeypatch.setattr(mirror, "FLUSH_SECONDS", 0.2)
    steps = list(range(1, 41))
    for back in ("before the end", "later"):
        server.start()
        run = run_of(tiny(LOGGED, f"seed={len(back)}"), tmp_path / "runs")
        said: list[str] = []
        follower = Mirror(run, server.uri, said.append)
        for step in steps:
            follower.log(run.journal.append({"loss/total": 1.0 / step}, step))
            if step == 10:
                deadline = time.monotonic() + 120
                while not (follower.links and 5 in _points(server.uri, run.state().key)):
                    assert time.monotonic() < deadline and not follower.failure, follower.failure
                    time.sleep(0.5)
            if step == 20:
                server.kill()
        if back == "before the end":
            deadline = time.monotonic() + 300
            while not follower.failure and time.monotonic() < deadline:
                time.sleep(0.5)  # it gives a dead server up after its retries
            server.start()
        run.update(status="finished")
        follower.finish("finished")
        assert follower.close(60 if server._process else 20) is (back == "before the end")
        assert any("out of reach" in text for text in said)
        if back == "later":
            server.start()
            mirror.sync(run, server.uri)
        mirror.sync(run, server.uri)  # and once more changes nothing
        assert losses(server.uri, run.state().key) == steps
        assert _status(server.uri, run.state().key) == "FINISHED"
        server.kill()


def _points(uri: str, key: str) -> list[int]:
    try:
        return losses(uri, key)
    except (AssertionError, TrackingUnavailable):
        return []


def _status(uri: str, key: str) -> str:
    store = tracking.connect(uri)
    return store.client.get_run(store.find_pretraining(key)).info.status


@pytest.mark.slow
@pytest.mark.promise("sqlite locked by another writer for seconds", "no step waits; every point is logged, once")
def test_a_database_locked_by_another_writer_gets_every_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[..., None]
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracking.connect(uri)
    gaps, locked = Gaps(), threading.Event()

    def hold() -> None:
        with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            locked.set()
            time.sleep(8)
            other.execute("ROLLBACK")

    holder = threading.Thread(target=hold)
    holder.start()
    assert locked.wait(30)
    summary = start(tiny(LOGGED), tmp_path / "runs", Listener(gaps))
    holder.join()
    assert summary.state.status == "finished"
    assert gaps.longest < SLACK * LONGEST_GAP
    if not summary.state.mirrored:
        mirror.sync(summary.run, uri)
    assert losses(uri, summary.state.key) == [2, 4, 6, 8, 10]
    figure(mlflow_locked_longest_seconds_between_steps=round(gaps.longest, 3))


@pytest.mark.slow
@pytest.mark.promise("a damaged database of MLflow, or one of another schema", "the run ends well and says which file")
@pytest.mark.parametrize("damage", ["garbage", "half", "empty", "other tables", "newer schema"])
def test_a_database_that_cannot_be_used_ends_no_training(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mlflow.db"
    if damage in ("half", "newer schema"):
        # of another name: MLflow looks at the schema below a name once
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'made.db'}")
        tracking.connect(f"sqlite:///{tmp_path / 'made.db'}")
        shutil.copy(tmp_path / "made.db", file)
    if damage == "garbage":
        file.write_bytes(b"SQLite format 3\0" + os.urandom(50_000))
    elif damage == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "empty":
        file.touch()
    else:
        with closing(sqlite3.connect(file, isolation_level=None)) as store:
            if damage == "other tables":
                store.execute("CREATE TABLE runs (a INTEGER)")
            else:
                store.execute("UPDATE alembic_version SET version_num = 'f00000000000'")
    before = file.read_bytes()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    listener = Listener()
    summary = start(tiny(LOGGED), tmp_path / "runs", listener)
    assert summary.state.status == "finished"
    if damage != "empty":  # MLflow makes its tables in an empty one
        assert not summary.state.mirrored
        assert any(str(file) in line and line.startswith("warning:") for line in listener.said)
        assert len(file.read_bytes()) >= len(before) // 2, "it is not ours to remove"


@pytest.mark.slow
@pytest.mark.promise("the clock is set back while MLflow follows a run", "its run has no negative duration")
def test_a_clock_that_goes_back_gives_no_negative_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = run_of(tiny(LOGGED), tmp_path / "runs")
    real = time.time
    for step, back in ((1, 0), (2, 3600), (3, 7200)):
        with monkeypatch.context() as clock:
            clock.setattr(time, "time", lambda back=back: real() - back)
            run.journal.append({"loss/total": 1.0}, step)
    run.update(status="finished")
    mirror.sync(run, uri)
    store = tracking.connect(uri)
    info: Any = store.client.get_run(store.find_pretraining(run.state().key)).info
    assert info.end_time >= info.start_time
