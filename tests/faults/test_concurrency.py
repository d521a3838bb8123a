"""Many processes, one store, one cache, one folder of runs: nobody stops, nothing is lost, nothing is done twice."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from dinobench import runs, train
from dinobench.reporter import Reporter
from dinobench.results import ResultStore
from dinobench.runs import RunFolder, list_runs
from dinobench.train import Request
from pretrain.errors import DinobenchError
from pretrain.training.meter import Progress
from pretrain.training.recipe import Recipe, resolve
from suites.cache import FeatureCache, content_key
from suites.rows import RowFile

# of MLflow and SQLAlchemy
pytestmark = pytest.mark.filterwarnings("ignore")
PROCESSES = 8
TINY = [
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "optim.batch_size=64",
    "head.hidden=16",
    "head.bottleneck=16",
    "model.kwargs={img_size: 16, patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}",
    "runtime.device=cpu",
    "runtime.log_every=2",
    "checkpoint.every_epochs=1",
    "evaluation.suites=[digits_knn]",
]
PATIENCE = 400
"""Seconds for all processes of a test; a machine may be busy with others."""


def command(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """A process that runs a command of dinobench, its stdout and stderr in files."""
    from dinobench.cli import app

    os.environ.update(environment)  # those of the test, not of the server that it was forked from
    sys.argv = ["dinobench", *arguments]
    torch.set_num_threads(1)
    with (
        Path(f"{log}.out").open("w") as out,
        Path(f"{log}.err").open("w", buffering=1) as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = app.run(arguments)
    os._exit(code)


class Machine:
    """Starts commands at once, in processes forked from one that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "runs"
        folder.mkdir(exist_ok=True)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["dinobench.cli.app", "dinobench.train", "suites.measure", "mlflow"])
        self._started: list[tuple[BaseProcess, Path]] = []

    def start(self, *arguments: str, target: Callable[..., None] = command) -> tuple[BaseProcess, Path]:
        log = self.folder / f"log{len(self._started)}"
        process = self._context.Process(target=target, args=(list(arguments), str(log), dict(os.environ)))
        process.start()
        self._started.append((process, log))
        return process, log

    def wait(self) -> list[tuple[int | None, str, str]]:
        """Exit code, stdout and stderr of all that were started."""
        end = time.monotonic() + PATIENCE
        for process, _ in self._started:
            process.join(max(1.0, end - time.monotonic()))
        return [(process.exitcode, _text(log, "out"), _text(log, "err")) for process, log in self._started]

    def end(self) -> None:
        for process, _ in self._started:
            process.kill()
            process.join()


def _text(log: Path, kind: str) -> str:
    file = Path(f"{log}.{kind}")
    return file.read_text() if file.is_file() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Any:
    machine = Machine(tmp_path)
    yield machine
    machine.end()


def tiny(method: str, *overrides: str, output: Path) -> list[str]:
    prototypes = [] if method in ("simclr", "byol") else ["head.num_prototypes=16"]
    return ["pretrain", method, *TINY, *prototypes, *overrides, "--output", str(output)]


def trained(folder: Path) -> RunFolder:
    """A run with two checkpoints and no result, trained in this process."""
    recipe = resolve("dino", overrides=[*TINY, "head.num_prototypes=16", "tracking.enabled=false", "seed=77"])
    summary = train.pretrain(recipe, Request(folder, "dinobench pretrain dino", evaluate=False), Reporter(silent=True))
    assert summary is not None
    return summary.run


def points_in(client: Any, run_id: str) -> Counter[tuple[str, int]]:
    keys = client.get_run(run_id).data.metrics
    return Counter((key, m.step) for key in keys for m in client.get_metric_history(run_id, key))


