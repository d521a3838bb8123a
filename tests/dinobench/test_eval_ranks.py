"""`torchrun --no-python dinobench eval`: the ranks divide the images, one of them writes and prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dinobench.files import read_json

pytestmark = pytest.mark.slow
COMMAND = (sys.executable, "-c", "from dinobench.cli.app import main; main()")
RANKS = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python")


def measure(true_result: Any, folder: Path, *before: str) -> dict[str, Any]:
    arguments = ["--suite", "digits_knn", "--data", f"npz:{true_result.images}", "--output", str(folder / "runs")]
    command = [*before, *COMMAND, "eval", *arguments, "--device", "cpu", "--no-track", "--json"]
    environment = {**os.environ, "DINOBENCH_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [*command, str(true_result.checkpoint)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_ranks_give_the_result_of_one_and_one_document(true_result: Any, tmp_path: Path) -> None:
    alone, together = measure(true_result, tmp_path / "one"), measure(true_result, tmp_path / "two", *RANKS)
    assert together["scores"] == alone["scores"]
    assert together["baselines"] == alone["baselines"]
    (file,) = (tmp_path / "two").glob("runs/evals/*/*.json")
    assert read_json(file)["scores"] == alone["scores"]
