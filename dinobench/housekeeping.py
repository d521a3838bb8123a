"""What kills and clean-ups leave behind in MLflow: runs that say RUNNING for ever, and runs whose folder is gone.

A run folder says how its run stands, so a run is only judged where its folder can be seen: on the machine that it was
started on, whose name is in its tags.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinobench.addresses import as_unavailable, database_file
from dinobench.mirror import CELL_TAG, FOLDER_TAG, HOST_TAG, MLFLOW_STATUS
from dinobench.runs import RunFolder, describe_status
from dinobench.tracking import PRETRAIN_EXPERIMENT, Store
from pretrain.errors import DinobenchError

STALE_SECONDS = 600.0
"""Logging a result takes seconds; a run of a result that is open so long was left by a kill."""


@dataclass(frozen=True)
class Finding:
    """A run that is left open, and what to do about it."""

    run_id: str
    name: str
    status: str
    """What it is to become, in MLflow's words; empty: it is left alone."""
    reason: str


@dataclass(frozen=True)
class Orphan:
    """A pretraining without its run folder, with what was measured on its checkpoints."""

    run_id: str
    name: str
    folder: str
    reason: str
    results: tuple[str, ...]
    """Runs of its checkpoints and their suites."""
    models: tuple[str, ...]
    """LoggedModels of its checkpoints."""


def find_open(store: Store, *, any_host: bool = False) -> list[Finding]:
    """The runs that MLflow shows as running, each with what it is.

    Args:
        any_host: judge also runs that were started on machines of other names, by what is seen from here.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    experiments = store.experiments()
    trainings = [experiments.pop(PRETRAIN_EXPERIMENT)]
    with as_unavailable(store.uri):
        found = [_judge(store, run, any_host) for run in store.search(trainings, {}, "attributes.status = 'RUNNING'")]
        others = list(experiments.values())
        with store.lock():  # nobody on this machine is logging a result now
            left = [_judge_result(store, run) for run in store.search(others, {}, "attributes.status = 'RUNNING'")]
    return found + left


def reap(store: Store, findings: list[Finding]) -> None:
    """Close the runs that are to be closed.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    for finding in findings:
        if finding.status:
            store.finish(finding.run_id, finding.status)


def find_orphans(store: Store, *, any_host: bool = False, cells: bool = False) -> list[Orphan]:
    """The pretrainings whose run folder is gone, or holds another run by now.

    Args:
        any_host: also those that were started on machines of other names.
        cells: also those of cells of tables, whose folders may go once they are recorded.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    experiments = store.experiments()
    trainings = [experiments.pop(PRETRAIN_EXPERIMENT)]
    with as_unavailable(store.uri):
        candidates = [
            (run, reason)
            for run in store.search(trainings, {"dinobench.kind": "pretrain"})
            if (any_host or _is_ours(store, run)) and (cells or CELL_TAG not in run.data.tags)
            if (reason := _gone(run))
        ]
        return [_orphan(store, list(experiments.values()), run, reason) for run, reason in candidates]


def delete(store: Store, orphans: list[Orphan]) -> None:
    """Delete them with their results. MLflow hides what is deleted and keeps it until `mlflow gc`.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    with as_unavailable(store.uri):
        for orphan in orphans:
            for model in orphan.models:
                store.client.delete_logged_model(model)
            for run_id in (*orphan.results, orphan.run_id):
                store.client.delete_run(run_id)


def _is_ours(store: Store, run: Any) -> bool:
    """Whether a run was started on this machine. Old ones do not say; a database is used where it lies."""
    host = run.data.tags.get(HOST_TAG)
    return host == socket.gethostname() or (host is None and database_file(store.uri) is not None)


def _gone(run: Any) -> str:
    """Why a run has no folder any more; empty when it has, or never said which."""
    path = run.data.tags.get(FOLDER_TAG)
    if not path:
        return ""
    folder = RunFolder(Path(path))
    if not folder.exists:
        away = "" if folder.path.parent.is_dir() else f", like all of {folder.path.parent}: is a disk not mounted?"
        return f"its run folder is gone{away}"
    try:
        return "" if folder.state().key == run.data.tags["dinobench.run"] else "its folder holds another run"
    except DinobenchError:  # damaged, not gone
        return ""


def _judge(store: Store, run: Any, any_host: bool) -> Finding:
    run_id, name, tags = run.info.run_id, run.info.run_name, run.data.tags
    if FOLDER_TAG not in tags:
        return Finding(run_id, name, "", "it names no run folder")
    if not any_host and not _is_ours(store, run):
        return Finding(run_id, name, "", f"started on {tags.get(HOST_TAG, 'an unknown machine')}: reap it there")
    if reason := _gone(run):
        return Finding(run_id, name, "KILLED", reason)
    folder = RunFolder(Path(tags[FOLDER_TAG]))
    try:
        status, process = describe_status(folder), folder.state().process
    except DinobenchError as error:
        return Finding(run_id, name, "", str(error))
    if status == "running":
        return Finding(run_id, name, "", f"process {process} works on it")
    return Finding(run_id, name, MLFLOW_STATUS.get(status, "FAILED"), f"its run folder says {status}")


def _judge_result(store: Store, run: Any) -> Finding:
    age = time.time() - run.info.start_time / 1000
    if database_file(store.uri) is None and age < STALE_SECONDS:
        return Finding(run.info.run_id, run.info.run_name, "", "it may be logged right now, from another machine")
    return Finding(run.info.run_id, run.info.run_name, "KILLED", "a kill interrupted its logging; sync completes it")


def _orphan(store: Store, experiments: list[str], run: Any, reason: str) -> Orphan:
    run_id, tags = run.info.run_id, run.data.tags
    checkpoints = list(store.search(experiments, {"pretrain_run_id": run_id}))
    nested = [
        suite.info.run_id
        for checkpoint in checkpoints
        for suite in store.search([checkpoint.info.experiment_id], {"mlflow.parentRunId": checkpoint.info.run_id})
    ]
    models = [
        model.model_id
        for checkpoint in checkpoints
        for model in store.client.search_logged_models(
            [checkpoint.info.experiment_id],
            filter_string=f"tags.`checkpoint.sha256` = '{checkpoint.data.tags['checkpoint.sha256']}'",
        )
    ]
    own = [checkpoint.info.run_id for checkpoint in checkpoints]
    return Orphan(run_id, run.info.run_name, tags[FOLDER_TAG], reason, (*nested, *own), tuple(models))
