"""A full disk, a read-only one, a folder that goes away: what was whole stays whole, and the way out is said."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest
import torch

from breaking import (
    QUIET,
    TINY,
    Listener,
    command,
    leftovers,
    nobody,
    read_only,
    read_only_disk,
    room,
    small_disk,
    start,
    tiny,
    until,
)
from dinobench import files, plots
from dinobench.cli import app
from dinobench.files import read_json, write_text
from dinobench.journal import Journal
from dinobench.results import Result, ResultStore
from pretrain.errors import DinobenchError
from pretrain.models import checkpoint
from pretrain.training.checkpoints import CheckpointFolder
from pretrain.training.loop import train

WAY_OUT = r"free some space there"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    payload = checkpoint.read(folder / "checkpoints" / "last.pt")
    return {f"{net}.{name}": value for net in ("student", "teacher") for name, value in payload[net].items()}


def result(number: int = 0) -> Result:
    return Result(
        suite="digits_knn@1",
        suite_fingerprint="f00",
        protocol="knn",
        dataset="digits",
        headline="top1",
        scores={"top1": 90.0 + number},
        n=500,
        interval=(88.0, 92.0),
        baselines={},
        seed=0,
        checkpoint="x.pt",
        provenance={"sha256": "a" * 64, "step": 5},
        receipt={},
        seconds=1.0,
        created="2026-01-01T00:00:00Z",
    )


@pytest.mark.promise(
    "disk full while last.pt is written", "the last one stays whole, exit 3; resume gives equal weights"
)
def test_a_checkpoint_that_does_not_fit_leaves_the_last_one_and_the_training_can_be_resumed(tmp_path: Path) -> None:
    recipe = tiny("checkpoint.every_steps=3")
    train(recipe, folder=tmp_path / "whole")
    until(recipe, tmp_path / "parts", 3)
    before = (tmp_path / "parts" / "checkpoints" / "last.pt").read_bytes()
    with room(len(before) // 2), pytest.raises(DinobenchError, match=r"cannot write .*check the free space") as error:
        train(recipe, folder=tmp_path / "parts", resume=True)
    assert error.value.exit_code == 3
    assert (tmp_path / "parts" / "checkpoints" / "last.pt").read_bytes() == before
    assert leftovers(tmp_path / "parts") == []
    train(recipe, folder=tmp_path / "parts", resume=True)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name]), name


class _Writer:
    """A trainer of which only the writing is of interest."""

    def save(self, path: Path, step: int) -> None:
        checkpoint.save(path, {"format": checkpoint.FORMAT, "step": step, "student": {"w": torch.ones(5000)}})


@pytest.mark.promise("no hard links, and disk full while a checkpoint is copied", "last.pt and kept ones stay whole")
def test_a_copy_that_does_not_fit_leaves_last_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.write(_Writer(), 5, kept=True)

    def no_links(*names: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def half(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", no_links)
    with monkeypatch.context() as full:
        full.setattr(shutil, "copyfile", half)
        with pytest.raises(DinobenchError, match=r"cannot write .*last\.pt.*No space left"):
            folder.write(_Writer(), 10, kept=True)
    assert checkpoint.read(folder.last)["step"] == 5
    assert leftovers(tmp_path) == []
    folder.write(_Writer(), 10, kept=True)
    assert checkpoint.read(folder.last)["step"] == 10


@pytest.mark.promise("a kill between linking and renaming last.pt", "the next start overwrites no kept checkpoint")
def test_a_second_name_left_by_a_kill_is_not_written_through(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    folder.write(_Writer(), 5, kept=True)
    for name in (f".last.pt.{os.getpid()}", ".last.pt.spare"):
        os.link(folder.path(5), tmp_path / name)
    folder.write(_Writer(), 10, kept=True)
    assert [checkpoint.read(path)["step"] for path in folder.kept()] == [5, 10]


@pytest.mark.promise("disk full while metrics.jsonl is written", "whole lines stay, exit 3; resuming closes the gap")
def test_metrics_that_do_not_fit_end_the_run_with_its_points_and_checkpoint(tmp_path: Path) -> None:
    recipe = tiny(*QUIET, "checkpoint.every_steps=2")
    listener = Listener(lambda step: limit.__enter__() if step == 5 else None)
    limit = room(1500)
    try:
        with pytest.raises(DinobenchError, match=rf"cannot write .*metrics\.jsonl.*{WAY_OUT}"):
            start(recipe, tmp_path, listener)
    finally:
        limit.__exit__(None, None, None)
    (folder,) = tmp_path.glob("dino-*")
    run = start(recipe, tmp_path, resume=True).run
    assert run.path == folder
    steps = [point.step for point in run.journal.read() if "loss/total" in point.metrics]
    assert steps == [2, 4, 6, 8, 10]


@pytest.mark.promise("disk full while run.json is updated", "the cause is told, not the second failure; resume works")
def test_what_ended_a_run_is_told_also_where_the_status_cannot_be_written(tmp_path: Path) -> None:
    recipe = tiny(*QUIET, "checkpoint.every_steps=2")
    limit = room(64)
    listener = Listener(lambda step: limit.__enter__() if step == 3 else None)
    try:
        with pytest.raises(DinobenchError, match=r"last\.pt|metrics\.jsonl"):
            start(recipe, tmp_path, listener)
    finally:
        limit.__exit__(None, None, None)
    assert listener.warned("run.json")
    (file,) = tmp_path.glob("dino-*/run.json")
    assert read_json(file)["status"] == "running"  # nobody holds its lock: told as killed
    assert start(recipe, tmp_path, resume=True).state.status == "finished"


def write_results_json(folder: Path, number: int) -> Path:
    return ResultStore(folder).save(result(number), "a" * 64, None, pd.DataFrame(), {})


def write_parquet(folder: Path, number: int) -> Path:
    frame = pd.DataFrame({"index": range(5000 + number), "correct": [number > 0] * (5000 + number)})
    ResultStore(folder).save(result(), "a" * 64, None, frame, {})
    (file,) = folder.glob("samples/*/*.parquet")
    return file


def write_figure(folder: Path, number: int) -> Path:
    figure = plots.new_figure(1, 1)
    figure.axes[0].plot([0, number])
    return plots.save(figure, folder / "loss.png")


def write_metrics_again(folder: Path, number: int) -> Path:
    journal = Journal(folder / "metrics.jsonl")
    if not number:
        for step in range(100):
            journal.append({"loss/total": 1.0}, step)
    else:
        journal.cut(90)
    return journal.path


WRITERS = {
    "results JSON": write_results_json,
    "parquet of samples": write_parquet,
    "figure": write_figure,
    "metrics.jsonl at a resume": write_metrics_again,
}


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(write, marks=pytest.mark.promise(f"disk full: {name}", "the old one stays whole; exit 3"), id=name)
        for name, write in WRITERS.items()
    ],
)
def test_a_file_that_does_not_fit_leaves_the_old_one_whole(write: Callable[[Path, int], Path], tmp_path: Path) -> None:
    path = write(tmp_path, 0)
    before = path.read_bytes()
    with room(min(len(before) // 2, 4096)), pytest.raises(DinobenchError, match=rf"cannot write .*{WAY_OUT}") as error:
        write(tmp_path, 1)
    assert error.value.exit_code == 3
    assert path.read_bytes() == before
    assert leftovers(tmp_path) == []
    write(tmp_path, 1)
    assert path.read_bytes() != before


@pytest.mark.slow
@pytest.mark.promise("disk full while figures are drawn", "the run is finished and evaluated all the same; it is said")
def test_figures_that_do_not_fit_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise files.not_writable(path, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(plots, "write_bytes", full)
    listener = Listener()
    recipe = tiny("tracking.enabled=false", "evaluation.suites=[digits_knn]")
    summary = start(recipe, tmp_path, listener, figures=True)
    assert summary.state.status == "finished"
    assert len(summary.results) == 2
    assert listener.warned("no figures: cannot write")


@pytest.mark.promise("disk full: train.log", "the run goes on and says that messages are no longer kept")
def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Listener()
    listener._silent = False
    listener.keep(tmp_path / "train.log")
    listener.say("one")
    with room(8):
        listener.say("two words that do not fit")
    listener.say("three")
    assert listener.warned("train.log cannot be written any more")
    assert (tmp_path / "train.log").read_text().count("\n") <= 2


@pytest.mark.promise("an output folder that may not be written", "told before anything is computed; exit 3")
def test_a_read_only_output_folder_is_told_before_the_training(tmp_path: Path) -> None:
    output = tmp_path / "runs"
    output.mkdir()
    recipe = tiny(*QUIET)
    assert recipe.data.open()  # what is imported late must be readable
    read_only(output)
    with nobody(), pytest.raises(DinobenchError, match=r"cannot write .*permission denied.*--output"):
        start(recipe, output)
    assert not list(output.iterdir())


@pytest.mark.promise("output folder deleted during the run", "exit 3 with its name; nothing is written elsewhere")
def test_a_run_folder_that_is_deleted_ends_the_run_with_its_name(tmp_path: Path) -> None:
    recipe = tiny(*QUIET)
    listener = Listener(lambda step: shutil.rmtree(tmp_path / "runs") if step == 3 else None)
    with pytest.raises(DinobenchError, match=r"cannot write .*runs.*no such file") as error:
        start(recipe, tmp_path / "runs", listener)
    assert error.value.exit_code == 3
    assert listener.warned("run.json")
    assert start(recipe, tmp_path / "runs").state.status == "finished"


@pytest.mark.promise("a write fails in code that does not expect it", "exit 3 with the path, no traceback")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.ESTALE])
def test_a_failure_of_the_disk_is_no_bug(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(output: Path) -> None:
        raise OSError(number, os.strerror(number), "/data/file")

    monkeypatch.setattr("dinobench.runs.list_runs", fail)
    assert app.run(["runs", "ls"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: /data/file: ") and os.strerror(number).lower() in error
    assert "Traceback" not in error


@pytest.mark.faults
@pytest.mark.promise("a real full disk under a whole run", "exit 3, path named; with room it ends with equal weights")
def test_a_run_on_a_full_disk_goes_on_when_there_is_room_again(tmp_path: Path, figure: Callable[..., None]) -> None:
    arguments = ("pretrain", "dino", "--preset", "digits", *TINY, "evaluation.suites=[]", "checkpoint.every_steps=2")
    whole = command(*arguments, "--no-eval", "tracking.enabled=false", "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    (whole_folder,) = (tmp_path / "whole").glob("dino-*")
    size = (whole_folder / "checkpoints" / "last.pt").stat().st_size
    disk = tmp_path / "disk"
    with small_disk(disk, f"{int(1.7 * size)}") as again:  # one checkpoint, and not the next beside it
        full = command(*arguments, "--no-eval", "tracking.enabled=false", "--output", disk / "runs")
        assert full.returncode == 3, full.stderr
        assert "error: cannot write" in full.stderr and str(disk) in full.stderr
        assert "Traceback" not in full.stderr
        (folder,) = (disk / "runs").glob("dino-*")
        assert checkpoint.read(folder / "checkpoints" / "last.pt")["step"] == 2
        assert leftovers(folder) == []
        again("size=64m")
        done = command(*arguments, "--no-eval", "tracking.enabled=false", "--output", disk / "runs", "--resume")
        assert done.returncode == 0, done.stderr
        for name, value in weights(whole_folder).items():
            assert torch.equal(value, weights(folder)[name]), name


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")
@pytest.mark.promise("disk full: sqlite of MLflow", "the training ends well and says so; sync logs the rest, once")
def test_mlflows_database_on_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinobench import mirror, tracking

    recipe = tiny("evaluation.suites=[]")
    with small_disk(tmp_path / "disk", "4m") as again:
        uri = f"sqlite:///{tmp_path / 'disk' / 'mlflow.db'}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        store = tracking.connect(uri)
        free = shutil.disk_usage(tmp_path / "disk").free
        (tmp_path / "disk" / "filler").write_bytes(bytes(free))
        listener = Listener()
        summary = start(recipe, tmp_path / "runs", listener)
        assert summary.state.status == "finished" and not summary.state.mirrored
        assert listener.warned("runs sync")
        again("size=64m")
        mirror.sync(summary.run, uri)
        run_id = store.find_pretraining(summary.state.key)
        assert run_id is not None
        logged = [m.step for m in store.client.get_metric_history(run_id, "loss/total")]
        assert logged == [2, 4, 6, 8, 10]


@pytest.mark.faults
@pytest.mark.promise("a disk that becomes read-only during the run", "exit 3, path named; what was written stays whole")
def test_a_disk_that_becomes_read_only_ends_the_run_with_its_name(tmp_path: Path) -> None:
    recipe = tiny(*QUIET, "checkpoint.every_steps=2")
    with ExitStack() as mounted:
        listener = Listener(lambda step: mounted.enter_context(read_only_disk(tmp_path)) if step == 5 else None)
        with pytest.raises(DinobenchError, match=r"(?i)cannot write .*read-only file system") as error:
            start(recipe, tmp_path / "runs", listener)
    assert error.value.exit_code == 3
    (folder,) = (tmp_path / "runs").glob("dino-*")
    assert checkpoint.read(folder / "checkpoints" / "last.pt")["step"] == 4
    assert start(recipe, tmp_path / "runs", resume=True).state.status == "finished"


@pytest.mark.promise("a file in place of a folder", "exit 3 with its name")
def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(DinobenchError, match=r"cannot write .*taken"):
        write_text(tmp_path / "taken" / "run.json", "{}")
    assert (tmp_path / "taken").read_text() == "mine"
