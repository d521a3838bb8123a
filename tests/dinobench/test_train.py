from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dinobench import train
from dinobench.files import read_json
from dinobench.reporter import Reporter
from dinobench.runs import find_run
from dinobench.train import Request, Summary
from pretrain.errors import CheckFailed, DinobenchError, UsageError
from pretrain.training import loop
from pretrain.training.recipe import Recipe, TrackingConfig, resolve


@pytest.fixture
def pretrain(recipe: Recipe, tmp_path: Path):
    def pretrain(recipe: Recipe = recipe, **options: Any) -> Summary:
        request = Request(tmp_path / "runs", "dinobench pretrain dino", **options)
        summary = train.pretrain(recipe, request, Reporter(silent=True))
        assert summary is not None
        return summary

    return pretrain


def steps(summary: Summary) -> list[int]:
    return [point.step for point in summary.run.journal.read()]


def test_a_finished_run_is_found_and_not_trained_again(fake_loop: Any, pretrain: Any) -> None:
    first = pretrain()
    second = pretrain()
    assert first.trained
    assert not second.trained
    assert first.run == second.run
    assert second.state.status == "finished"
    assert len(fake_loop.calls) == 1


def test_what_limited_the_training_is_told_and_kept(
    fake_loop: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "limited by: data loading (62 % of the time spent waiting)"
    monkeypatch.setattr(loop, "train", lambda *a, **k: dataclasses.replace(fake_loop(*a, **k), limited_by=told))
    summary = train.pretrain(recipe, Request(tmp_path / "runs", "dinobench pretrain dino"), Reporter())
    assert summary is not None
    assert told in capsys.readouterr().err and told in summary.run.log_file.read_text()


def test_an_unfinished_run_asks_for_resume(fake_loop: Any, pretrain: Any) -> None:
    fake_loop.stop_at = 2
    assert pretrain().state.status == "interrupted"
    with pytest.raises(DinobenchError, match=r"unfinished run .*interrupted.*--resume.*--new") as error:
        pretrain()
    assert error.value.exit_code == 3


def test_resuming_continues_the_folder_and_its_metrics(fake_loop: Any, pretrain: Any) -> None:
    fake_loop.stop_at, fake_loop.error = 2, RuntimeError("power cut")
    with pytest.raises(RuntimeError):
        pretrain()
    fake_loop.stop_at = fake_loop.error = None
    summary = pretrain(resume=True)
    assert fake_loop.calls == [False, True]
    assert steps(summary) == [1, 2, 3, 4]
    assert summary.run.journal.curve("loss/total")[1] == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert summary.state.status == "finished"
    starts = read_json(summary.run.path / "environment.json")["starts"]
    assert [start["resumed_at_step"] for start in starts] == [None, 2]


def test_resume_where_nothing_was_started_starts(fake_loop: Any, pretrain: Any) -> None:
    assert pretrain(resume=True).state.status == "finished"


@pytest.mark.promise("a kill before the first checkpoint", "--resume begins again, without doubled points")
def test_resume_of_a_run_killed_before_its_first_checkpoint_begins_again(
    fake_loop: Any, pretrain: Any, recipe: Recipe, tmp_path: Path
) -> None:
    run = find_run(recipe, tmp_path / "runs")
    run.create(recipe)
    run.journal.append({"loss/total": 9.0}, 1)
    summary = pretrain(resume=True)
    assert summary.run == run
    assert summary.run.journal.curve("loss/total")[1][0] == 1.0


def test_new_starts_beside_a_finished_run(fake_loop: Any, pretrain: Any) -> None:
    first, second = pretrain(), pretrain(new=True)
    assert second.trained
    assert second.run.name == f"{first.run.name}-2"


def test_a_failed_training_says_so_in_its_folder(fake_loop: Any, pretrain: Any, recipe: Recipe, tmp_path: Path) -> None:
    fake_loop.stop_at, fake_loop.error = 3, DinobenchError("loss/total is not finite")
    with pytest.raises(DinobenchError, match="not finite"):
        pretrain()
    state = find_run(recipe, tmp_path / "runs").state()
    assert (state.status, state.note) == ("failed", "loss/total is not finite")


def test_a_collapse_is_its_own_status(fake_loop: Any, pretrain: Any, recipe: Recipe, tmp_path: Path) -> None:
    fake_loop.stop_at, fake_loop.error = 3, CheckFailed("collapsed (uniform)")
    with pytest.raises(CheckFailed):
        pretrain()
    assert find_run(recipe, tmp_path / "runs").state().status == "collapsed"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_outside_the_steps_is_an_interruption_and_no_failure(
    name: str, fake_loop: Any, pretrain: Any, recipe: Recipe, tmp_path: Path
) -> None:
    fake_loop.stop_at, fake_loop.error = 3, SystemExit(128 + signal.Signals[name])
    with pytest.raises(SystemExit):
        pretrain()
    state = find_run(recipe, tmp_path / "runs").state()
    assert (state.status, state.note) == ("interrupted", name)


@pytest.mark.promise("two processes on one run", "the second is refused, with the holder's name")
def test_a_held_folder_is_refused(fake_loop: Any, pretrain: Any, recipe: Recipe, tmp_path: Path) -> None:
    with find_run(recipe, tmp_path / "runs").lock(), pytest.raises(DinobenchError, match="another process"):
        pretrain()
    assert fake_loop.calls == []


def test_an_unknown_suite_is_told_before_the_training(fake_loop: Any, pretrain: Any) -> None:
    with pytest.raises(UsageError, match="did you mean 'digits_knn'"):
        pretrain(resolve("dino", overrides=["evaluation.suites=[digits_kn]", "tracking.enabled=false"]))
    assert fake_loop.calls == []


def test_every_kept_checkpoint_is_evaluated_once_finished(
    fake_loop: Any, pretrain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def evaluate_all(checkpoints: list[Path], suites: Any, settings: Any, say: Any, record: Any) -> tuple[list, list]:
        seen.extend((checkpoint.name, [suite.name for suite in suites]) for checkpoint in checkpoints)
        return [], []

    monkeypatch.setattr(train, "evaluate_all", evaluate_all)
    recipe = resolve("dino", overrides=["evaluation.suites=[digits_knn]", "tracking.enabled=false"])
    pretrain(recipe, evaluate=False)
    assert seen == []
    pretrain(recipe)  # the training is done, only the numbers are missing
    assert seen == [("last.pt", ["digits_knn"])]
    assert len(fake_loop.calls) == 1


def test_the_rank_that_decides_shares_its_error_and_its_folder(recipe: Recipe, tmp_path: Path) -> None:
    from pretrain.training.runtime import Runtime

    runtime = Runtime.start(recipe.runtime)

    def refuse() -> Any:
        raise DinobenchError("no")

    with pytest.raises(DinobenchError, match="no"):
        train._agree(runtime, refuse)
    job = train._Job(tmp_path, train=True, resume=False)
    assert train._agree(runtime, lambda: job) is job


@pytest.mark.promise("a kill after the training, before MLflow has all", "the same command completes it")
def test_a_kill_after_the_training_leaves_no_open_page(
    fake_loop: Any, pretrain: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrors: list[Any] = []

    class FakeMirror:
        links: ClassVar[dict[str, str]] = {}

        def __init__(self, *arguments: Any):
            self.finished: list[str] = []
            mirrors.append(self)

        def log(self, point: Any) -> None:
            pass

        result = log

        def finish(self, status: str) -> None:
            self.finished.append(status)

        def close(self) -> bool:
            return len(mirrors) > 1  # the first start is killed before MLflow has it all

    monkeypatch.setattr(train, "Mirror", FakeMirror)
    tracked = recipe.model_copy(update={"tracking": TrackingConfig(enabled=True)})
    assert not pretrain(tracked).state.mirrored
    second = pretrain(tracked)
    assert not second.trained
    assert second.state.mirrored
    assert mirrors[1].finished == ["finished"]
    pretrain(tracked)
    assert len(mirrors) == 2, "nothing is left to bring up to date"


def test_suites_about_prototypes_are_left_out_for_a_method_without_and_said_so():
    from suites.suite import load_suite

    suites = [load_suite(name) for name in ("digits_knn", "digits_prototypes")]
    said: list[str] = []
    assert train._applicable(suites, resolve("dino"), said.append) == suites and not said
    kept = train._applicable(suites, resolve("dino", overrides=["head.num_prototypes=0"]), said.append)
    assert [suite.name for suite in kept] == ["digits_knn"]
    assert said == ["digits_prototypes@1 does not apply: dino has no prototypes"]
