from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinobench.tables import runner
from dinobench.tables.cells import Cell, Cells
from dinobench.tables.definition import Table
from dinobench.tables.runner import ONE_THREAD, Job, run_local, submit
from dinobench.tables.worker import Workplace
from pretrain.errors import DinobenchError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*")


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / "runs", tmp_path / "results")


@pytest.fixture
def cells(tiny: Table, cells_of: Callable[..., Cells]) -> list[Cell]:
    """Six cells that differ in their seed."""
    first = cells_of(tiny).all[0]
    return [replace(first, seed=seed, science=f"{seed}") for seed in range(6)]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Workers that write a file per cell in place of training it: forked, so that they have what the test replaces."""
    import multiprocessing

    folder = tmp_path / "done"
    folder.mkdir()

    def run_cell(cell: Cell, place: Workplace, say: Callable[[str], None]) -> bool:
        if cell.seed == 1:
            raise DinobenchError("no images here")
        if cell.seed == 2:
            os._exit(9)
        if cell.seed == 3:
            return False
        if cell.seed == 4:
            raise ZeroDivisionError("one by nothing")
        say(f"seed {cell.seed} on {os.environ['OMP_NUM_THREADS']} thread")
        (folder / f"{cell.seed}-{os.getpid()}").touch()
        return True

    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(runner.multiprocessing, "get_context", lambda name: fork)
    monkeypatch.setattr(runner, "run_cell", run_cell)
    return folder


@pytest.mark.promise("a worker of the tables dies", "its cell is listed, the others go on")
@pytest.mark.parametrize("workers", [1, 3])
def test_a_cell_that_fails_or_takes_its_process_along_stops_no_other(
    workers: int, cells: list[Cell], place: Workplace, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    said: list[str] = []
    outcome = run_local(cells, place, workers, said.append)
    assert sorted(cell.seed for cell in outcome.done) == [0, 5]
    assert [cell.seed for cell in outcome.held] == [3]
    assert {cell.seed: reason for cell, reason in outcome.failed.items()} == {
        1: "no images here",
        2: "its process died (exit code 9)",
        4: "bug: ZeroDivisionError: one by nothing",
    }
    assert sorted(path.name[0] for path in work.iterdir()) == ["0", "5"]
    assert {"seed 0 on 1 thread", "seed 5 on 1 thread"} <= set(said)
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell has its background jobs ignore Ctrl-C, and so would the tests run by one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_workers_end_when_the_call_is_interrupted(
    cells: list[Cell], place: Workplace, work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = tmp_path / "started"

    def sleep(cell: Cell, place: Workplace, say: Callable[[str], None]) -> bool:
        started.touch()
        time.sleep(60)
        return True

    def interrupt() -> None:
        while not started.exists():
            time.sleep(0.01)
        time.sleep(0.5)  # a signal during the fork itself would be lost in Python's hooks; real workers are spawned
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner, "run_cell", sleep)
    threading.Thread(target=interrupt, daemon=True).start()
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_local(cells, place, 1, lambda text: None)
    assert time.monotonic() - before < 30
    assert not any(child.name == "dinobench-cell" for child in runner.multiprocessing.active_children())


def test_without_submitit_the_message_says_what_to_install(
    cells: list[Cell], place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(DinobenchError, match=r"dinobench\[slurm\]"):
        submit(cells, place, 2, {}, "slurm")


class FakeExecutor:
    """Stands for submitit's, as far as it is used."""

    def __init__(self, folder: Path, cluster: str) -> None:
        self.cluster, self.parameters = cluster, {}

    def update_parameters(self, **parameters: Any) -> None:
        if "slurm_partiton" in parameters:
            raise TypeError("unknown parameter slurm_partiton")
        self.parameters |= parameters

    def map_array(self, job: Any, cells: list[Cell]) -> list[Any]:
        return [(self.cluster, self.parameters, job, cell) for cell in cells]


def test_a_slurm_array_has_one_job_per_cell(
    cells: list[Cell], place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = type("Module", (), {"AutoExecutor": FakeExecutor})
    monkeypatch.setitem(sys.modules, "submitit", module)
    jobs = submit(cells, place, 3, {"slurm_partition": "gpu"}, "slurm")
    assert [cell for _, _, _, cell in jobs] == cells
    assert jobs[0][:2] == (
        "slurm",
        {"name": "dinobench-table", "slurm_array_parallelism": 3, "slurm_partition": "gpu"},
    )
    with pytest.raises(DinobenchError, match="slurm_partiton"):
        submit(cells, place, 3, {"slurm_partiton": "gpu"}, "slurm")


def test_a_job_of_a_cluster_runs_its_cell(
    cells: list[Cell], place: Workplace, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ONE_THREAD:
        monkeypatch.delenv(name, raising=False)
    assert (Job(place)(cells[0]), Job(place)(cells[3])) == ("done", "held")
    assert os.environ["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_submitit_runs_a_cell_that_is_done_already(
    tiny: Table, cells_of: Callable[..., Cells], write_record: Callable, tmp_path: Path
) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed (the extra `slurm`)")
    place = Workplace(tmp_path / "runs", tmp_path / "results")
    cell = cells_of(tiny).all[1]
    write_record(cell, {"digits_knn@1": {"top1": 90.0}})
    (job,) = submit([cell], place, 1, {"timeout_min": 5}, "local")
    assert job.result() == "done"
