from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dinobench import watch as module
from dinobench.evaluate import Evaluation
from dinobench.files import write_json
from dinobench.results import Result, ResultStore
from dinobench.runs import RunFolder
from dinobench.watch import Pulse, Watched, evaluate_run, watch
from pretrain.errors import DinobenchError
from suites.suite import load_suite

Event = Callable[[], Any]


def keep(run: RunFolder, step: int) -> Path:
    path = run.checkpoints / f"step={step:08d}.pt"
    path.write_bytes(f"weights {step}".encode())
    return path


@pytest.fixture
def live(run: RunFolder) -> Iterator[RunFolder]:
    """A run that a process works on: this one."""
    write_json(run.path / "environment.json", {"starts": [{"command": "dinobench pretrain dino --new --seed 0"}]})
    with run.lock():
        yield run


@pytest.fixture
def follow(measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watched]:
    """Watches a run in which `events` happen, one each time the watch waits."""

    def follow(run: RunFolder, *events: Event, say: Callable[[str], None] = lambda text: None, **options: Any) -> Any:
        waiting = iter(events)
        clock = options.pop("clock", time.monotonic)
        # the module's own name for it: other modules sleep too
        fake = SimpleNamespace(sleep=lambda seconds: next(waiting)(), monotonic=clock)
        monkeypatch.setattr(module, "time", fake)
        names = options.pop("suites", ["digits_knn"])
        watched = watch(run, [load_suite(name) for name in names], Evaluation(output=tmp_path), say, **options)
        assert next(waiting, None) is None, "the watch ended before the run"
        return watched

    return follow


def steps(results: list[Result]) -> list[int]:
    return [result.provenance["step"] for result in results]


def test_each_kept_checkpoint_is_measured_once_until_the_run_ends(live: RunFolder, follow: Any, measured: Any) -> None:
    def end() -> None:
        keep(live, 3)
        live.update(status="finished")

    recorded: list[Result] = []
    keep(live, 1)
    events = (lambda: None, lambda: keep(live, 2), lambda: None, end)
    watched = follow(live, *events, suites=["digits_knn", "digits_linear"], record=recorded.append)
    assert (watched.status, watched.advice, watched.failures) == ("finished", "", [])
    assert steps(watched.results) == steps(recorded) == [1, 1, 2, 2, 3, 3]
    assert measured.loads == 3
    assert measured.suites == 3 * ["digits_knn", "digits_linear"]


def test_last_pt_of_a_run_that_goes_on_is_left_alone(live: RunFolder, follow: Any) -> None:
    live.last_checkpoint.write_bytes(b"changes all the time")
    assert follow(live, lambda: None, lambda: (keep(live, 8), live.update(status="finished"))).status == "finished"
    assert steps(ResultStore(live.path).all()) == [8]


@pytest.mark.promise("a watched run is killed", "told, with the command that continues it")
def test_a_killed_run_is_told_with_the_command_that_continues_it(run: RunFolder, follow: Any) -> None:
    write_json(run.path / "environment.json", {"starts": [{"command": "dinobench pretrain dino --new --seed 0"}]})
    keep(run, 1)
    watched = follow(run)
    assert watched.status == "killed"
    assert steps(watched.results) == [1]
    assert "killed: no process works on it any more" in watched.advice
    assert "`dinobench pretrain dino --seed 0 --resume`" in watched.advice


