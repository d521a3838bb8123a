from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinobench import housekeeping, mirror, tracking
from dinobench.cli import app
from dinobench.files import write_json
from dinobench.mirror import HOST_TAG
from dinobench.runs import RunFolder
from dinobench.tracking import PRETRAIN_EXPERIMENT, Store

pytestmark = pytest.mark.filterwarnings("ignore")

HOLD = """
import sys
from pathlib import Path
from dinobench.runs import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    (tmp_path / "runs").mkdir()
    file = shutil.copy(database, tmp_path / "runs" / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    return tracking.connect(f"sqlite:///{file}")


def status(store: Store, run_id: str) -> str:
    return store.client.get_run(run_id).info.status


def statuses(store: Store, findings: list[housekeeping.Finding]) -> dict[str, str]:
    return {finding.run_id: finding.status for finding in findings}


def active(store: Store) -> list[str]:
    """Names of the runs that are not deleted."""
    experiments = list(store.experiments().values())
    return sorted(run.info.run_name for run in store.search(experiments, {}))


@pytest.mark.promise("a run killed, open in MLflow for ever", "`runs reap` closes it and none at work")
def test_a_run_whose_process_was_killed_is_closed_and_one_at_work_is_not(store: Store, measurer: Any) -> None:
    killed, working = measurer.run("dino", 0, 80.0), measurer.run("dino", 1, 80.0)
    opened = {run.name: mirror.open_pretraining(store, run) for run in (killed, working)}
    for run in (killed, working):
        run.update(status="running")
    command = [sys.executable, "-c", HOLD, str(working.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        findings = housekeeping.find_open(store)
        housekeeping.reap(store, findings)
        process.kill()
    assert statuses(store, findings) == {opened[killed.name]: "KILLED", opened[working.name]: ""}
    assert (status(store, opened[killed.name]), status(store, opened[working.name])) == ("KILLED", "RUNNING")


@pytest.mark.parametrize(("ended", "shown"), [("finished", "FINISHED"), ("collapsed", "FAILED"), ("failed", "FAILED")])
def test_what_the_run_folder_says_counts(ended: str, shown: str, store: Store, measurer: Any) -> None:
    run = measurer.run("dino", 0, 80.0)
    run.update(status=ended)
    run_id = mirror.open_pretraining(store, run)
    assert statuses(store, housekeeping.find_open(store)) == {run_id: shown}


def test_a_run_of_another_machine_is_left_alone_unless_asked_for(store: Store, measurer: Any) -> None:
    run_id = mirror.open_pretraining(store, measurer.run("dino", 0, 80.0))
    store.client.set_tag(run_id, HOST_TAG, "node17")
    (finding,) = housekeeping.find_open(store)
    assert finding.status == "" and "node17" in finding.reason
    assert statuses(store, housekeeping.find_open(store, any_host=True)) == {run_id: "FINISHED"}
    assert housekeeping.find_orphans(store) == []


@pytest.mark.promise("a kill while a result is logged", "closed by reap, completed by sync")
def test_a_result_whose_logging_was_killed_is_closed_and_completed_by_sync(store: Store, measurer: Any) -> None:
    run = measurer.run("dino", 0, 80.0, steps=(40,))
    mirror.sync(run, store.uri)
    (suite,) = store.search(list(store.experiments().values()), {"dinobench.suite": "digits_knn@1"})
    store.client.update_run(suite.info.run_id, status="RUNNING")
    findings = housekeeping.find_open(store)
    assert statuses(store, findings) == {suite.info.run_id: "KILLED"}
    housekeeping.reap(store, findings)
    assert status(store, suite.info.run_id) == "KILLED"
    mirror.sync(run, store.uri)
    assert status(store, suite.info.run_id) == "FINISHED"


def test_orphans_go_with_their_results_and_nothing_else_does(store: Store, measurer: Any) -> None:
    kept, gone = measurer.run("dino", 0, 80.0, steps=(40,)), measurer.run("dino_vmf", 1, 80.0, steps=(40,))
    for run in (kept, gone):
        mirror.sync(run, store.uri)
    assert housekeeping.find_orphans(store) == []
    shutil.rmtree(gone.path)
    (orphan,) = housekeeping.find_orphans(store)
    assert orphan.folder == str(gone.path) and orphan.reason == "its run folder is gone"
    assert (len(orphan.results), len(orphan.models)) == (3, 1)
    housekeeping.delete(store, [orphan])
    assert [name for name in active(store) if name.startswith("dino")] == ["dino/s0/ep1/vit", f"dino/s0/{arch(kept)}"]
    assert {"PCA", "raw pixels", "digits_knn@1 · dino"} <= set(active(store))
    assert housekeeping.find_orphans(store) == []


def arch(run: RunFolder) -> str:
    return run.name.removeprefix("dino-").partition("-s")[0]


def test_a_folder_with_another_run_by_now_orphans_the_old_one(store: Store, measurer: Any) -> None:
    run = measurer.run("dino", 0, 80.0)
    mirror.sync(run, store.uri)
    run.update(key="drawn anew")
    (orphan,) = housekeeping.find_orphans(store)
    assert orphan.reason == "its folder holds another run"


def test_cells_of_tables_may_lose_their_folders(store: Store, measurer: Any) -> None:
    run = measurer.run("dino", 0, 80.0)
    write_json(run.cell_file, {"key": "abc"})
    mirror.sync(run, store.uri)
    shutil.rmtree(run.path)
    assert housekeeping.find_orphans(store) == []
    assert len(housekeeping.find_orphans(store, cells=True)) == 1


@pytest.mark.promise("the disk of the runs is not mounted", "said before anything is deleted")
def test_a_disk_that_is_not_mounted_is_thought_of(store: Store, measurer: Any, tmp_path: Path) -> None:
    mirror.sync(measurer.run("dino", 0, 80.0), store.uri)
    run = measurer.output / "away"
    (found,) = store.search([store.experiments()[PRETRAIN_EXPERIMENT]], {})
    store.client.set_tag(found.info.run_id, "run.folder", str(tmp_path / "disk" / "runs" / run.name))
    (orphan,) = housekeeping.find_orphans(store)
    assert "is a disk not mounted?" in orphan.reason


def test_reap_lists_closes_and_then_finds_nothing(
    store: Store, measurer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = mirror.open_pretraining(store, measurer.run("dino", 0, 80.0))
    assert app.run(["runs", "reap", "--dry-run", "--json"]) == 0
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["run_id"], finding["status"]) == (run_id, "FINISHED")
    assert status(store, run_id) == "RUNNING"
    assert app.run(["runs", "reap"]) == 0
    assert "FINISHED" in capsys.readouterr().out
    assert status(store, run_id) == "FINISHED"
    assert app.run(["runs", "reap"]) == 0
    assert "no open runs" in capsys.readouterr().out


def test_orphans_are_deleted_only_when_told(
    store: Store, measurer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = measurer.run("dino", 0, 80.0)
    mirror.sync(run, store.uri)
    shutil.rmtree(run.path)
    number = len(active(store))
    assert app.run(["runs", "delete-orphans", "--dry-run"]) == 0
    assert "its run folder is gone" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    assert app.run(["runs", "delete-orphans"]) == 2
    assert "--yes" in capsys.readouterr().err
    assert len(active(store)) == number
    assert app.run(["runs", "delete-orphans", "--yes"]) == 0
    assert "deleted 1 runs" in capsys.readouterr().out
    assert active(store) == ["PCA", "random init/vit", "raw pixels"]
    assert app.run(["runs", "delete-orphans"]) == 0
    assert "no orphans" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["reap", "delete-orphans"])
def test_a_store_that_is_not_there_is_not_made(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert app.run(["runs", verb, "--output", str(tmp_path)]) == 3
    assert "no tracking store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_sync_of_everything_logs_runs_lone_checkpoints_and_other_networks(
    store: Store, measurer: Any, make_result: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    import pandas as pd

    from dinobench.results import ResultStore

    run = measurer.run("dino", 0, 80.0, steps=(40,))
    student = {**make_result().provenance, "sha256": "b" * 64, "network": "student"}
    ResultStore(run.path / "student").save(make_result(provenance=student), "b" * 64, None, pd.DataFrame(), {})
    lone = {**make_result().provenance, "sha256": "c" * 64, "method": "deit"}
    ResultStore(measurer.output).save(make_result(provenance=lone), "c" * 64, None, pd.DataFrame(), {})
    assert app.run(["runs", "sync"]) == 0
    printed = capsys.readouterr().out
    assert "1 results of checkpoints outside run folders" in printed
    assert "start `dinobench ui --output runs`" in printed
    assert "/models?workflowType=machine_learning" in printed
    kinds = store.search(list(store.experiments().values()), {"dinobench.kind": "checkpoint"})
    found = {run.data.tags["checkpoint.sha256"]: run.data for run in kinds}
    assert set(found) == {"000040".ljust(64, "a"), f"{'b' * 64}-student", "c" * 64}
    assert found["c" * 64].params["method"] == "deit"
    assert "pretrain_run_id" not in found[f"{'b' * 64}-student"].tags
