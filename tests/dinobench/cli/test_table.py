from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinobench.cli import app
from dinobench.tables import runner
from dinobench.tables.cells import Cell
from dinobench.tables.definition import table_names
from dinobench.tables.runner import Outcome
from dinobench.tables.worker import Workplace, run_cell
from pretrain.errors import DinobenchError

ROOT = Path(__file__).parents[3]
DEFINITIONS = ROOT / "tests" / "dinobench" / "tables" / "definitions"


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_loop: Any, measured: Any
) -> Callable[..., tuple[int, list[str]]]:
    """`dinobench table` on the tables of the tests, in this process: exit code and the cells that were run."""
    ran: list[str] = []

    def run_local(cells: list[Cell], place: Workplace, workers: int, say: Callable[[str], None]) -> Outcome:
        outcome = Outcome()
        for cell in cells:
            ran.append(cell.name)
            try:
                (outcome.done if run_cell(cell, place, say) else outcome.held).append(cell)
            except DinobenchError as error:
                outcome.failed[cell] = str(error)
        return outcome

    monkeypatch.setattr(runner, "run_local", run_local)

    def call(*arguments: str) -> tuple[int, list[str]]:
        ran.clear()
        places = ["--records", str(tmp_path / "results"), "--output", str(tmp_path / "runs")]
        return app.run(["table", "--definitions", str(DEFINITIONS), *places, *arguments]), list(ran)

    return call


def tables(folder: Path) -> dict[str, bytes]:
    """The files of the tables that have to be the same from run to run."""
    files = sorted((folder / "results" / "tables").rglob("*.*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in files if path.suffix in (".md", ".csv", ".tex")
    }


def test_what_is_missing_is_run_and_the_tables_are_written(run: Callable, tmp_path: Path) -> None:
    assert run() == (0, ["dino", "simclr"])
    found = tables(tmp_path)
    assert {Path(name).name for name in found} == {"README.md", "tiny.md", "tiny.csv", "tiny.tex"}
    assert b"| DINO | 1 | 74.5 | 91.5" in found["results/tables/digits/tiny.md"]


def test_a_second_run_recomputes_nothing_and_changes_nothing(run: Callable, tmp_path: Path) -> None:
    run()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*") if path.is_file()}
    assert run() == (0, [])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("*") if path.is_file()} == before


def test_a_lost_record_is_made_again(run: Callable, tmp_path: Path) -> None:
    run()
    before = tables(tmp_path)
    next(tmp_path.glob("results/digits_ablations/records/simclr-*.json")).unlink()
    assert run() == (0, ["simclr"])
    assert tables(tmp_path) == before


def test_a_dry_run_lists_every_cell_and_runs_none(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--dry-run") == (0, [])
    printed = capsys.readouterr().out
    assert "DINO" in printed and "SimCLR" in printed and "to run" in printed
    assert "2 to run" in printed
    assert not (tmp_path / "results").exists()


def test_the_tables_can_be_written_without_running_anything(run: Callable, tmp_path: Path) -> None:
    assert run("--no-run") == (0, [])
    assert b"| DINO | - | 74.5 | - |" in tables(tmp_path)["results/tables/digits/tiny.md"]


def test_seeds_on_the_line_stand_in_for_those_of_the_tables(run: Callable) -> None:
    assert run("--seeds", "1,2") == (0, ["dino", "dino", "simclr", "simclr"])


def test_a_cell_that_fails_is_told_and_the_rest_is_written(
    run: Callable, measured: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured.fail = "digits_prototypes"  # SimCLR has none
    assert run() == (3, ["dino", "simclr"])
    error = capsys.readouterr().err
    assert "not run: dinobench pretrain dino" in error and "data set absent" in error
    assert b"not run" in tables(tmp_path)["results/tables/digits/tiny.md"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "tinny"], "did you mean 'tiny'"),
        (["--seeds", "one"], "expected numbers"),
        (["--scale", "digit"], "digits"),
        (["--data", "imagenet"], "expected a URI"),
        (["--executor", "slurm", "--slurm", "gpu"], "expected KEY=VALUE"),
    ],
)
def test_a_wrong_option_is_told(
    arguments: list[str], said: str, run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments)[0] == 2
    assert said in capsys.readouterr().err


