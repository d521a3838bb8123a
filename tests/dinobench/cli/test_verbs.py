from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dinobench import evaluate, mirror
from dinobench.cli import app, doctor, report
from dinobench.results import Result, ResultStore
from dinobench.runs import RunFolder
from dinobench.train import Summary


@pytest.mark.parametrize("what", ["methods", "ablations", "presets", "suites", "datasets"])
def test_ls_gives_names_with_descriptions(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["ls", what, "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert entries
    assert all(entry["name"] and entry["description"] for entry in entries)
    assert app.run(["ls", what]) == 0
    text = capsys.readouterr().out
    assert all(entry["name"] in text for entry in entries)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch, make_result: Callable[..., Result]) -> None:
    """Evaluation answers from the store, so that nothing is measured or logged."""

    def answer(checkpoint: Path, suites: Any, settings: Any, say: Any) -> tuple[list[Result], list]:
        say("stored result")
        return [make_result(suite=suite.id, from_cache=True, checkpoint=str(checkpoint)) for suite in suites], []

    monkeypatch.setattr(evaluate, "evaluate", answer)
    monkeypatch.setattr(evaluate, "evaluate_all", lambda checkpoints, *settings: answer(checkpoints[0], *settings))


def test_eval_prints_exactly_one_document(stored: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["eval", "--suite", "digits_knn", "a.pt", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["top1"], document["n"], document["from_cache"]) == (90.0, 500, True)
    assert document["interval"] == [88.0, 92.0]
    assert document["receipt"]
    assert "stored result" in captured.err


def test_eval_takes_suites_repeated_and_with_commas(stored: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--suite", "digits_knn,digits_linear", "--suite", "digits_knn", "a.pt", "b.pt", "--json"]
    assert app.run(arguments) == 0
    documents = json.loads(capsys.readouterr().out)
    assert [(entry["checkpoint"], entry["suite"]) for entry in documents] == [
        ("a.pt", "digits_knn@1"),
        ("a.pt", "digits_linear@1"),
        ("b.pt", "digits_knn@1"),
        ("b.pt", "digits_linear@1"),
    ]


def test_eval_says_what_came_from_the_cache(stored: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["eval", "--suite", "digits_knn", "a.pt"]) == 0
    assert "from the cache: digits_knn@1" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>", b"PK\x03\x04 cut short"])
def test_eval_refuses_what_is_no_checkpoint(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("bad.pt").write_bytes(content)
    assert app.run(["eval", "--suite", "digits_knn", "bad.pt", "--json"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "bad.pt" in captured.err


@pytest.fixture
def finished(run: RunFolder, make_result: Callable[..., Result]) -> RunFolder:
    run.journal.append({"loss/total": 0.5}, 40)
    ResultStore(run.path).save(make_result(), "a" * 64, None, pd.DataFrame(), {})
    run.update(status="finished", step=40, seconds=83.0, images_per_second=1200.0)
    return run


def test_runs_ls_shows_status_and_scores(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = finished.path.with_name("broken")
    damaged.mkdir()
    (damaged / "run.json").write_text("{")
    assert app.run(["runs", "ls", "--output", str(finished.path.parent), "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries[finished.name]["status"] == "finished"
    assert entries[finished.name]["scores"] == {"digits_knn top1": 90.0}
    assert entries["broken"]["status"] == "damaged"
    assert app.run(["runs", "ls", "--output", str(finished.path.parent)]) == 0
    assert "digits_knn top1 90.0" in capsys.readouterr().out


def test_runs_sync_replays_each_run(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    synced = []

    def sync(run: RunFolder, uri: str) -> dict[str, str]:
        synced.append((run, uri))
        return {"run page": "/#/experiments/1/runs/abc?workflowType=machine_learning"}

    monkeypatch.setattr(mirror, "sync", sync)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@host")
    assert app.run(["runs", "sync", str(finished.path)]) == 0
    assert synced == [(finished, "http://me:s3cret@host")]
    printed = capsys.readouterr().out
    assert "http://host/#/experiments/1/runs/abc?workflowType=machine_learning" in printed
    assert "s3cret" not in printed


def test_show_gives_the_state_of_a_run(finished: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["show", str(finished.path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["status"], facts["metrics"]["loss/total"]) == ("finished", 0.5)
    assert app.run(["show", str(finished.path.parent)]) == 3


def test_ui_needs_a_store_and_a_free_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert app.run(["ui", "--output", str(tmp_path)]) == 3
    assert "pretrain something first" in capsys.readouterr().err
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert app.run(["ui", "--output", str(tmp_path), "--port", str(server.getsockname()[1])]) == 3
    assert "--port" in capsys.readouterr().err


def test_ui_of_a_server_elsewhere_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s3cret@tracking.lab")
    assert app.run(["ui"]) == 0
    assert "https://me:***@tracking.lab" in capsys.readouterr().out


def test_doctor_reports_each_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["doctor", "--output", str(tmp_path), "--json"]) in (0, 3)
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert set(checks) == {"torch", "cuda", "faiss", "mlflow", "data"}
    assert "digits" in checks["data"]["found"]


@pytest.mark.parametrize(
    ("torch", "torchvision", "same"),
    [("2.11.0+cu132", "0.26.0+cu132", True), ("2.11.0+cpu", "0.26.0+cu132", False), ("2.11.0+cu132", "0.26.0", True)],
)
def test_builds_of_torch_and_torchvision_must_agree(torch: str, torchvision: str, same: bool) -> None:
    assert doctor.same_build(torch, torchvision) is same


def test_two_faiss_distributions_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "faiss_distributions", lambda: {"faiss-cpu": "1.15", "faiss-gpu": "1.15"})
    check = doctor.check_faiss()
    assert check.status == "broken"
    assert "share a folder" in check.advice


def test_a_check_that_fails_at_import_is_a_finding() -> None:
    def check_torch() -> doctor.Check:
        raise OSError("libcudart.so.12: cannot open shared object file")

    check = doctor._guarded(check_torch)
    assert (check.name, check.status) == ("torch", "broken")


def test_the_verdict_on_pixels_follows_the_numbers(make_result: Callable[..., Result]) -> None:
    knn = make_result(96.0)
    shots = make_result(
        70.0,
        suite="digits_fewshot@1",
        headline="shot1",
        scores={"shot1": 70.0},
        baselines={"raw_pixels": {"shot1": 63.2}},
    )
    text = report.against_pixels([knn, shots])
    assert text.startswith("Above raw pixels: digits_fewshot 70.0 against 63.2. Not above raw pixels: digits_knn 96.0")
    assert text.endswith("what pretraining adds shows in digits_fewshot.")
    assert report.against_pixels([make_result(98.9)]) == "Above raw pixels: digits_knn 98.9 against 97.8."


def test_features_no_better_than_random_weights_are_called_so(make_result: Callable[..., Result]) -> None:
    text = report.against_pixels([make_result(48.4)])
    assert text.endswith("Not above random init, so the training has not helped yet: digits_knn 48.4 against 60.9.")


def test_the_summary_names_numbers_checkpoint_command_and_pages(
    finished: RunFolder,
    make_result: Callable[..., Result],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (finished.checkpoints / "step=00000040.pt").touch()
    links = {"digits-v1 models": "/#/experiments/2/models?workflowType=machine_learning"}
    summary = Summary(finished, finished.state(), True, [make_result()], [], links)
    report.print_summary(summary, finished.path.parent)
    text = capsys.readouterr().out
    for part in ("finished, 40 steps in 1:23, 1200 img/s", "raw pixels", "random init", "88.0-92.0", "60.9"):
        assert part in text
    assert f"dinobench eval --suite digits_knn {finished.checkpoints}/step=00000040.pt" in text
    assert f"sqlite:///{finished.path.parent}/mlflow.db" in text
    assert "http://127.0.0.1:5000/#/experiments/2/models?workflowType=machine_learning" in text
    document = report.summary_document(summary, finished.path.parent)
    assert json.loads(json.dumps(document))["results"][0]["top1"] == 90.0
