"""The comparison of loss curves: what differs between its runs, and that a stopped run ends like one that was not."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinobench.journal import Journal
from dinobench.runs import RunFolder
from pretrain.errors import DinobenchError
from pretrain.methods.method import load_method
from pretrain.models.network import Outputs
from pretrain.training.recipe import resolve
from pretrain.training.schedules import Plan

SCRIPT = Path(__file__).with_name("loss_curve.py")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; its neighbours are found as when it runs."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("loss_curve")


@pytest.mark.parametrize("method", ["dino", "dino_vmf"])
def test_the_loop_over_pairs_is_the_loss_that_is_trained(script: Any, method: str) -> None:
    recipe = resolve(method, preset="digits", overrides=[*script.TINY, "runtime.device=cpu"])
    dino = load_method(method)(recipe, Plan(2, 3)).double()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    z = torch.nn.functional.normalize(random(4, 8, 16), dim=-1).requires_grad_()
    vectors, target = random(32, 16).requires_grad_(), (5 * random(2, 8, 32)).softmax(-1)
    found = []
    for loss in (script.loop_over_pairs, type(dino).image_loss):
        value = loss(dino, Outputs(z, z, vectors), target)
        found.append((value, *torch.autograd.grad(value, (z, vectors))))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_a_curve_with_a_step_missing_is_refused(script: Any, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in (1, 2, 4):
        journal.append({"loss/total": 1.0}, step)
    with pytest.raises(DinobenchError, match="every step once"):
        script.curves({"plain": RunFolder(tmp_path)})


def test_runs_of_one_seed_differ_in_nothing_but_how_they_are_computed(script: Any) -> None:
    plain = script.recipe("dino", "plain", tiny=False)
    for name in script.JUDGED:
        other = script.recipe("dino", name, tiny=False)
        assert other.runtime.compile and 0 < other.runtime.max_logits_bytes < 2**22
        same = {"model": other.model.model_copy(update={"attention": plain.model.attention}), "data": plain.data}
        assert other.model_copy(update=same).identity == plain.identity


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_curve(script: Any, tmp_path: Path) -> None:
    stopping = script.recipe("dino", "plain", tiny=True, overrides=["runtime.max_minutes=1e-9"])
    with pytest.raises(DinobenchError, match="stopped at step 1: start again"):
        script.train_run("plain", stopping, tmp_path / "stopped")
    for folder in ("stopped", "whole"):
        script.train_run("plain", script.recipe("dino", "plain", tiny=True), tmp_path / folder)
    folders = {name: script.find_folder(tmp_path / name) for name in ("stopped", "whole")}
    found = script.curves(folders)
    assert len(found["whole"]) == 30
    np.testing.assert_array_equal(found["stopped"], found["whole"])


@pytest.mark.slow
def test_tiny_comparison_writes_data_record_and_figure(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--tiny", "--work", str(tmp_path / "runs"), "--output", str(tmp_path)]
    first, second = (
        subprocess.run([*command, "--machine", "here"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
        for _ in range(2)
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert second.stderr.count("nothing to train") == 5
    (record,) = tmp_path.glob("*-here-dino.json")
    assert record.with_suffix(".png").stat().st_size
    with record.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    found = json.loads(record.read_text())
    assert set(found["runs"]) == set(rows[0]) - {"step"}
    exact = found["verdicts"]["optimised_fp32, first steps"]
    assert exact["inside"], exact
