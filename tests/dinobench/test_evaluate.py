from __future__ import annotations

import errno
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import suites.measure
from dinobench import evaluate as module
from dinobench.evaluate import Evaluation, evaluate, evaluate_all
from dinobench.runs import RunFolder
from pretrain.errors import DinobenchError
from suites.suite import load_suite


def silent(text: str) -> None:
    """Say nothing."""


def test_a_lone_checkpoint_is_measured_once_and_then_read(measured: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    settings = Evaluation(output=tmp_path / "runs")
    both = [load_suite("digits_knn"), load_suite("digits_linear")]
    first, _ = evaluate(path, both, settings, silent)
    second, _ = evaluate(path, both, settings, silent)
    assert measured.loads == 1
    assert measured.suites == ["digits_knn", "digits_linear"]
    assert [result.from_cache for result in first] == [False, False]
    assert [result.from_cache for result in second] == [True, True]
    assert first[0].scores == second[0].scores == {"top1": 91.5, "spread": None}
    assert not module.missing([path], both, settings)


def test_a_checkpoint_with_other_weights_is_measured_anew(measured: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    settings = Evaluation(output=tmp_path / "runs")
    for weights in (b"one", b"two"):
        path.write_bytes(weights)
        evaluate(path, [load_suite("digits_knn")], settings, silent)
    assert measured.loads == 2


def test_results_of_a_checkpoint_in_a_run_lie_in_its_run_folder(measured: Any, run: RunFolder, tmp_path: Path) -> None:
    run.last_checkpoint.write_bytes(b"weights")
    evaluate(run.last_checkpoint, [load_suite("digits_knn")], Evaluation(output=tmp_path / "elsewhere"), silent)
    assert len(list(run.path.glob("evals/digits_knn@1/*.json"))) == 1
    assert not (tmp_path / "elsewhere").exists()


def test_a_suite_that_fails_does_not_stop_the_others(measured: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    measured.fail = "digits_knn"
    both = [load_suite("digits_knn"), load_suite("digits_linear")]
    results, failures = evaluate(path, both, Evaluation(output=tmp_path / "runs"), silent)
    assert [result.suite_name for result in results] == ["digits_linear"]
    assert [(failure.suite, failure.reason) for failure in failures] == [("digits_knn@1", "data set absent")]


def in_a_process(work: Callable[[], None]) -> Any:
    """Run it in a forked process, which keeps what the test has replaced."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def wait_for_measurement(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while not list(folder.iterdir()):
        assert time.monotonic() < deadline, "nothing was measured"
        time.sleep(0.01)


@pytest.fixture
def slow(measured: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a file for every measurement, named by process, suite and checkpoint, which takes a moment."""
    folder = tmp_path / "measurements"
    folder.mkdir()

    def measure(suite: Any, model: Any, **options: Any) -> Any:
        started = time.monotonic_ns()
        (folder / f"{os.getpid()} {suite.name} {model.provenance['step']} {started}").touch()
        time.sleep(float(os.environ["SECONDS"]))
        return measured.measure(suite, model, **options)

    monkeypatch.setenv("SECONDS", "0.1")
    monkeypatch.setattr(suites.measure, "measure", measure)
    return folder


@pytest.mark.promise("two evaluators on one run", "nothing is measured twice")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_two_processes_divide_a_run_and_do_nothing_twice(slow: Path, run: RunFolder, tmp_path: Path) -> None:
    checkpoints = [run.checkpoints / f"step={step:08d}.pt" for step in range(1, 7)]
    for path in checkpoints:
        path.write_bytes(path.name.encode())
    both = [load_suite("digits_knn"), load_suite("digits_linear")]

    def work() -> None:
        results, failures = evaluate_all(checkpoints, both, Evaluation(output=tmp_path), silent)
        assert [(result.provenance["step"], result.suite_name) for result in results] == [
            (step, suite.name) for step in range(1, 7) for suite in both
        ]
        assert not failures

    processes = [in_a_process(work) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    measured = [path.name.split() for path in slow.iterdir()]
    assert len(measured) == 12
    assert len({(suite, step) for _, suite, step, _ in measured}) == 12
    assert {pid for pid, *_ in measured} == {str(process.pid) for process in processes}


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_what_another_process_measures_is_waited_for_and_read(
    slow: Path, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.last_checkpoint.write_bytes(b"weights")
    said: list[str] = []

    def work(say: Callable[[str], None] = silent) -> Any:
        return evaluate(run.last_checkpoint, [load_suite("digits_knn")], Evaluation(output=tmp_path), say)

    monkeypatch.setenv("SECONDS", "0.5")
    other = in_a_process(work)
    wait_for_measurement(slow)
    (result,), _ = work(said.append)
    other.join(20)
    assert result.from_cache
    assert len(list(slow.iterdir())) == 1
    assert "another process measures it" in said[0]


@pytest.mark.promise("an evaluator killed while it measures", "its lock is free, the next measures")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_process_that_died_blocks_nobody(
    slow: Path, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.last_checkpoint.write_bytes(b"weights")

    def work() -> Any:
        return evaluate(run.last_checkpoint, [load_suite("digits_knn")], Evaluation(output=tmp_path), silent)

    monkeypatch.setenv("SECONDS", "60")
    other = in_a_process(work)
    wait_for_measurement(slow)
    other.kill()
    other.join(20)
    monkeypatch.setenv("SECONDS", "0")
    (result,), _ = work()
    assert not result.from_cache
    assert len(list(run.path.glob("evals/*/*.json"))) == 1


@pytest.mark.promise("a damaged checkpoint among several", "listed as failed, the others are measured; exit 3")
def test_a_checkpoint_that_cannot_be_read_does_not_stop_the_others(
    measured: Any, run: RunFolder, tmp_path: Path
) -> None:
    run.last_checkpoint.write_bytes(b"weights")
    absent = run.checkpoints / "step=00000001.pt"
    recorded: list[str] = []
    results, failures = evaluate_all(
        [absent, run.last_checkpoint],
        [load_suite("digits_knn")],
        Evaluation(output=tmp_path),
        silent,
        lambda result: recorded.append(result.suite_name),
    )
    assert [result.checkpoint for result in results] == [str(run.last_checkpoint)]
    assert recorded == ["digits_knn"]
    assert [(failure.suite, failure.checkpoint) for failure in failures] == [("digits_knn@1", absent)]


@pytest.mark.promise("a file system without locks", "told with the path")
def test_a_place_without_locks_is_told_as_one_that_cannot_be_written(
    measured: Any, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(lock: Any, **options: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    run.last_checkpoint.write_bytes(b"weights")
    monkeypatch.setattr(FileLock, "acquire", no_locks)
    with pytest.raises(DinobenchError, match=r"cannot write .*\.lock: no locks available"):
        evaluate(run.last_checkpoint, [load_suite("digits_knn")], Evaluation(output=tmp_path), silent)


def test_a_long_feature_pass_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 5.5, 5.5, 6.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    said: list[str] = []
    progress = module.feature_lines(said.append)
    for done in (10, 20, 30):
        progress("features of digits train", done, 100)
    assert said == ["features of digits train: 20 of 100 images"]


@pytest.mark.parametrize(
    ("name", "short"),
    [("digits", "digits"), ("imagenet:/data/in1k", "imagenet"), ("folder:/data/birds.tar", "birds"), (None, "data")],
)
def test_data_sets_have_names_that_fit_a_metric(name: str | None, short: str) -> None:
    assert module.dataset_name(name) == short


def test_a_measurement_is_told_which_suites_come_after_it(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that one pass over the images gives the features of all."""
    told: list[tuple[str, list[str]]] = []

    def measure(suite: Any, model: Any, **options: Any) -> Any:
        told.append((suite.name, [other.name for other in options["beside"]]))
        return measured.measure(suite, model, **options)

    monkeypatch.setattr(suites.measure, "measure", measure)
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    three = [load_suite(name) for name in ("digits_knn", "digits_linear", "digits_clusters")]
    settings = Evaluation(output=tmp_path / "runs")
    evaluate(path, three[1:2], settings, silent)
    evaluate(path, three, settings, silent)
    assert told[0] == ("digits_linear", [])
    assert told[1:] == [("digits_knn", ["digits_linear", "digits_clusters"]), ("digits_clusters", [])]