@pytest.mark.faults
@pytest.mark.promise(
    "8 processes train, evaluate and log into one store and one cache",
    "all exit 0; every result is whole and there once; so is every point in the store, at the latest after `runs sync`",
)
def test_eight_processes_share_a_store_and_a_cache(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, count: Callable, figure: Callable
) -> None:
    import mlflow

    # room for two or three entries: they displace each other
    monkeypatch.setenv("DINOBENCH_CACHE_GB", str(200_000 / 2**30))
    ready = trained(machine.output)
    for method, seed in (("dino", 0), ("dino", 1), ("dino_vmf", 0), ("simclr", 0), ("byol", 0)):
        machine.start(*tiny(method, output=machine.output), "--seed", str(seed))
    for suites in ("digits_knn,digits_clusters", "digits_clusters,digits_knn", "digits_knn"):
        machine.start("eval", str(ready.path), "--suite", suites, "--device", "cpu", "--json")
    found = machine.wait()
    assert [code for code, _, _ in found] == [0] * PROCESSES, "\n".join(err[-1500:] for code, _, err in found if code)
    count(processes=PROCESSES)
    # On a machine busy with other things the store may be out of reach for a minute; a run says so and is synced.
    late = [run for run in list_runs(machine.output) if not run.state().mirrored and run.path != ready.path]
    said = [err for _, _, err in found if "MLflow does not show all of this run" in err]
    assert len(late) == len(said) and all(f"dinobench runs sync {run.path}" in "".join(said) for run in late)
    figure(runs_synced_after_the_concurrency_test=len(late))
    syncing = Machine(machine.folder / "sync")
    syncing.start("runs", "sync", "--output", str(machine.output))
    assert [code for code, _, _ in syncing.wait()] == [0]

    client = mlflow.MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    (experiment,) = [e for e in client.search_experiments() if e.name == "dinobench/pretrain"]
    logged = client.search_runs([experiment.experiment_id])
    by_folder = {run.data.tags["run.folder"]: run for run in logged}
    assert len(logged) == len(by_folder) == 6
    assert not list(machine.folder.rglob(".*.tmp"))
    for run in list_runs(machine.output):
        assert run.state().status == "finished"
        results = ResultStore(run.path).all()
        assert len({(result.suite, result.checkpoint) for result in results}) == len(results)
        assert len([result for result in results if result.suite == "digits_knn@1"]) == 2
        assert len(results) == (4 if run.path == ready.path else 2)
        assert run.state().mirrored
        points = points_in(client, by_folder[str(run.path.absolute())].info.run_id)
        wanted = {(key, point.step) for point in run.journal.read() for key in point.finite()}
        assert wanted <= points.keys() and set(points.values()) == {1}
    everything = [e.experiment_id for e in client.search_experiments()]
    open_runs = client.search_runs(everything, filter_string="attributes.status = 'RUNNING'")
    assert open_runs == []


@pytest.mark.faults
@pytest.mark.promise("two evaluators on one checkpoint", "one measures, the other waits and reads the same result")
def test_two_evaluators_of_a_checkpoint_measure_it_once(machine: Machine, count: Callable) -> None:
    checkpoint = trained(machine.output).last_checkpoint
    for _ in range(2):
        machine.start("eval", str(checkpoint), "--suite", "digits_knn", "--device", "cpu", "--json", "--no-track")
    found = machine.wait()
    assert [code for code, _, _ in found] == [0, 0], found
    count(processes=2)
    first, second = (json.loads(out) for _, out, _ in found)
    assert sum(": measuring" in err for _, _, err in found) == 1
    assert sum("stored result, nothing measured" in err for _, _, err in found) == 1
    assert {first.pop("from_cache"), second.pop("from_cache")} == {False, True}
    assert first == second
    assert len(list(machine.output.rglob("evals/*/*.json"))) == 1


@pytest.mark.faults
@pytest.mark.promise(
    "the same recipe is started twice", "the second says which process on which machine works on it, where"
)
def test_a_second_start_of_a_recipe_says_who_trains_it(machine: Machine, count: Callable) -> None:
    long = tiny("dino", "schedule.epochs=2000", output=machine.output)
    first, _ = machine.start(*long)
    until(lambda: list(machine.output.glob("*/.holder")) != [])
    second, log = machine.start(*long)
    second.join(PATIENCE)
    (run,) = list_runs(machine.output)
    assert (second.exitcode, runs.describe_status(run)) == (3, "running")
    assert f":{first.pid}) is working on {run.path}: wait for it" in _text(log, "err")
    until(lambda: len(run.journal.read()) > 0)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGTERM)
    first.join(PATIENCE)
    assert (first.exitcode, run.state().status) == (143, "interrupted")
    count(processes=2)


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


ENTRIES, VALUES = 24, 5_000


