from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from dinobench import condition, environment
from dinobench.cli import app
from dinobench.condition import diagnose
from dinobench.files import write_json
from dinobench.results import Result, ResultStore
from dinobench.runs import RunFolder, find_run
from pretrain.errors import DinobenchError
from pretrain.models import checkpoint_file
from pretrain.training.recipe import Recipe, resolve

COMMAND = "dinobench pretrain dino --output 'my runs' --resume"
RESUME = "dinobench pretrain dino --output 'my runs' --resume"


def write_checkpoint(run: RunFolder, name: str, step: int) -> Path:
    payload = {"format": checkpoint_file.FORMAT, "step": step, "student": {"w": torch.ones(500)}}
    checkpoint_file.save(run.checkpoints / name, payload)
    return run.checkpoints / name


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def started(run: RunFolder) -> RunFolder:
    """A run that was started here, logged step 40 and wrote a checkpoint."""
    run.started(environment.describe(COMMAND, "cpu", "2026-01-01T00:00:00Z", None))
    run.journal.append({"loss/total": 0.5}, 40)
    write_checkpoint(run, "last.pt", 40)
    return run


def commands(run: RunFolder) -> list[str]:
    return [todo.command for todo in diagnose(run).todo]


def test_a_run_at_work_says_who_trains_it_and_where_and_how_far_it_is(started: RunFolder) -> None:
    with RunFolder(started.path).lock():
        found = diagnose(started)
    assert found.status == "running"
    assert f"process {os.getpid()} on {socket.gethostname()} trains it, at step 40 as of 0:0" in found.says
    assert found.todo == []


