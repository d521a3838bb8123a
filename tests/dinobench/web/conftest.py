"""A real MLflow server on loopback with a small benchmark, and a browser to look at it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dinobench import plots, tracking
from dinobench.files import write_json
from dinobench.runs import RunFolder
from dinobench.tables.cells import Inputs, collect
from dinobench.tables.contents import fill
from dinobench.tables.definition import load_table
from dinobench.tables.overview import log_tables
from dinobench.tables.records import RecordStore
from dinobench.tables.writing import write_table

START_SECONDS = 300.0
COMMAND_SECONDS = 600.0
"""Generous: a machine that is busy with other work is no failure."""
DEFINITIONS = Path(__file__).parents[1] / "tables" / "definitions"
DINOBENCH = (sys.executable, "-c", "from dinobench.cli.app import main; main()")


@dataclass
class Benchmark:
    """Runs that a server shows, and what the commands that logged them printed."""

    server: str
    output: Path
    runs: dict[str, RunFolder]
    printed: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """One REST call, without MLflow's client."""
        request = urllib.request.Request(
            f"{self.server}/api/2.0/mlflow/{path}",
            data=json.dumps(body).encode() if method == "POST" else None,
            headers={"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def experiments(self) -> dict[str, dict[str, Any]]:
        found = self.ask("POST", "experiments/search", max_results=100)["experiments"]
        return {each["name"]: each for each in found}

    def runs_of(self, experiment: str, query: str = "") -> dict[str, dict[str, Any]]:
        """Name -> run, names being unique here."""
        number = self.experiments()[experiment]["experiment_id"]
        found = self.ask("POST", "runs/search", experiment_ids=[number], filter=query, max_results=1000).get("runs", [])
        named = {each["info"]["run_name"]: each for each in found}
        assert len(named) == len(found)
        return named


@contextlib.contextmanager
def serve(folder: Path, *options: str, **settings: str) -> Iterator[str]:
    """An MLflow server with its store in a folder, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts"), *options]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **settings}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "server.log").open("w") as log:
        # a group of its own: the server is a process below the command
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait(server, address, folder / "server.log")
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait(server: subprocess.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
            return
        time.sleep(0.3)
    pytest.fail(f"the MLflow server does not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    return serve


def call(*arguments: str, **settings: str) -> subprocess.Popen[str]:
    """Start a command line, as a user does."""
    return subprocess.Popen(
        [*DINOBENCH, *arguments],
        env={**os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": "120", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


@pytest.fixture(scope="session")
def dinobench() -> Callable[..., tuple[int, str]]:
    """Runs a command line to its end: exit code and everything it printed."""

    def run(*arguments: str, **settings: str) -> tuple[int, str]:
        process = call(*arguments, **settings)
        printed, _ = process.communicate(timeout=COMMAND_SECONDS)
        return process.returncode, printed

    return run


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory: pytest.TempPathFactory, measurer_in: Callable[[Path], Any]) -> Iterator[Benchmark]:
    """DINO with two seeds and DINO-vMF, logged by a process each at the same time, and a table of one of them."""
    folder = tmp_path_factory.mktemp("web")
    measurer = measurer_in(folder / "runs")
    runs = {
        "dino/s0": measurer.run("dino", 0, 80.0),
        "dino/s1": measurer.run("dino", 1, 82.0),
        "dino_vmf/s2": measurer.run("dino_vmf", 2, 87.5),
    }
    for run in runs.values():
        plots.draw_curves(run.journal, run.figures)
    table = load_table("tiny", DEFINITIONS)
    cells = collect([table], "digits", Inputs(seeds=(0,)))
    write_json(runs["dino/s0"].cell_file, {"key": cells.of("tiny", "DINO")[0].key})
    with serve(folder) as server:
        shown = Benchmark(server, measurer.output, runs)
        writers = [call("runs", "sync", str(run.path), MLFLOW_TRACKING_URI=server) for run in runs.values()]
        shown.printed = [writer.communicate(timeout=COMMAND_SECONDS)[0] for writer in writers]
        assert [writer.returncode for writer in writers] == [0, 0, 0], shown.printed
        contents = fill(table, cells, RecordStore(folder / "results"))
        write_table(contents, folder / "tables")
        log_tables(tracking.connect(server), [contents], cells, folder / "tables")
        yield shown


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of pages are kept: a folder that DINOBENCH_TEST_ARTIFACTS names, or a temporary one."""
    chosen = os.environ.get("DINOBENCH_TEST_ARTIFACTS")
    folder = Path(chosen) if chosen else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium, with logs of its console and of its requests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (dependency group dev)")
    from selenium.webdriver.chrome.service import Service

    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(programs):
        pytest.skip("needs chromium and chromedriver on the path (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    profile = tmp_path_factory.mktemp("profile")
    for option in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "window-size=2200,1300",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()
