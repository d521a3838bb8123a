"""`eval --watch` beside a live `pretrain`, both killed and started again: no result lost, none double, MLflow complete.

Real processes on the digits. A killed evaluator may have begun a measurement that another has to do again; nothing that
was finished is.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from dinobench.files import read_json
from dinobench.runs import RunFolder, list_runs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

COMMAND = (sys.executable, "-c", "from dinobench.cli.app import main; main()")
STEPS_PER_EPOCH, EPOCHS = 20, 6
KEPT = [epoch * STEPS_PER_EPOCH for epoch in range(1, EPOCHS + 1)]
RECIPE = (
    "dino_vmf",
    f"schedule.epochs={EPOCHS}",
    "schedule.warmup_epochs=1",
    "head.num_prototypes=32",
    "runtime.log_every=5",
    "runtime.threads=1",
    "checkpoint.every_epochs=1",
    "checkpoint.every_steps=10",
    f"checkpoint.keep={EPOCHS}",
    "evaluation.suites=[digits_knn]",
)
SUITES = ("digits_knn", "digits_clusters")


@dataclass
class Command:
    """A running `dinobench`; what it says goes to a file, so that no pipe fills."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path
    killed: bool = False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.killed = True

    def finish(self) -> int:
        return self.process.wait(timeout=200)

    @property
    def document(self) -> Any:
        return json.loads(self.out.read_text())

    @property
    def measurements(self) -> list[tuple[str, str]]:
        """(suite, checkpoint) of each that it began."""
        return re.findall(r"(\S+) on (\S+): measuring", self.err.read_text())


@dataclass
class Bench:
    """One output folder and the commands that work on it."""

    folder: Path
    commands: list[Command] = field(default_factory=list)
    _files: list[IO[bytes]] = field(default_factory=list)

    def start(self, *arguments: str) -> Command:
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder / 'mlflow.db'}",
            "DINOBENCH_CACHE": str(self.folder / "cache"),
        }
        out, err = (self.folder / f"{len(self.commands)}.{name}" for name in ("out", "err"))
        self._files += [out.open("wb"), err.open("wb")]
        process = subprocess.Popen(
            [*COMMAND, *arguments, "--json"],
            env=environment,
            stdout=self._files[-2],
            stderr=self._files[-1],
            cwd=self.folder,
        )
        self.commands.append(Command(process, out, err))
        return self.commands[-1]

    def pretrain(self, *options: str) -> Command:
        return self.start("pretrain", *RECIPE, "--output", str(self.folder), *options)

    def watch(self) -> Command:
        return self.start("eval", str(self.run.path), "--suite", ",".join(SUITES), "--watch", "--device", "cpu")

    @property
    def run(self) -> RunFolder:
        (run,) = list_runs(self.folder)
        return run

    @property
    def results(self) -> list[Path]:
        return sorted(self.run.path.glob("evals/*/*.json"))

    @property
    def step(self) -> int:
        """The last one in the journal."""
        points = self.run.journal.read() if list_runs(self.folder) else []
        return points[-1].step if points else -1

    def until(self, reached: Callable[[], bool], *alive: Command) -> None:
        deadline = time.monotonic() + 200
        while not reached():
            for command in alive:
                assert command.process.poll() is None, command.err.read_text()
            assert time.monotonic() < deadline, [command.err.read_text()[-2000:] for command in self.commands]
            time.sleep(0.02)

    def close(self) -> None:
        for command in self.commands:
            if command.process.poll() is None:
                command.kill()
        for file in self._files:
            file.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.mark.promise("training and evaluator killed (SIGKILL)", "both go on; nothing lost, nothing twice")
def test_watch_and_training_are_killed_and_go_on_without_loss_or_double_work(bench: Bench) -> None:
    trainer = bench.pretrain()
    bench.until(lambda: bool(list_runs(bench.folder)), trainer)
    watcher = bench.watch()
    bench.until(lambda: bench.step >= 45, trainer)
    trainer.kill()
    bench.until(lambda: len(bench.results) >= 1, watcher)
    watcher.kill()  # of the two checkpoints and two suites that it had
    assert len(bench.results) < 4

    left = bench.watch()  # nobody trains: it measures what is there and says how to go on
    assert left.finish() == 3
    assert "was killed: no process works on it any more" in left.err.read_text()
    assert "--resume" in left.err.read_text()
    assert len(bench.results) == 4

    trainer = bench.pretrain("--resume")
    bench.until(lambda: bench.step >= 55, trainer)
    watcher = bench.watch()
    bench.until(lambda: bench.step >= KEPT[-1] or len(bench.results) > 4)
    watcher.kill()
    both = [bench.watch(), bench.watch()]
    assert [command.finish() for command in (*both, trainer)] == [0, 0, 0], [
        command.err.read_text() for command in (*both, trainer)
    ]

    # none lost: one file for each, and every evaluator that came to the end has all of them
    assert [int(path.stem.partition("=")[2]) for path in bench.run.kept_checkpoints()] == KEPT
    wanted = sorted((f"{suite}@1", step) for suite in SUITES for step in KEPT)
    stored = [read_json(path) for path in bench.results]
    assert sorted((result["suite"], result["provenance"]["step"]) for result in stored) == wanted
    for command in both:
        told = {(result["suite"], result["provenance"]["step"]) for result in command.document}
        assert told == set(wanted)

    # none double: begun twice only where a kill came between
    began = Counter(pair for command in bench.commands for pair in command.measurements)
    killed = [command.measurements for command in bench.commands if command.killed]
    cut_short = Counter(measurements[-1] for measurements in killed if measurements)
    assert set(began) == {(suite, f"step={step:08d}.pt") for suite, step in wanted}
    assert {pair: count for pair, count in began.items() if count > 1 + cut_short[pair]} == {}

    before = {path: path.read_bytes() for path in bench.results}
    again = [bench.watch(), bench.pretrain()]
    assert [command.finish() for command in again] == [0, 0]
    assert {path: path.read_bytes() for path in bench.results} == before
    assert again[0].measurements == again[1].measurements == []
    assert_mlflow_is_complete(bench)


def assert_mlflow_is_complete(bench: Bench) -> None:
    """One run for the pretraining, for each checkpoint and for each result; closed; every point once."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{bench.folder / 'mlflow.db'}")
    found = client.search_experiments(filter_string="name LIKE 'dinobench/%'")
    experiments = {experiment.name: client.search_runs([experiment.experiment_id]) for experiment in found}
    for runs in experiments.values():
        for run in runs:
            assert run.info.status == "FINISHED", run.data.tags
            for key in run.data.metrics:
                steps = [point.step for point in client.get_metric_history(run.info.run_id, key)]
                assert sorted(steps) == sorted(set(steps)), (key, run.data.tags["mlflow.runName"])

    (pretraining,) = experiments.pop("dinobench/pretrain")
    history = client.get_metric_history(pretraining.info.run_id, "loss/total")
    assert sorted(point.step for point in history) == list(range(5, KEPT[-1] + 1, 5))
    ((_, runs),) = experiments.items()
    kinds: dict[str, list[Any]] = {}
    for run in runs:
        kinds.setdefault(run.data.tags["dinobench.kind"], []).append(run)
    assert len(kinds["checkpoint"]) == len(KEPT)
    assert len(kinds["suite"]) == len(KEPT) * len(SUITES)
    for headline in {key for run in kinds["checkpoint"] for key in run.data.metrics}:
        curve = client.get_metric_history(pretraining.info.run_id, headline)
        assert sorted(point.step for point in curve) == KEPT
