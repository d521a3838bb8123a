"""What the tests say about faults reaches the record and the table, with and without workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import reliability_report as report

HERE = Path(__file__).parent
TESTS = """
import pytest

@pytest.mark.promise("a plug is pulled", "nothing is lost")
@pytest.mark.parametrize("n", [1, 2])
def test_holds(n, count, figure):
    count("SIGKILL", "training", kills_tried=n, kills_survived=n)
    count(processes=n)
    figure(slope=n / 10)

@pytest.mark.promise("a disk is full", "exit code 3")
def test_broken(count):
    count("SIGTERM", "training", kills_tried=1, kills_survived=0)
    assert False

@pytest.mark.promise("no device", "a message")
def test_skipped():
    pytest.skip("none here")

def test_silent():
    pass
"""


@pytest.mark.parametrize("workers", [(), pytest.param(("-n1",), marks=pytest.mark.slow)], ids=["alone", "workers"])
def test_promises_and_sums_reach_the_table(tmp_path: Path, workers: tuple[str, ...]) -> None:
    (tmp_path / "test_things.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {HERE}\nmarkers = promise(fault, promise): x\n")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["reliability"]\n')
    command = [sys.executable, "-m", "pytest", "-q", "--reliability", "record.json", *workers]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    outcomes = [(row["fault"], row["promise"], row["outcome"]) for row in record["promises"]]
    assert sorted(outcomes) == [
        ("a disk is full", "exit code 3", "failed"),
        *[("a plug is pulled", "nothing is lost", "passed")] * 2,
        ("no device", "a message", "skipped"),
    ]
    assert record["counts"]["kills_tried"] == {"SIGKILL / training": 3, "SIGTERM / training": 1}
    assert record["counts"]["processes"] == {"": 3}
    assert record["figures"] == {"slope": 0.2}
    text = report.report(record)
    for line in (
        "- Kinds of fault: 3",
        "- Kills survived / tried: 3 / 4",
        "- Processes: 3",
        "- Slope: 0.2",
        "| SIGTERM / training | 0 / 1 |",
        "| a disk is full | exit code 3 | `test_things.py::test_broken` | **broken** |",
        "| a plug is pulled | nothing is lost | `test_things.py::test_holds` | holds |",
    ):
        assert text.splitlines().count(line) == 1, text
    assert report.merge([record, record])["counts"]["kills_tried"]["SIGKILL / training"] == 6
