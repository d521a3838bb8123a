"""The benchmark runs without a GPU and without the official code, so that it cannot rot unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run.py")


@pytest.mark.slow
def test_tiny_benchmark_writes_every_row(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--output", str(tmp_path), "--machine", "here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("*-here.json")
    rows = json.loads(record.read_text())["rows"]
    assert {row["bench"] for row in rows} == {"augmentation", "knn", "step"}
    assert "| step |" in record.with_suffix(".md").read_text()
