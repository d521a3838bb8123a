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
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--output", str(tmp_path), "--machine", "here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("*-here.json")
    rows = {row["bench"]: row for row in json.loads(record.read_text())["rows"]}
    assert rows.keys() == {
        "ceilings", "throughput", "ablations", "profile", "operators", "end_to_end", "augmentation", "knn",
        "linear_sweep", "step", "methods", "patch_head",
    }  # fmt: skip
    assert "| step |" in record.with_suffix(".md").read_text()

    contestants = rows["throughput"]["contestants"] | rows["ablations"]["contestants"]
    assert len(contestants) > 8
    for name, found in contestants.items():
        assert found["gate"]["fp32"]["loss_difference"] <= 1e-5, name
        assert found["images_per_second"]["median"] > 0 and found["mebibytes"] > 0, name
    assert contestants["ours"]["syncs"] == 0
    assert rows["throughput"]["setting"]["GFLOP"] >= rows["throughput"]["setting"]["GFLOP_done"] > 0
    assert rows["end_to_end"]["setting"]["limited_by"] in ("loader", "step")
    assert rows["profile"]["setting"]["coverage"] > 0.8


@pytest.mark.slow
def test_peak_memory_counts_what_is_held_together() -> None:
    program = """
import torch
from cost import peak_mebibytes
def work():
    first, second = torch.empty(10 * 2**18), torch.empty(20 * 2**18)  # MiB of float32
    del first
    third = torch.empty(5 * 2**18)
print(peak_mebibytes(work, "cpu"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPT.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 30


@pytest.mark.slow
def test_a_step_that_is_not_the_same_is_not_timed() -> None:
    program = """
import patch_head
from pretrain.data.datasets import open_dataset
from step import Setting
plain = patch_head.Plain.patch_loss
patch_head.Plain.patch_loss = lambda *arguments: plain(*arguments) * 1.0001
patch_head.check_equal(open_dataset("digits", "train").resized(32), Setting(prototypes=64, batch=8))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPT.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "nothing was timed" in done.stderr
