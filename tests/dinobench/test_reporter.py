from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from dinobench import reporter
from dinobench.reporter import Reporter
from pretrain.training.loop import Progress


def progress(step: int, loss: float = 5.31) -> Progress:
    return Progress(step, 1000, 3, loss, 4.9e-4, 1820.4, 130.0)


def test_a_line_says_where_the_training_stands() -> None:
    line = "step 500/1000  epoch 3  loss 5.310  lr 4.9e-04  1820 img/s  eta 2:10"
    assert reporter.progress_line(progress(500)) == line


def test_a_collapse_is_seen_in_the_line() -> None:
    noted = Progress(1, 2, 0, math.nan, 0.1, 1.0, math.inf, "collapse: uniform")
    assert reporter.progress_line(noted).endswith("loss -  lr 1.0e-01  1 img/s  eta ?  collapse: uniform")


@pytest.mark.parametrize(("share", "told"), [(0.62, "eta 2:10  62 % waiting for data"), (0.09, "eta 2:10")])
def test_a_long_wait_for_data_is_seen_in_the_line(share: float, told: str) -> None:
    waited = dataclasses.replace(progress(500), data_wait=share)
    assert reporter.progress_line(waited).endswith(told)


def test_without_a_terminal_lines_come_every_few_seconds_and_at_the_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    talker = Reporter(every=3600)
    talker.keep(tmp_path / "train.log")
    for step in range(1, 1001):
        talker.progress(progress(step))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split()[1] for line in captured.err.splitlines()] == ["1/1000", "1000/1000"]
    assert len((tmp_path / "train.log").read_text().splitlines()) == 2


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    talker = Reporter(silent=True)
    talker.say("hello")
    talker.warn("hello")
    talker.progress(progress(1))
    assert capsys.readouterr() == ("", "")


@pytest.mark.promise("disk full: train.log", "the run goes on and says so")
def test_a_full_disk_does_not_stop_the_talking(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    talker = Reporter()
    talker.keep(tmp_path / "absent" / "train.log")
    talker.say("one")
    talker.say("two")
    assert "two" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (math.inf, "?")])
def test_durations_read_as_a_clock(seconds: float, text: str) -> None:
    assert reporter.duration(seconds) == text


@pytest.mark.promise("a run that talks for months", "train.log is bounded: one earlier part is kept, nothing else")
def test_the_log_is_bounded_and_its_earlier_part_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reporter, "LOG_BYTES", 1000)
    talker = Reporter(silent=False)
    talker.console.quiet = True
    talker.keep(tmp_path / "train.log")
    for number in range(500):
        talker.say(f"line {number}")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"train.log", "train.log.1"}
    assert all(size < 1100 for size in sizes.values())
    text = "".join((tmp_path / name).read_text() for name in ("train.log.1", "train.log"))
    lines = [line.split()[-1] for line in text.splitlines()]
    assert lines == [str(number) for number in range(500 - len(lines), 500)]
