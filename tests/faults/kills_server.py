"""A process that has imported everything and forks a child per command: a start costs milliseconds, not seconds.

    python kills_server.py                     a JSON request per line on stdin, two JSON answers to each on stdout
    {"arguments": [...], "folder": "...", "environment": {...}, "out": "file", "err": "file", "events": "pipe"}
    -> {"process": 123}, then, when it has ended, {"exit": -9}

The child runs the console command in its main thread, as the installed script does. Nothing is touched before the fork
(no store, no data set, no thread), so it is what a process that has just finished its imports is. It tells about its
files as they are opened for writing, renamed and removed, through a pipe: `<monotonic seconds> <event> <path>`, so that
a test can kill it in the middle of a write. The telling waits for nobody.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import sys
import threading
import time
from typing import Any

MODULES = (
    "torch",
    "torchvision",
    "timm",
    "sklearn.datasets",
    "sklearn.decomposition",
    "sklearn.linear_model",
    "matplotlib.pyplot",
    "pandas",
    "pyarrow.parquet",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "dinobench.cli.app",
    "dinobench.train",
    "dinobench.reporter",
    "dinobench.housekeeping",
    "dinobench.tables.overview",
    "dinobench.tables.runner",
    "dinobench.tables.writing",
    "pretrain.methods.dino_vmf",
    "pretrain.training.loop",
    "suites.measure",
    "suites.protocols.knn",
    "suites.protocols.prototypes",
)
"""Imported before the first fork; what is missing here is only imported later."""
EVENTS = {"open": 0, "os.rename": 1, "os.remove": 0, "os.link": 1, "sqlite3.connect": 0}
"""Audit event of Python -> which of its arguments is the path."""
WRITING = os.O_WRONLY | os.O_RDWR


def serve() -> None:
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a child that collects garbage would copy every page
    assert threading.active_count() == 1, threading.enumerate()
    requests = os.fdopen(os.dup(0), "r")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    _answer(ready=True)
    while line := requests.readline():
        process = os.fork()
        if process == 0:
            requests.detach()
            _become(json.loads(line))
        _answer(process=process)
        _, status = os.waitpid(process, 0)
        _answer(exit=os.waitstatus_to_exitcode(status))
    os._exit(0)


def tell_events(pipe: str) -> None:
    """From now on tell about files through a pipe that someone reads."""
    channel = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or (event == "open" and not (arguments[2] or 0) & WRITING):
            return
        path = arguments[EVENTS[event]]
        if isinstance(path, (str, os.PathLike)):
            try:
                os.write(channel, f"{time.monotonic():.6f} {event} {os.fspath(path)}\n".encode())
            except OSError:  # nobody reads any more, or too slowly
                pass

    sys.addaudithook(hook)


def _answer(**answer: Any) -> None:
    os.write(1, (json.dumps(answer) + "\n").encode())


def _become(request: dict[str, Any]) -> None:
    """Run the command of a request in this process, to its end."""
    os.setsid()  # its workers can be found by its number
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tell_events(request["events"])
    # Workers of tables are forked too, while this process has one thread: their imports are done.
    forking = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forking  # type: ignore[assignment]
    sys.argv = ["dinobench", *request["arguments"]]
    _end(importlib.import_module("dinobench.cli.app").run(sys.argv[1:]))


def _end(code: int) -> None:
    """As Python ends, but for tearing down every module, which takes longer than the command."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