def test_a_run_at_work_that_writes_nothing_may_hang(started: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(condition, "SILENT_SECONDS", -1.0)
    with RunFolder(started.path).lock():
        (todo,) = diagnose(started).todo
    assert "may hang" in todo.reason and str(started.log_file) in todo.reason


@pytest.mark.promise("a run was killed", "`runs show` says so, where it was, and the command that continues it")
def test_a_killed_run_is_resumed_by_its_own_command(started: RunFolder) -> None:
    found = diagnose(started)
    assert found.status == "killed"
    assert f"as process {os.getpid()} on {socket.gethostname()}, and no process works on it" in found.says
    assert "at step 40" in found.says and found.says.endswith("it can be resumed.")
    assert commands(started) == [RESUME]


def test_a_killed_run_without_a_checkpoint_begins_again(started: RunFolder) -> None:
    started.last_checkpoint.unlink()
    assert "no checkpoint yet, so --resume begins again" in diagnose(started).says


def test_a_run_of_another_machine_is_judged_with_care(started: RunFolder) -> None:
    started.update(process="node7:123")
    assert f"on node7, and no process works on it any more (as seen from {socket.gethostname()}; ask on node7" in (
        diagnose(started).says
    )


@pytest.mark.parametrize(
    ("status", "note", "says"),
    [
        ("interrupted", "SIGTERM", "interrupted by SIGTERM after a checkpoint at step 40; it can be resumed."),
        ("failed", "loss/total is not finite", "failed: loss/total is not finite. It can be resumed."),
        ("failed", "", "failed, and nothing was noted. It can be resumed."),
    ],
)
def test_an_unfinished_run_says_why_and_how_to_go_on(status: Any, note: str, says: str, started: RunFolder) -> None:
    started.update(status=status, note=note, step=40)
    found = diagnose(started)
    assert (found.status, found.says) == (status, says)
    assert commands(started) == [RESUME]


def test_a_collapsed_run_wants_another_recipe(started: RunFolder) -> None:
    started.update(status="collapsed", note="the training collapsed (uniform)")
    found = diagnose(started)
    assert found.says.startswith("stopped because the training collapsed: the training collapsed (uniform).")
    assert commands(started) == [f"{RESUME} runtime.stop_on_collapse=false"]


def test_a_finished_run_needs_nothing(started: RunFolder) -> None:
    started.update(status="finished", step=40, seconds=83.0)
    found = diagnose(started)
    assert (found.says, found.todo) == ("finished after 40 steps in 1:23 of training.", [])
    with RunFolder(started.path).lock():
        assert "works in its folder, on evaluations or figures" in diagnose(started).says


def test_a_command_is_given_as_it_works_from_here(
    started: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = Path.cwd()
    monkeypatch.chdir(tmp_path)
    assert commands(started) == [f"cd {before} && {RESUME}"]
    (started.path / "environment.json").unlink()  # killed before it was noted
    assert commands(started) == [
        f"dinobench pretrain {started.recipe_file} --output {started.path.parent} --resume",
    ]


def test_a_run_of_several_ranks_is_resumed_on_as_many(run: RunFolder) -> None:
    run.started(environment.describe("dinobench pretrain dino --new", "cpu", "2026-01-01T00:00:00Z", None, ranks=8))
    assert commands(run) == ["torchrun --no-python --nproc-per-node 8 dinobench pretrain dino --resume"]


@pytest.fixture
def tracked(tmp_path: Path) -> RunFolder:
    """A finished run whose recipe asks for MLflow and two suites, of a method without prototypes."""
    suites = "evaluation.suites=[digits_knn, digits_prototypes]"
    run = find_run(resolve("simclr", overrides=("schedule.epochs=2", "schedule.warmup_epochs=1", suites)), tmp_path)
    recipe: Recipe = resolve("simclr", overrides=("schedule.epochs=2", "schedule.warmup_epochs=1", suites))
    run.create(recipe)
    run.started(environment.describe("dinobench pretrain simclr", "cpu", "2026-01-01T00:00:00Z", None))
    return run


def test_what_mlflow_lacks_is_synced_and_what_it_shows_open_is_reaped(tracked: RunFolder, tmp_path: Path) -> None:
    sync, reap = f"dinobench runs sync {tracked.path}", f"dinobench runs reap --output {tmp_path}"
    assert commands(tracked)[1:] == [sync, reap]
    tracked.update(status="finished")
    assert commands(tracked) == [sync]
    tracked.update(mirrored=True)
    assert commands(tracked) == []


def test_evaluations_that_are_lacking_are_named_with_their_command(
    tracked: RunFolder, make_result: Callable[..., Result]
) -> None:
    tracked.update(status="finished", mirrored=True)
    path = write_checkpoint(tracked, "step=00000040.pt", 40)
    assert commands(tracked) == [f"dinobench eval {tracked.path} --suite digits_knn"]  # not those of prototypes
    from suites.suite import load_suite

    suite, digest = load_suite("digits_knn"), checkpoint_file.file_sha256(path)
    result = make_result(suite=suite.id, suite_fingerprint=suite.fingerprint())
    ResultStore(tracked.path).save(result, digest, None, pd.DataFrame(), {})
    assert commands(tracked) == []


@pytest.mark.promise("a checkpoint was damaged on the disk", "`runs show` names it and says what is resumed from")
def test_every_checkpoint_is_read_and_a_damaged_one_named(started: RunFolder) -> None:
    kept = write_checkpoint(started, "step=00000020.pt", 20)
    spoil(started.last_checkpoint)
    found = diagnose(started)
    assert {checkpoint.name: bool(checkpoint.damage) for checkpoint in found.checkpoints} == {
        kept.name: False,
        "last.pt": True,
    }
    assert [todo.command for todo in found.todo] == [RESUME, ""]
    assert "last.pt is damaged: the checksum" in found.todo[1].reason
    spoil(kept)
    first = diagnose(started).todo[0]
    assert first.reason.startswith("every checkpoint is damaged")
    assert first.command == RESUME.replace("--resume", "--new")


def test_a_damaged_state_is_a_finding(started: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(started.state_file, {"status": "asleep"})
    found = diagnose(started)
    assert (found.status, len(found.checkpoints)) == ("damaged", 1)
    assert "run.json was altered" in found.says
    assert app.run(["runs", "show", str(started.path)]) == 0
    assert "run.json was altered" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [["runs", "show"], ["show"]])
def test_both_commands_say_the_same(verb: list[str], started: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([*verb, str(started.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{started.name}: killed: it was at work as process")
    assert lines[1:3] == ["- continue where it stopped:", f"    {RESUME}"]
    assert any(line.startswith("  last.pt: whole, ") for line in lines)
    assert app.run([*verb, str(started.path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["status"], document["step"], document["todo"][0]["command"]) == ("killed", 40, RESUME)
    assert app.run([*verb, str(started.path.parent)]) == 3


def test_a_start_without_resume_is_refused_at_a_run_that_is_not_finished(started: RunFolder) -> None:
    with pytest.raises(DinobenchError, match=r"unfinished run of this recipe \(it was killed\): .*--resume"):
        condition.refuse_unfinished(started)
    with RunFolder(started.path).lock(), pytest.raises(DinobenchError, match=rf":{os.getpid()} works on it: wait"):
        condition.refuse_unfinished(started)
    started.update(status="finished")
    condition.refuse_unfinished(started)
    started.state_file.unlink()
    with pytest.raises(DinobenchError, match="its run.json is gone: --resume"):
        condition.refuse_unfinished(started)