def test_a_run_killed_while_it_is_watched_ends_the_watch(
    run: RunFolder, follow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = iter([True, True])
    monkeypatch.setattr(RunFolder, "is_held", lambda folder: next(alive, False))
    watched = follow(run, lambda: keep(run, 1))
    assert (watched.status, steps(watched.results)) == ("killed", [1])


def test_a_run_that_finishes_while_we_look_was_not_killed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish_and_leave(folder: RunFolder) -> bool:
        folder.update(status="finished")
        return False

    monkeypatch.setattr(RunFolder, "is_held", finish_and_leave)
    assert Pulse(run).status() == "finished"


@pytest.mark.parametrize("status", ["interrupted", "failed", "collapsed"])
def test_a_run_that_did_not_finish_is_told_so(live: RunFolder, follow: Any, status: Any) -> None:
    keep(live, 1)
    live.update(status=status, note="SIGTERM")
    watched = follow(live)
    assert steps(watched.results) == [1]
    assert f"ended {status} (SIGTERM)" in watched.advice


@pytest.mark.promise("a watch is stopped", "what was measured stays, the next goes on")
def test_stopping_a_watch_loses_nothing(live: RunFolder, follow: Any, measured: Any) -> None:
    def stop() -> None:
        raise SystemExit(143)

    said: list[str] = []
    for step in (1, 2):
        keep(live, step)
    with pytest.raises(SystemExit):
        follow(live, stop, say=said.append)
    assert "the same command goes on from there" in said[-1]
    keep(live, 3)
    live.update(status="finished")
    watched = follow(live)
    assert steps(watched.results) == [1, 2, 3]
    assert [result.from_cache for result in watched.results] == [True, True, False]
    assert len(measured.suites) == 3


@pytest.mark.promise("a watch is stopped", "what was measured stays, the next goes on")
def test_a_watch_stopped_in_a_measurement_leaves_its_lock_free(
    live: RunFolder, follow: Any, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, **options: Any) -> Any:
        raise KeyboardInterrupt

    keep(live, 1)
    live.update(status="finished")
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.models.checkpoint.load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            follow(live)
    assert steps(follow(live).results) == [1]


def test_a_suite_that_fails_is_tried_once_per_watch(live: RunFolder, follow: Any, measured: Any) -> None:
    measured.fail = "digits_knn"
    keep(live, 1)
    said: list[str] = []
    watched = follow(live, lambda: None, lambda: live.update(status="finished"), say=said.append)
    assert said.count("digits_knn@1 on step=00000001.pt: not measured: data set absent") == 1
    assert [(failure.suite, failure.reason) for failure in watched.failures] == [("digits_knn@1", "data set absent")]
    assert measured.loads == 1


@pytest.mark.promise("a checkpoint removed before it was measured", "said, and no failure")
def test_a_checkpoint_that_the_run_removed_is_no_failure(
    live: RunFolder, follow: Any, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    second = live.checkpoints / "step=00000002.pt"

    def load(path: Path, **options: Any) -> Any:
        second.unlink(missing_ok=True)
        return measured.load(path, **options)

    monkeypatch.setattr("pretrain.models.checkpoint.load", load)
    for step in (1, 2):
        keep(live, step)
    watched = follow(live, lambda: live.update(status="finished"), say=said.append)
    assert steps(watched.results) == [1]
    assert watched.failures == []
    (told,) = [text for text in said if "not measured" in text]
    assert told.startswith("digits_knn@1 on step=00000002.pt: not measured: the run removed it (checkpoint.keep)")


def test_a_waiting_watch_says_where_the_run_is_now_and_then(live: RunFolder, follow: Any) -> None:
    clock = [0.0]
    said: list[str] = []

    def later() -> None:
        live.journal.append({"loss/total": 1.0}, 20)
        clock[0] += module.LINE_SECONDS

    events = (lambda: None, later, lambda: live.update(status="finished"))
    follow(live, *events, say=said.append, clock=lambda: clock[0])
    assert said == [
        f"watching {live.name}: before its first step, 0 checkpoints evaluated, waiting for the next",
        f"watching {live.name}: at step 20, 0 checkpoints evaluated, waiting for the next",
    ]


def test_a_run_of_another_machine_is_alive_while_its_files_change(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    pulse = Pulse(run, silence=60)
    assert pulse.status() == "killed"  # a run of this machine, whose lock is free
    run.update(process=f"not-{socket.gethostname()}:1")
    seen = []
    for step in (1, 2, None, None):
        if step:
            run.journal.append({"loss/total": 1.0}, step)
        seen.append(pulse.status())
        clock[0] += 40
    assert seen == ["running", "running", "running", "killed"]


def test_a_run_is_evaluated_as_far_as_it_is(measured: Any, live: RunFolder, tmp_path: Path) -> None:
    suites, settings = [load_suite("digits_knn")], Evaluation(output=tmp_path)
    arguments = (live, suites, settings, lambda text: None, lambda result: None)
    live.last_checkpoint.write_bytes(b"changes all the time")
    with pytest.raises(DinobenchError, match="kept no checkpoint yet: add --watch"):
        evaluate_run(*arguments)
    for step in (10, 9):
        keep(live, step)
    results, failures = evaluate_run(*arguments)
    assert (steps(results), failures) == ([9, 10], [])
