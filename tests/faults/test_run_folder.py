"""A run folder that was damaged, altered or half lost: named, mended where it can be, never begun again unasked."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from breaking import DINOBENCH, QUIET, TINY, command, run_of, start, tiny, until
from dinobench import runs
from dinobench.cli import app
from dinobench.evaluate import Evaluation, evaluate
from dinobench.runs import RunFolder
from dinobench.watch import watch
from pretrain.errors import DinobenchError
from pretrain.models import checkpoint
from pretrain.training.loop import train
from suites.suite import load_suite

EVERY = "checkpoint.every_steps=3"


@pytest.fixture
def stopped(tmp_path: Path) -> RunFolder:
    """A run that was ended after 7 of 10 steps, with a checkpoint there."""
    recipe = tiny(*QUIET, EVERY)
    run = run_of(recipe, tmp_path / "runs")
    for step in range(1, 8):
        run.journal.append({"loss/total": 1.0 / step}, step)
    until(recipe, run.path, 7)
    run.update(status="interrupted", step=7)
    return run


def resume(run: RunFolder, **options: Any) -> Any:
    return start(tiny(*QUIET, EVERY), run.path.parent, resume=True, **options)


def refused(run: RunFolder, match: str, *, resumed: bool = True) -> None:
    """A start ends with 3, and has written no checkpoint."""
    before = {path.name: path.read_bytes() for path in run.checkpoints.iterdir()}
    with pytest.raises(DinobenchError, match=match) as error:
        start(tiny(*QUIET, EVERY), run.path.parent, resume=resumed)
    assert error.value.exit_code == 3
    assert {path.name: path.read_bytes() for path in run.checkpoints.iterdir()} == before


@pytest.mark.promise("run.json empty or cut short", "named with the way out: moved away, --resume goes on")
@pytest.mark.parametrize("content", ["", '{"key": "a", "sta', "[]", '{"status": 7}', "\0" * 200], ids=repr)
def test_a_damaged_state_is_named_and_the_run_goes_on_without_it(content: str, stopped: RunFolder) -> None:
    stopped.state_file.write_text(content)
    refused(stopped, r"run\.json (is not a JSON document|was altered).*move it away")
    stopped.state_file.unlink()
    assert resume(stopped).state.status == "finished"


@pytest.mark.promise("run.json removed, checkpoints there", "not begun again over them: it asks for --resume")
def test_a_lost_state_does_not_begin_a_run_again(stopped: RunFolder, tmp_path: Path) -> None:
    stopped.state_file.unlink()
    refused(stopped, r"has a checkpoint .* run\.json is gone: --resume", resumed=False)
    assert start(tiny(*QUIET, EVERY), stopped.path.parent, new=True).run.name == f"{stopped.name}-2"
    stopped_again = RunFolder(stopped.path)
    assert checkpoint.read(stopped_again.last_checkpoint)["step"] == 7


@pytest.mark.promise("run.json removed, --resume", "the weights are those of the undisturbed run")
def test_a_run_that_lost_its_state_ends_with_the_same_weights(stopped: RunFolder, tmp_path: Path) -> None:
    stopped.state_file.unlink()
    summary = resume(stopped)
    assert summary.run == stopped
    train(tiny(*QUIET, EVERY), folder=tmp_path / "whole")
    one, other = (checkpoint.read(p / "checkpoints" / "last.pt")["teacher"] for p in (stopped.path, tmp_path / "whole"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.promise("recipe.yaml damaged", "named with the way out: removed, --resume writes it again")
@pytest.mark.parametrize(
    "content", [b"", b"a: [", b"\xff\xfe\x00bad", b"- 1\n- 2\n", b"data: 5\n", b"seed: 2026-01-01\n"], ids=repr
)
def test_a_damaged_recipe_is_named_and_written_again(content: bytes, stopped: RunFolder) -> None:
    good = stopped.recipe_file.read_bytes()
    stopped.recipe_file.write_bytes(content)
    refused(stopped, r"recipe\.yaml")
    stopped.recipe_file.unlink()
    assert resume(stopped).state.status == "finished"
    assert stopped.recipe_file.read_bytes() == good


@pytest.mark.promise("recipe.yaml edited in a run folder", "told by both ids; nothing is trained with other numbers")
def test_an_edited_recipe_is_refused(stopped: RunFolder) -> None:
    recipe = yaml.safe_load(stopped.recipe_file.read_text())
    recipe["optim"]["lr"] = 0.123
    stopped.recipe_file.write_text(yaml.safe_dump(recipe))
    refused(stopped, r"holds another recipe \(id \w+, this one is \w+\).*was changed")


def alter(run: RunFolder, **changes: Any) -> None:
    payload = {**checkpoint.read(run.last_checkpoint), **changes}
    run.last_checkpoint.unlink()
    checkpoint.save(run.last_checkpoint, payload)


@pytest.mark.promise("a checkpoint of a newer format", "told by both formats; exit 3")
def test_a_checkpoint_of_a_newer_format_is_named(stopped: RunFolder) -> None:
    alter(stopped, format="dinobench-checkpoint-9")
    refused(stopped, r"format 'dinobench-checkpoint-9', expected dinobench-checkpoint-1.*newer version")


@pytest.mark.promise("a checkpoint whose recipe this version does not know", "told as of another version; exit 3")
def test_a_checkpoint_with_unknown_keys_of_the_recipe_is_named(stopped: RunFolder) -> None:
    recipe = checkpoint.read(stopped.last_checkpoint)["recipe"]
    recipe["optim"]["momentum_of_next_year"] = 0.5
    alter(stopped, recipe=recipe)
    refused(stopped, r"last\.pt does not fit this recipe .*momentum_of_next_year.*another version")


@pytest.mark.promise("a checkpoint with another number of prototypes", "told with the tensor; exit 3")
def test_a_checkpoint_with_other_shapes_is_named(stopped: RunFolder) -> None:
    payload = checkpoint.read(stopped.last_checkpoint)
    for network in ("student", "teacher"):
        for name, value in payload[network].items():
            if value.ndim and 16 in value.shape[:1] and name.startswith("head."):
                payload[network][name] = torch.cat([value, value])
    alter(stopped, student=payload["student"], teacher=payload["teacher"])
    refused(stopped, r"last\.pt does not fit this recipe .*size mismatch")


@pytest.mark.promise("a checkpoint without its optimiser", "named, exit 3; not resumed with a new one")
def test_a_checkpoint_without_a_part_is_named(stopped: RunFolder) -> None:
    alter(stopped, optimizer={})
    refused(stopped, r"last\.pt does not fit this recipe")


@pytest.mark.promise("a checkpoint of another recipe in the folder", "told by both ids; exit 3")
def test_a_checkpoint_of_another_recipe_is_refused(stopped: RunFolder) -> None:
    recipe = checkpoint.read(stopped.last_checkpoint)["recipe"]
    recipe["optim"]["lr"] = 0.123
    alter(stopped, recipe=recipe)
    refused(stopped, r"written by the recipe \w+, this run is \w+")


@pytest.mark.promise("metrics.jsonl with a half last line", "the whole lines count; resuming closes the gap")
@pytest.mark.promise("garbage in the middle of metrics.jsonl", "the other lines count")
@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xfe\x00\x9d\n",
        b"\0" * 512 + b"\n",
        b"5\n[]\nnull\n",
        b'{"step": "x", "time": 1, "metrics": {}}\n',
        b'{"step": 2.5, "time": 1, "metrics": {}}\n',
        b'{"step": 2, "time": 1, "metrics": ["a"]}\n',
        b'{"step": 2, "time": 1, "metrics": {"a": "b"}}\n',
        b"[" * 100_000 + b"\n",
        b'{"step": 3, "time": 1.0, "metr\xe2\x80\xa8ics\n',
    ],
    ids=lambda value: repr(value[:30]),
)
def test_a_damaged_journal_keeps_its_whole_lines(garbage: bytes, tmp_path: Path) -> None:
    run = run_of(tiny(*QUIET), tmp_path)
    for step in (1, 2, 3, 4):
        run.journal.append({"loss/total": 1.0 / step}, step)
    lines = run.journal.path.read_bytes().splitlines(keepends=True)
    run.journal.path.write_bytes(b"".join([*lines[:2], garbage, *lines[2:]])[:-9])
    assert [point.step for point in run.journal.read()] == [1, 2, 3]
    run.journal.cut(2)
    assert [json.loads(line)["step"] for line in run.journal.path.read_text().splitlines()] == [1, 2]


@pytest.mark.promise("a stored result cut short", "its suite fails by name, the others are measured")
@pytest.mark.parametrize("content", ["", '{"schema_version": 9}'], ids=repr)
def test_a_damaged_result_does_not_stop_the_other_suites(
    content: str, stopped: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("digits_knn", "digits_fewshot")
    settings = Evaluation(output=stopped.path.parent, device="cpu")

    def measure(*chosen: str) -> tuple[list[str], list[str]]:
        suites = [load_suite(name) for name in chosen]
        results, failures = evaluate(stopped.last_checkpoint, suites, settings, lambda text: None)
        return [r.suite_name for r in results], [f"{f.suite}: {f.reason}" for f in failures]

    assert measure("digits_knn") == (["digits_knn"], [])
    (file,) = stopped.path.glob("evals/digits_knn@*/*.json")
    file.write_text(content)
    done, failed = measure(*names)
    assert done == ["digits_fewshot"]
    assert len(failed) == 1 and file.name in failed[0]
    assert "delete it" in failed[0] or "move it away" in failed[0]
    file.unlink()
    assert measure(*names) == (list(names), [])


@pytest.mark.promise("a suite's definition edited after its result was stored", "measured again, not taken over")
def test_a_result_of_another_definition_is_not_taken(stopped: RunFolder, tmp_path: Path) -> None:
    definition = tmp_path / "mine.yaml"
    base = {"name": "mine", "version": 1, "protocol": "knn", "headline": "top1", "parameters": {"k": [20]}}
    settings = Evaluation(output=stopped.path.parent, device="cpu", data="digits")

    def measured(k: int) -> list[str]:
        said: list[str] = []
        parameters = {**load_suite("digits_knn").model_dump(mode="json"), "name": "mine", "version": 1}
        parameters["parameters"] = {**parameters["parameters"], "k": [20, k]}
        definition.write_text(yaml.safe_dump({**base, **parameters}))
        evaluate(stopped.last_checkpoint, [load_suite(str(definition))], settings, said.append)
        return said

    assert any("measuring" in line for line in measured(5))
    assert any("stored result" in line for line in measured(5))
    assert any("measuring" in line for line in measured(10))


@pytest.mark.promise("environment.json damaged", "named with the way out; exit 3")
@pytest.mark.parametrize("content", ["", "{}", "[]", '{"starts": 5}', '{"starts": [5]}'], ids=repr)
def test_a_damaged_list_of_starts_is_named(content: str, stopped: RunFolder) -> None:
    (stopped.path / "environment.json").write_text(content)
    refused(stopped, r"environment\.json .*(damaged|JSON).*move it away")
    (stopped.path / "environment.json").unlink()
    assert resume(stopped).state.status == "finished"


@pytest.mark.promise("one damaged run among others", "`runs ls` lists it as damaged, and the others")
def test_a_damaged_run_does_not_hide_the_others(stopped: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    other = start(tiny(*QUIET, EVERY), stopped.path.parent, new=True).run
    stopped.state_file.write_text("")
    assert app.run(["runs", "ls", "--output", str(stopped.path.parent), "--json"]) == 0
    listed = {entry["name"]: entry["status"] for entry in json.loads(capsys.readouterr().out)}
    assert listed == {stopped.name: "damaged", other.name: "finished"}


@pytest.mark.promise("a lock file left by a process that died", "the next start takes it")
def test_a_lock_file_alone_blocks_nobody(stopped: RunFolder) -> None:
    (stopped.path / ".lock").write_text("12345\n")
    assert resume(stopped).state.status == "finished"


@pytest.mark.promise("a lock held by a live process of another host", "told with host and process, nothing is touched")
def test_a_lock_of_another_host_is_told_with_its_holder(stopped: RunFolder) -> None:
    hold = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", hold, str(stopped.path / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"held\n"
        stopped.update(status="running", process="node17:4242")
        (stopped.path / ".holder").write_text("node17:4242")
        refused(stopped, r"another process \(node17:4242\) is working on")
        process.stdin.close()
    assert resume(stopped).state.status == "finished"


@pytest.mark.promise("a run killed on another host without shared locks", "running until its files are silent")
def test_a_watch_waits_for_a_run_of_another_host(stopped: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinobench.watch import Pulse

    stopped.update(status="running", process="node17:4242")
    assert socket.gethostname() != "node17"
    clock = [0.0]
    monkeypatch.setattr("dinobench.watch.time.monotonic", lambda: clock[0])
    pulse = Pulse(stopped, silence=300)
    assert pulse.status() == "running"
    clock[0] = 200.0
    os.utime(stopped.log_file if stopped.log_file.exists() else stopped.state_file)
    assert pulse.status() == "running"
    clock[0] = 501.0
    assert pulse.status() == "killed"
    assert callable(watch) and runs.describe_status(stopped) == "killed"


@pytest.mark.slow
@pytest.mark.promise("a terminal that closes (SIGHUP)", "a checkpoint, exit 143, and the run is resumed")
@pytest.mark.promise("a terminal that closes under nohup", "the training goes on to its end")
@pytest.mark.parametrize("ignored", [False, True], ids=["plain", "nohup"])
def test_a_closed_terminal_ends_a_training_with_a_checkpoint(ignored: bool, tmp_path: Path) -> None:
    def begin() -> None:
        # also where the tests themselves run under nohup
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    arguments = ["pretrain", "dino", "--preset", "digits", *TINY, *QUIET, "--no-eval", "--output", str(tmp_path)]
    arguments += ["schedule.steps_per_epoch=30", "runtime.log_every=1"]
    with subprocess.Popen([*DINOBENCH, *arguments], stderr=subprocess.PIPE, text=True, preexec_fn=begin) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step "):
                break
        process.send_signal(signal.SIGHUP)
        process.stderr.close()  # and nobody reads it any more
        code = process.wait(300)
    (folder,) = tmp_path.glob("dino-*")
    state = RunFolder(folder).state()
    if ignored:
        assert (code, state.status) == (0, "finished")
        return
    assert (code, state.status, state.note) == (143, "interrupted", "SIGHUP")
    assert 0 < checkpoint.read(folder / "checkpoints" / "last.pt")["step"] == state.step
    done = command(*arguments, "--resume")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.promise("`| tee` dies during a training (broken pipe)", "the training goes on, train.log too")
def test_a_broken_pipe_does_not_end_a_training(tmp_path: Path) -> None:
    arguments = ["pretrain", "dino", "--preset", "digits", *TINY, *QUIET, "--no-eval", "--output", str(tmp_path)]
    read, write = os.pipe()
    with subprocess.Popen([*DINOBENCH, *arguments], stdout=write, stderr=write) as process:
        os.close(write)
        os.close(read)
        process.wait(300)
    (folder,) = tmp_path.glob("dino-*")
    assert RunFolder(folder).state().status == "finished"
    assert "checkpoint step=00000010.pt at step 10" in (folder / "train.log").read_text()


@pytest.mark.promise("stdout and stderr closed, as by a bare cron", "the training goes on")
def test_a_closed_stdout_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert app.run(["ls", "methods"]) == 0
    assert sys.stdout is not None
    sys.stdout.close()
