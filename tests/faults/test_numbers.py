"""NaN and infinity in loss, gradients, moments, features and metrics: named, and never in a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from breaking import QUIET, Listener, run_of, start, tiny
from dinobench.evaluate import Evaluation, evaluate
from pretrain.errors import DinobenchError
from pretrain.models import checkpoint
from pretrain.training import loop
from pretrain.training.health import refuse_non_finite
from pretrain.training.loop import train
from pretrain.training.trainer import Trainer
from suites.suite import load_suite


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, at: int, value: float, only: str = "") -> None:
    """From step `at` on, gradients of a finite loss are this value."""
    whole = Trainer.step

    def step(self: Trainer, batch: Any, number: int) -> None:
        hooks = []
        if number == at:
            chosen = [p for name, p in self.method.student.named_parameters() if only in name and p.requires_grad]
            hooks = [p.register_hook(lambda grad: torch.full_like(grad, value)) for p in chosen[:1]]
        whole(self, batch, number)
        for hook in hooks:
            hook.remove()

    monkeypatch.setattr(Trainer, "step", step)


def step_of(folder: Path) -> int:
    return checkpoint.read(folder / "checkpoints" / "last.pt")["step"]


@pytest.mark.promise(
    "NaN or infinity in the gradients of a finite loss", "the tensor is named, no checkpoint has it; exit 3"
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["dino", "simclr"])
def test_gradients_that_are_not_finite_reach_no_checkpoint(
    value: float, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # at the step before a checkpoint: the loss shows nothing yet
    spoil_gradients(monkeypatch, at=5, value=value, only="blocks.0.attn.qkv.weight")
    recipe = tiny("checkpoint.every_steps=3")
    with pytest.raises(DinobenchError, match=r"not finite after step 6, the first is \S*qkv.*optim\.clip") as error:
        train(recipe, folder=tmp_path)
    assert error.value.exit_code == 3
    assert step_of(tmp_path) == 5  # of the first epoch: whole and finite
    assert checkpoint.load(tmp_path / "checkpoints" / "last.pt").backbone is not None


@pytest.mark.promise("gradients that overflow the optimiser's moments", "named; a dead parameter is in no checkpoint")
def test_moments_that_overflow_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_gradients(monkeypatch, at=5, value=1e30, only="blocks.0.attn.qkv.weight")
    with pytest.raises(DinobenchError, match=r"first is optimizer\.state\.\d+\.exp_avg_sq"):
        train(tiny("checkpoint.every_steps=3", "optim.clip=0"), folder=tmp_path)
    assert step_of(tmp_path) == 5


@pytest.mark.promise("NaN in the loss", "metric and step are named; the last good checkpoint is kept and resumed from")
def test_a_run_whose_loss_becomes_nan_is_resumed_from_its_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.methods import dino

    recipe = tiny(*QUIET, "checkpoint.every_steps=3")
    whole: Callable[..., tuple[Tensor, dict[str, Tensor]]] = dino.METHOD.loss

    def loss(self: Any, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = whole(self, batch, step)
        return (value * math.nan if step == 6 else value), metrics

    with monkeypatch.context() as broken:
        broken.setattr(dino.METHOD, "loss", loss)
        with pytest.raises(DinobenchError, match=r"loss/total is not finite since step 7 .*last good checkpoint"):
            start(recipe, tmp_path)
    (folder,) = tmp_path.glob("dino-*")
    assert step_of(folder) == 6
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    assert start(recipe, tmp_path, resume=True).state.status == "finished"


@pytest.mark.promise("a metric that is NaN", "the journal stays valid JSON, the run goes on")
def test_a_metric_that_is_not_finite_is_null_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Trainer.values
    monkeypatch.setattr(Trainer, "values", lambda self, step: {**whole(self, step), "optim/odd": math.nan})
    run = start(tiny(*QUIET), tmp_path, Listener()).run
    for line in run.journal.path.read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)


@pytest.mark.promise("features that are not finite at the evaluation", "checkpoint named, suite listed as failed")
def test_features_that_are_not_finite_fail_their_suite_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from suites import passes

    recipe = tiny(*QUIET)
    run = run_of(recipe, tmp_path)
    train(recipe, folder=run.path)
    whole = passes.describe

    def describe(*inputs: Any) -> Tensor:
        values = whole(*inputs)
        values[0] = math.inf
        return values

    monkeypatch.setattr(passes, "describe", describe)
    settings = Evaluation(output=tmp_path, device="cpu")
    results, failures = evaluate(run.last_checkpoint, [load_suite("digits_knn")], settings, lambda text: None)
    assert results == []
    (failure,) = failures
    assert "last.pt" in failure.reason and "not finite" in failure.reason and "earlier checkpoint" in failure.reason


@pytest.mark.promise("NaN on one of several ranks", "every rank stops with the step at which it came")
def test_the_step_is_that_of_the_rank_that_saw_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.training import meter

    # what the other rank saw first arrives with the maximum
    monkeypatch.setattr(meter, "all_reduce_max", lambda tensor: torch.full_like(tensor, 3.0))
    with pytest.raises(DinobenchError, match="loss/total is not finite since step 4 "):
        train(tiny(), folder=tmp_path)


def test_states_without_tensors_and_whole_numbers_pass() -> None:
    refuse_non_finite({"a": 1, "b": {"c": torch.ones(2, dtype=torch.int64)}}, 1)
    refuse_non_finite({}, 1)
    with pytest.raises(DinobenchError, match=r"1 of 2 tensors .* the first is b\.c"):
        refuse_non_finite({"a": torch.ones(1), "b": {"c": torch.tensor([math.inf])}}, 1)
    assert loop.WORKER_ADVICE
