"""Three kills of the console command, at seeded moments: what is left is whole, and goes on to the same weights."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dinobench.reporter import Reporter
from dinobench.runs import RunFolder, list_runs
from dinobench.train import Request, pretrain
from kills import Cold, Moment, run
from kills_checks import check_same, check_status, check_whole, leftovers
from kills_lives import CODES
from kills_reference import RECIPE, age
from pretrain.training.recipe import resolve

SHORT = (*RECIPE[1:-1], "evaluation.suites=[]", "tracking.enabled=false")
MOMENTS = (
    (signal.SIGKILL, r"open .*/checkpoints/\.[^/]*\.tmp$"),
    (signal.SIGTERM, r"open .*/metrics\.jsonl$"),
    (signal.SIGKILL, r"open .*/metrics\.jsonl$"),
)
SEED = 7


def train_here(folder: Path, *, resume: bool = False) -> RunFolder:
    """In this process, which has torch already."""
    request = Request(folder / "runs", "dinobench pretrain dino_vmf", resume=resume)
    summary = pretrain(resolve(RECIPE[0], overrides=SHORT), request, Reporter(silent=True))
    assert summary is not None and summary.state.status == "finished"
    return summary.run


@pytest.mark.promise(
    "the console command is killed three times (SIGKILL, SIGTERM, SIGKILL)",
    "files whole, a true status and exit code; --resume ends with equal weights and metrics",
)
def test_a_command_that_is_killed_three_times_ends_with_the_same_weights(
    tmp_path: Path, count: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinobench.train.draw_figures", lambda run: None)  # seconds, in this process
    generator = random.Random(SEED)
    folder = tmp_path / "killed"
    folder.mkdir()
    for kills, (number, event) in enumerate(MOMENTS):
        arguments = ["pretrain", RECIPE[0], *SHORT, "--output", "runs", *(["--resume"] if kills else [])]
        moment = Moment(number, event, generator.randint(0, 2), generator.uniform(0, 0.02))
        end = run(Cold(), arguments, folder, dict(os.environ), moment)
        assert end.killed is not None and end.code in CODES[number], end
        assert number == signal.SIGKILL or "Traceback" not in end.err, end.err
        check_whole(folder)
        check_status(list_runs(folder / "runs")[0], end.code)
        count(number.name, end.doing, kills_tried=1, kills_survived=1)
    age(folder)
    resumed = train_here(folder, resume=True)
    assert list_runs(folder / "runs") == [resumed]
    check_same(resumed, train_here(tmp_path / "whole"))
    assert not leftovers(resumed.path)
