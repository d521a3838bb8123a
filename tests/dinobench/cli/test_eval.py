from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinobench import leaderboard, tracking
from dinobench.cli import app
from dinobench.files import write_json
from dinobench.leaderboard import Entry
from dinobench.runs import RunFolder


class FakeStore:
    """Stands for MLflow: notes what is logged, and fails when told."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, str | None]] = []
        self.checkpoints: list[tuple[str, str]] = []
        self.connections, self.down = 0, False

    def connect(self, uri: str) -> FakeStore:
        self.connections += 1
        if self.down:
            raise tracking.TrackingUnavailable("no answer")
        return self

    def find_pretraining(self, key: str) -> str:
        return f"run of {key}"

    def log_result(self, store: Any, entry: Entry, pretraining: str | None) -> None:
        assert store is self
        self.logged.append((entry.step, pretraining))
        self.checkpoints.append((entry.checkpoint, entry.params["arch"]))

    def links(self, base: str) -> dict[str, str]:
        return {"digits-v1 charts": f"{base}/#/experiments/1/runs"}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    fake = FakeStore()
    monkeypatch.setattr(tracking, "connect", fake.connect)
    monkeypatch.setattr(leaderboard, "log_result", fake.log_result)
    return fake


@pytest.fixture
def trained(run: RunFolder) -> RunFolder:
    """A finished run with two kept checkpoints."""
    for step in (20, 40):
        (run.checkpoints / f"step={step:08d}.pt").write_bytes(f"weights {step}".encode())
    run.update(status="finished", step=40)
    return run


def test_a_run_folder_means_all_that_it_has_kept(
    measured: Any, store: FakeStore, trained: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--suite", "digits_knn,digits_linear", str(trained.path)]
    assert app.run(arguments) == 0
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()][1:5]
    assert header == ["step", "images", "seen", "digits_knn", "top1", "digits_linear", "top1"]
    assert [row for row in rows if row[0].isdigit()] == [["20", "1280", "91.5", "91.5"], ["40", "2560", "91.5", "91.5"]]
    assert app.run([*arguments, "--json"]) == 0
    documents = json.loads(capsys.readouterr().out)
    assert [(each["provenance"]["step"], each["from_cache"]) for each in documents] == 2 * [(20, True)] + 2 * [
        (40, True)
    ]
    assert measured.suites == 2 * ["digits_knn", "digits_linear"]


def test_results_of_a_run_are_logged_at_their_step_also_those_of_an_evaluation_that_was_killed(
    measured: Any, store: FakeStore, trained: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--suite", "digits_knn", str(trained.path)]
    assert app.run([*arguments, "--no-track"]) == 0
    assert store.connections == 0
    assert app.run(arguments) == 0
    assert "/#/experiments/1/runs" in capsys.readouterr().err
    key = f"run of {trained.state().key}"
    assert store.logged == [(20, key), (40, key)]
    assert store.connections == 1


def test_the_student_is_another_checkpoint_and_no_point_of_the_curve(
    measured: Any, store: FakeStore, trained: RunFolder
) -> None:
    for options in ([], ["--checkpoint-key", "student"]):
        assert app.run(["eval", "--suite", "digits_knn", *options, str(trained.path)]) == 0
    key = f"run of {trained.state().key}"
    assert store.logged == [(20, key), (40, key), (20, None), (40, None)]
    teacher, student = store.checkpoints[:2], store.checkpoints[2:]
    assert student == [(f"{digest}-student", f"{arch} student") for digest, arch in teacher]
    # what is synced and shown of the run is its teacher
    assert len(list(trained.path.glob("evals/*/*.json"))) == len(list(trained.path.glob("student/evals/*/*.json"))) == 2


def test_a_tracking_store_that_is_away_costs_one_warning_and_no_result(
    measured: Any, store: FakeStore, trained: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    store.down = True
    assert app.run(["eval", "--suite", "digits_knn", str(trained.path), "--json"]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 2
    assert captured.err.count("not logged to MLflow: no answer") == 1
    assert f"`dinobench runs sync {trained.path}`" in captured.err


def test_a_new_result_of_a_checkpoint_is_logged_once_also_when_its_features_are_from_the_cache(
    measured: Any, store: FakeStore, trained: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import suites.measure

    def measure(*arguments: Any, **options: Any) -> Any:
        return replace(measured.measure(*arguments, **options), from_cache=True)

    monkeypatch.setattr(suites.measure, "measure", measure)
    checkpoint = str(trained.kept_checkpoints()[-1])
    for _ in range(2):
        assert app.run(["eval", "--suite", "digits_knn", checkpoint]) == 0
        time.sleep(1.1)  # results say to the second when they were made
    assert store.logged == [(40, f"run of {trained.state().key}")]


def test_watch_ends_well_with_a_finished_run(
    measured: Any, store: FakeStore, trained: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["eval", "--watch", "--suite", "digits_knn", str(trained.path), "--json"]) == 0
    assert [each["provenance"]["step"] for each in json.loads(capsys.readouterr().out)] == [20, 40]


def test_watch_of_a_killed_run_ends_with_exit_code_3_and_what_to_do(
    measured: Any, store: FakeStore, trained: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    trained.update(status="running")
    write_json(trained.path / "environment.json", {"starts": [{"command": "dinobench pretrain dino"}]})
    assert app.run(["eval", "--watch", "--suite", "digits_knn", str(trained.path), "--json"]) == 3
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 2
    assert "was killed: no process works on it any more" in captured.err
    assert "`dinobench pretrain dino --resume`" in captured.err


@pytest.mark.parametrize("paths", [["no-such-run"], ["{run}", "{run}"], ["{run}/checkpoints/step=00000020.pt"]])
def test_watch_takes_one_run_folder(paths: list[str], trained: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["eval", "--watch", "--suite", "digits_knn", *(p.format(run=trained.path) for p in paths)]) == 2
    assert "--watch follows one run folder" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_told_from_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["eval", "--suite", "digits_knn", str(tmp_path)]) == 3
    assert "is a folder, a checkpoint file was expected" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_does_not_keep_the_others_from_being_measured(
    measured: Any, store: FakeStore, trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suites, absent = ["eval", "--suite", "digits_knn,digits_linear", "--json"], str(tmp_path / "absent.pt")
    files = [str(path) for path in trained.kept_checkpoints()]
    assert app.run([*suites, files[0], absent, files[1]]) == 3
    captured = capsys.readouterr()
    assert [each["provenance"]["step"] for each in json.loads(captured.out)] == [20, 20, 40, 40]
    (told,) = [line for line in captured.err.splitlines() if "not measured" in line]
    assert "digits_knn@1, digits_linear@1" in told
    assert "absent.pt" in captured.err
    assert app.run([*suites, absent]) == 3
