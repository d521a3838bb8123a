"""Things the tests of the roof share: a recipe of a few steps, results without measuring, a loop without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dinobench.results import Result
from dinobench.runs import RunFolder, find_run
from pretrain.models import checkpoint_file
from pretrain.training import loop
from pretrain.training.recipe import Recipe, resolve

QUICK = ("schedule.epochs=2", "schedule.warmup_epochs=1", "head.num_prototypes=32", "evaluation.suites=[]")


@pytest.fixture
def recipe() -> Recipe:
    return resolve("dino", overrides=(*QUICK, "tracking.enabled=false"))


@pytest.fixture
def run(recipe: Recipe, tmp_path: Path) -> RunFolder:
    """A run folder just made."""
    folder = find_run(recipe, tmp_path / "runs")
    folder.create(recipe)
    return folder


@pytest.fixture
def make_result() -> Callable[..., Result]:
    def make(score: float = 90.0, **changes: Any) -> Result:
        values: dict[str, Any] = {
            "suite": "digits_knn@1",
            "suite_fingerprint": "f00",
            "protocol": "knn",
            "dataset": "digits",
            "headline": "top1",
            "scores": {"top1": score, "top5": 99.0},
            "n": 500,
            "interval": (score - 2, score + 2),
            "baselines": {"raw_pixels": {"top1": 97.8}, "pca": {"top1": 98.0}, "random_init": {"top1": 60.9}},
            "seed": 0,
            "checkpoint": "/runs/a/checkpoints/step=00000040.pt",
            "provenance": {
                "sha256": "a" * 64,
                "method": "dino",
                "arch": "vits16",
                "step": 40,
                "epoch": 2,
                "seed": 0,
            },
            "receipt": {"dataset": {"test": {"fingerprint": "d" * 40}}},
            "seconds": 1.0,
            "created": "2026-01-01T00:00:00Z",
        }
        return Result(**{**values, **changes})

    return make


class FakeLoop:
    """Stands for `pretrain.training.loop.train`: logs a point per step, writes last.pt, and does what it is told."""

    def __init__(self) -> None:
        self.calls: list[bool] = []
        self.steps, self.stop_at = 4, None
        self.error: BaseException | None = None

    def __call__(self, recipe: Recipe, *, folder: Path, resume: bool, log: Any, on_checkpoint: Any, progress: Any):
        self.calls.append(resume)
        last = folder / "checkpoints" / "last.pt"
        first = int(checkpoint_file.read(last)["step"]) if resume and last.is_file() else 0
        for step in range(first + 1, self.steps + 1):
            log({"loss/total": 1.0 / step}, step)
            payload = {"format": checkpoint_file.FORMAT, "step": step, "student": {"w": torch.zeros(1)}}
            checkpoint_file.save(last, payload)
            if step == self.stop_at:
                if self.error:
                    log({"loss/total": 0.0}, step + 1)  # a point that the checkpoint does not have
                    raise self.error
                return loop.Outcome("interrupted", step, 1.0, 10.0, [], "SIGTERM")
        on_checkpoint(last, self.steps)
        return loop.Outcome("finished", self.steps, 1.0, 10.0, [last])


@pytest.fixture
def fake_loop(monkeypatch: pytest.MonkeyPatch) -> FakeLoop:
    fake = FakeLoop()
    monkeypatch.setattr(loop, "train", fake)
    # its checkpoints hold no network
    monkeypatch.setattr("dinobench.train.draw_figures", lambda run: None)
    return fake
