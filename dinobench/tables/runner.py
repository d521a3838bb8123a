"""Many cells at once: local processes with one thread each, or jobs of a SLURM array.

The processes are started anew (spawn) and get one cell after the other. One that dies takes its cell with it, no other.
When this process goes away they write a checkpoint and end; the same command continues them.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from dinobench.tables.cells import Cell
from dinobench.tables.worker import Interrupted, Workplace, run_cell
from pretrain.errors import DinobenchError

ONE_THREAD: dict[str, str] = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
PATIENCE_SECONDS = 120.0
"""For a worker to write a checkpoint after it was told to stop."""
Say = Callable[[str], None]


@dataclass
class Outcome:
    """How the cells of a call ended."""

    done: list[Cell] = field(default_factory=list)
    held: list[Cell] = field(default_factory=list)
    """Another process works on them."""
    failed: dict[Cell, str] = field(default_factory=dict)


@dataclass
class _Worker:
    process: BaseProcess
    channel: Connection
    cell: Cell | None = None


def run_local(cells: Sequence[Cell], place: Workplace, workers: int, say: Say) -> Outcome:
    """Run cells in `workers` processes; a cell that fails does not stop the others."""
    left, outcome, crew = deque(cells), Outcome(), []
    with _environment(ONE_THREAD):
        try:
            for _ in range(min(workers, len(left))):
                crew.append(_start(place))
                _assign(crew[-1], left)
            while busy := {worker.channel: worker for worker in crew if worker.cell is not None}:
                for channel in connection.wait(list(busy)):
                    worker = busy[channel]  # type: ignore[index]
                    if not _listen(worker, outcome, left, say) and left:
                        crew.append(_start(place))
                        _assign(crew[-1], left)
        finally:
            _dismiss(crew)
    return outcome


def submit(cells: Sequence[Cell], place: Workplace, parallel: int, options: dict[str, Any], cluster: str) -> list[Any]:
    """Submit one job per cell as an array; at most `parallel` at a time. Gives submitit's jobs, without waiting.

    Args:
        options: parameters of submitit's executor, like slurm_partition or timeout_min.
        cluster: "slurm"; "local" and "debug" are submitit's own, without a cluster.

    Raises:
        DinobenchError: submitit is not installed, finds no cluster, or does not know an option.
    """
    try:
        submitit = importlib.import_module("submitit")
    except ModuleNotFoundError as error:
        raise DinobenchError(
            "--executor slurm submits through submitit, which is not installed: "
            "`uv pip install 'dinobench[slurm]'`, or use --executor local"
        ) from error
    try:
        executor = submitit.AutoExecutor(folder=place.output / "slurm", cluster=cluster)
    except RuntimeError as error:
        raise DinobenchError(f"submitit finds no {cluster} here ({error}): use --executor local") from error
    if cluster == "slurm":
        options = {"slurm_array_parallelism": parallel, **options}
    try:
        executor.update_parameters(name="dinobench-table", **options)
    except (TypeError, NameError) as error:
        raise DinobenchError(f"submitit takes no such option: {error}") from error
    return executor.map_array(Job(place), cells)


@dataclass(frozen=True)
class Job:
    """A cell as a job of a cluster."""

    place: Workplace

    def __call__(self, cell: Cell) -> str:
        for name, value in ONE_THREAD.items():
            os.environ.setdefault(name, value)
        return "done" if run_cell(cell, self.place, print) else "held"

    def checkpoint(self, cell: Cell) -> Any:
        """What submitit submits again when the job runs out of time: the same; it goes on from its last checkpoint."""
        return importlib.import_module("submitit").helpers.DelayedSubmission(self, cell)


def _start(place: Workplace) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, place), name="dinobench-cell")
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _assign(worker: _Worker, left: deque[Cell]) -> None:
    worker.cell = left.popleft() if left else None
    with contextlib.suppress(OSError):  # it died: what it says next, nothing, tells so
        worker.channel.send(worker.cell)


def _listen(worker: _Worker, outcome: Outcome, left: deque[Cell], say: Say) -> bool:
    """Take one message of a worker; False when it is gone."""
    assert worker.cell is not None
    cell = worker.cell
    try:
        kind, text = worker.channel.recv()
    except (EOFError, OSError):
        worker.process.join()
        outcome.failed[cell] = f"its process died (exit code {worker.process.exitcode})"
        worker.cell = None
        return False
    if kind == "say":
        say(text)
        return True
    if kind == "done":
        outcome.done.append(cell)
        say(f"{len(outcome.done)} cells done, {len(left)} not begun")
    elif kind == "held":
        outcome.held.append(cell)
    else:
        outcome.failed[cell] = text
        say(f"{cell.command}: {text}")
    _assign(worker, left)
    return True


def _dismiss(crew: Sequence[_Worker]) -> None:
    """Let idle workers go, and have busy ones write a checkpoint."""
    for worker in crew:
        if worker.cell is not None and worker.process.is_alive():
            worker.process.terminate()
        worker.channel.close()
    for worker in crew:
        worker.process.join(PATIENCE_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(channel: Connection, place: Workplace) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def say(text: str) -> None:
        channel.send(("say", text))

    # the parent is gone, or told us to stop: the run folder has a checkpoint, there is nobody to report to
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt, Interrupted):
        while (cell := channel.recv()) is not None:
            channel.send(_attempt(cell, place, say))


def _attempt(cell: Cell, place: Workplace, say: Say) -> tuple[str, str]:
    try:
        return ("done" if run_cell(cell, place, say) else "held"), ""
    except DinobenchError as error:
        return "failed", str(error)
    except (Interrupted, OSError):
        raise
    except Exception as error:
        return "failed", f"bug: {type(error).__name__}: {error}"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes started meanwhile: torch reads them when it is imported."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
