from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dinobench import journal as journal_module
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


@pytest.mark.promise("a kill between two checkpoints", "steps done again leave no doubled points in metrics.jsonl")
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


@pytest.mark.promise("a journal of a long run", "where it stands is read from its end, not from all of it")
def test_the_last_point_is_read_from_the_end_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    assert journal.last() is None
    for step in range(1, 200):
        journal.append({"loss/total": 1.0 / step}, step)
    monkeypatch.setattr("dinobench.journal.LAST_BYTES", 200)
    parsed = []
    parse = journal_module._parse
    monkeypatch.setattr(journal_module, "_parse", lambda line: parsed.append(line) or parse(line))
    with journal.path.open("a") as file:
        file.write('{"step": 200, "ti')
    last = journal.last()
    assert last is not None and last.step == 199
    assert len(parsed) <= 3