def test_a_retrained_cell_that_agrees_exits_with_0_else_with_4(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = ("--seeds", "0,1,2,3,4")
    run(*seeds)
    assert run(*seeds, "--retrain", "0")[0] == 0
    assert "may differ by" in capsys.readouterr().out
    for path in tmp_path.glob("results/digits_ablations/records/*-s?-*.json"):
        path.write_text(path.read_text().replace('"top1": 91.5', '"top1": 31.5'))
    assert run(*seeds, "--retrain", "0")[0] == 4
    assert "the record is stale" in capsys.readouterr().err


def test_a_table_out_of_tolerance_exits_with_4(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, definitions = tmp_path / "weights.pth", tmp_path / "definitions"
    weights.write_bytes(b"weights")
    definitions.mkdir()
    (definitions / "one.yaml").write_text(
        "{title: One, tolerance: 0.5, paper: {paper: DINO (2104.14294), table: Table 2}, columns: [{label: kNN, "
        "at: {paper: 'digits_knn@1:top1'}, published: [{suite: 'ImageNet kNN (k=20, T=0.07)', metric: top1}]}], "
        "rows: [{label: DINO, checkpoint: dino_vits16, published: [{method: DINO, arch: ViT-S/16}]}]}"
    )
    (tmp_path / "checkpoints.yaml").write_text("dino_vits16: weights.pth")
    options = ["--scale", "paper", "--definitions", str(definitions), "--checkpoints"]
    assert run(*options, str(tmp_path / "checkpoints.yaml")) == (4, ["dino_vits16"])
    assert "out of tolerance: one: DINO, kNN" in capsys.readouterr().err
    assert b"+17.0" in tables(tmp_path)["results/tables/paper/one.md"]


def test_at_the_scale_of_the_papers_every_table_says_what_its_cells_need(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert app.run(["table", "--scale", "paper", "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    nothing_at_this_scale = {"vmf_utilisation", "vmf_figure2", "partial_collapse"}
    assert {entry["table"] for entry in listed} == set(table_names()) - nothing_at_this_scale
    assert all(entry["needs"] and entry["suites"] for entry in listed)
    assert not any(entry["done"] or entry["ready"] for entry in listed)
    checkpoints = {need for entry in listed for need in entry["needs"] if need.startswith("checkpoint")}
    assert "checkpoint dino_vits8 in checkpoints.yaml" in checkpoints
    assert {need for entry in listed for need in entry["needs"]} >= {
        "--data imagenet:/path",
        "--data folder:/path",
        "roxford5k under DINOBENCH_DATA",
        "copydays under DINOBENCH_DATA",
    }


def test_hours_on_gpus_are_unknown_until_they_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["table", "--scale", "paper", "--dry-run", "--only", "dino_table7"]) == 0
    printed = capsys.readouterr().out
    assert "unknown: no GPU throughput measured yet" in printed
    assert printed.count("unknown") == 9


PROGRAM = """
import sys
from dinobench.cli.app import main

if __name__ == "__main__":
    main()
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """`dinobench table` in a session of its own, with real workers."""
    script = folder / "program.py"
    script.write_text(PROGRAM)
    arguments = ["table", "--definitions", str(DEFINITIONS), "--workers", "2", "--records", "results"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DINOBENCH_CACHE": str(folder / "cache")}
    command = [sys.executable, str(script), *arguments, "--output", "runs"]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stderr=log, stdout=log, start_new_session=True)


@pytest.mark.slow
def test_killed_at_random_moments_it_finishes_with_the_same_tables(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    started = time.monotonic()
    assert start(undisturbed).wait(600) == 0
    seconds = time.monotonic() - started
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    for number in range(3):
        process = start(killed)
        time.sleep(moments.uniform(0.2, 0.9) * seconds)
        # the command alone, or with its workers, as when a machine goes down
        if number % 2:
            process.kill()
        elif process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    # workers whose command was killed write a checkpoint before they end
    deadline = time.monotonic() + 300
    while (code := start(killed).wait(600)) == 3 and time.monotonic() < deadline:
        time.sleep(1)
    assert code == 0, (killed / "log").read_text()
    assert tables(killed) == tables(undisturbed), f"killed at moments drawn with seed {seed}"
    (killed / "log").unlink()
    assert start(killed).wait(600) == 0
    assert "2 cells: 2 done" in (killed / "log").read_text()


@pytest.mark.slow
def test_a_committed_cell_chosen_by_the_commit_trains_to_its_record(tmp_path: Path) -> None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = found.stdout.strip() or "0"  # not a git checkout: the first cell
    assert app.run(["table", "--retrain", commit, "--records", str(ROOT / "results")]) == 0
