"""Kills at random moments: what is killed ends as if nothing had happened. `nox -s faults -- --kills 20` for a few."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kills import Cold, ForkServer
from kills_lives import Life
from kills_reference import Reference

SIGNALS = "SIGKILL, SIGTERM, SIGINT, SIGUSR1"


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")
@pytest.mark.promise(
    f"killed while training ({SIGNALS})",
    "--resume ends with the weights, metrics and results of a run that nothing interrupted",
)
@pytest.mark.promise(
    f"killed while a checkpoint is written ({SIGNALS})", "last.pt and every kept checkpoint are whole; --resume goes on"
)
@pytest.mark.promise(
    f"killed while evaluating ({SIGNALS})",
    "no half result; the same command measures what is missing, with equal scores",
)
@pytest.mark.promise(
    f"killed while the feature cache is written ({SIGNALS})", "no half entry is read; the next start computes it again"
)
@pytest.mark.promise(
    f"killed while MLflow is written ({SIGNALS})",
    "every point and result is logged once in the end; `runs reap` closes what was left open",
)
@pytest.mark.promise(
    f"killed while tables are built ({SIGNALS})", "the same command ends with the same records and the same bytes"
)
@pytest.mark.promise(
    f"killed at any moment ({SIGNALS})",
    "exit codes as designed, a true status, no lock that blocks the next start, no temporary file left in the end",
)
def test_a_killed_run_ends_as_if_nothing_had_happened(
    life: tuple[str, int, tuple[str, ...]],
    fork_server: ForkServer,
    uninterrupted: Reference,
    tmp_path: Path,
    count: Callable[..., None],
) -> None:
    kind, seed, plan = life
    starter = Cold() if kind == "cold" else fork_server
    lived = Life(starter, tmp_path, uninterrupted, seed)
    survived = 0
    try:
        lived.live(plan)
        survived = 1
        shutil.rmtree(tmp_path)  # 25 of them are some hundred megabytes
    finally:
        for kill in lived.kills:
            count(kill.signal.name, kill.doing, kills_tried=1, kills_survived=survived)
        count(processes=lived.starts)
