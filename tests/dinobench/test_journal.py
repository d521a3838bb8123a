from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dinobench.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        journal.append({"loss/total": 1 / step}, step)
    return journal


def test_points_come_back_as_they_were_written(journal: Journal) -> None:
    assert [(point.step, point.metrics) for point in journal.read()] == [
        (10, {"loss/total": 0.1}),
        (20, {"loss/total": 0.05}),
        (30, {"loss/total": 1 / 30}),
    ]
    assert journal.curve("loss/total")[0] == [10, 20, 30]


def test_a_line_cut_short_by_a_kill_is_left_out(journal: Journal) -> None:
    text = journal.path.read_text()
    journal.path.write_text(text[:-15])
    assert [point.step for point in journal.read()] == [10, 20]


def test_cutting_drops_what_a_resumed_training_does_again(journal: Journal) -> None:
    journal.cut(20)
    journal.append({"loss/total": 0.5}, 30)
    assert [point.step for point in journal.read()] == [10, 20, 30]
    assert journal.read()[-1].metrics == {"loss/total": 0.5}


def test_values_that_are_not_finite_stay_valid_json_and_are_not_points(journal: Journal) -> None:
    journal.append({"loss/total": math.inf, "optim/lr": 0.1}, 40)
    last = json.loads(journal.path.read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert last["metrics"] == {"loss/total": None, "optim/lr": 0.1}
    assert journal.read()[-1].finite() == {"optim/lr": 0.1}


def test_a_run_without_metrics_has_an_empty_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    assert journal.read() == []
    journal.cut(0)
    assert journal.read() == []