def read_and_write(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """Asks a cache for entries in a random order, 60 times; each must hold its own number."""
    folder, seed = arguments
    draw = random.Random(int(seed))
    cache = FeatureCache(Path(folder), max_bytes=6 * 4 * VALUES)
    held = []
    for _ in range(60):
        number = draw.randrange(ENTRIES)
        key, value = content_key(number=number), torch.full((VALUES, 1), float(number))

        def write(path: Path, known: dict[str, str], value: torch.Tensor = value) -> None:
            with RowFile.create(path, VALUES, 1, torch.float32) as file:
                file.write(0, value)
                file.finish([], {})

        if number % 2:
            entry = cache.get_or_write(key, write)
        else:
            entry = cache.get_or_compute(key, lambda value=value: ({"features": value}, {}))
        assert entry is not None, f"{number} was written and lost"
        held.append((value, entry))
        for value, entry in held[-10:]:  # what was read before stays, removed from the folder or not
            assert torch.equal(entry.tensors["features"], value)
    os._exit(0)


@pytest.mark.faults
@pytest.mark.promise(
    "8 processes read a cache that has room for a quarter", "each reads what it asked for; the bound holds"
)
def test_entries_are_removed_under_readers_without_harm(machine: Machine, count: Callable) -> None:
    folder = machine.folder / "shared"
    for seed in range(PROCESSES):
        machine.start(str(folder), str(seed), target=read_and_write)
    assert [code for code, _, _ in machine.wait()] == [0] * PROCESSES
    count(processes=PROCESSES)
    cache = FeatureCache(folder, max_bytes=6 * 4 * VALUES)
    cache.get_or_compute(content_key(number="last"), lambda: ({"features": torch.ones(VALUES, 1)}, {}))
    assert cache.size() <= 6 * 4 * VALUES
    assert not list(folder.rglob(".writing*"))


class SlowDisk:
    """Every call that opens, syncs, renames or removes a file below a folder takes `seconds` more, and is counted."""

    def __init__(self, folder: Path, seconds: float, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.seconds = str(folder), seconds
        self.step, self.calls = 0, Counter[int]()
        for place, name in ((os, "replace"), (os, "open"), (os, "link"), (os, "unlink"), (io, "open")):
            patch.setattr(place, name, self._slow(getattr(place, name)))
        patch.setattr(builtins, "open", io.open)
        patch.setattr(os, "fsync", self._slow(os.fsync, always=True))

    def _slow(self, call: Callable[..., Any], *, always: bool = False) -> Callable[..., Any]:
        def slow(*arguments: Any, **options: Any) -> Any:
            if always or str(arguments[0]).startswith(self.folder):
                self.calls[self.step] += 1
                time.sleep(self.seconds)
            return call(*arguments, **options)

        return slow


def tiny_recipe(*overrides: str) -> Recipe:
    plain = ["tracking.enabled=false", "evaluation.suites=[]", "head.num_prototypes=16"]
    return resolve("dino", overrides=[*TINY, *plain, *overrides])


@pytest.mark.faults
@pytest.mark.promise(
    "the runs folder lies on a slow file system",
    "steps that neither log nor write a checkpoint touch no file; one that logs waits for one append",
)
def test_a_slow_disk_is_waited_for_by_logs_and_checkpoints_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("runtime.log_every=5", "checkpoint.every_epochs=2")  # 20 steps an epoch
    disk = SlowDisk(tmp_path, 0.02, monkeypatch)

    class Steps(Reporter):
        def progress(self, progress: Progress) -> None:
            disk.step = progress.step  # what comes until the next one belongs to this step

    summary = train.pretrain(recipe, Request(tmp_path / "runs", "dinobench pretrain dino"), Steps(silent=True))
    assert summary is not None and summary.state.status == "finished"
    inside = {step: calls for step, calls in disk.calls.items() if 0 < step < 40}
    assert inside == dict.fromkeys(range(5, 40, 5), 1)
    monkeypatch.undo()
    fast = train.pretrain(recipe, Request(tmp_path / "fast", "dinobench pretrain dino"), Reporter(silent=True))
    assert fast is not None
    steps = [[point.step for point in found.run.journal.read()] for found in (summary, fast)]
    assert steps[0] == steps[1]


@pytest.mark.faults
@pytest.mark.promise("the runs folder lies on a slow file system (0.5 s a call)", "locks still keep two starts apart")
def test_locks_hold_on_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.find_run(tiny_recipe(), tmp_path)
    run.create(tiny_recipe())
    SlowDisk(tmp_path, 0.5, monkeypatch)
    assert runs.describe_status(run) == "killed"
    with run.lock():
        assert runs.describe_status(RunFolder(run.path)) == "running"
        with pytest.raises(DinobenchError, match=rf":{os.getpid()}\) is working on"), RunFolder(run.path).lock():
            pass
    with RunFolder(run.path).lock():
        pass
    shutil.rmtree(tmp_path)
