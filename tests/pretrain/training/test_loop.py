"""The loop as a whole, on real digits: it resumes bit by bit, stops with a reason, and keeps what it promised."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch

from pretrain.errors import CheckFailed, DinobenchError, UsageError
from pretrain.models import checkpoint
from pretrain.training.checkpoints import CheckpointFolder
from pretrain.training.loop import train
from pretrain.training.recipe import resolve

# 1297 images / 256 = 5 steps an epoch.
SHORT = [
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "optim.batch_size=256",
    "head.hidden=32",
    "head.num_prototypes=24",
    "model.kwargs={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "model.drop_path=0.2",
    "runtime.log_every=3",
    "runtime.device=cpu",
    "checkpoint.every_epochs=1",
    "checkpoint.every_steps=0",
]


def _recipe(*overrides, method="dino_vmf"):
    return resolve(method, preset="digits", overrides=[*SHORT, *overrides])


def _weights(folder):
    payload = checkpoint.read(folder / "checkpoints" / "last.pt")
    return {**payload["student"], **{f"teacher.{k}": v for k, v in payload["teacher"].items()}}


def _recorder():
    lines = []
    return lines, lambda metrics, step: lines.append((step, metrics))


def _interrupt_at(step, number=signal.SIGTERM):
    def progress(state):
        if state.step == step:
            os.kill(os.getpid(), number)

    return progress


@pytest.mark.parametrize("stop_at", [1, 4, 5, 9])
def test_stopping_at_any_step_and_resuming_gives_the_same_weights_and_log(stop_at, tmp_path):
    recipe = _recipe()
    whole, log_whole = _recorder()
    train(recipe, folder=tmp_path / "whole", log=log_whole)
    parts, log_parts = _recorder()
    first = train(recipe, folder=tmp_path / "parts", log=log_parts, progress=_interrupt_at(stop_at))
    assert (first.status, first.step, first.note) == ("interrupted", stop_at, "SIGTERM")
    second = train(recipe, folder=tmp_path / "parts", log=log_parts, resume=True)
    assert (second.status, second.step) == ("finished", 10)
    for (name, value), other in zip(
        _weights(tmp_path / "whole").items(), _weights(tmp_path / "parts").values(), strict=True
    ):
        assert torch.equal(value, other), name

    def without_speed(lines):
        return [(step, {k: v for k, v in metrics.items() if not k.startswith("speed/")}) for step, metrics in lines]

    assert without_speed(parts) == without_speed(whole)


def test_after_its_minutes_a_run_stops_with_a_checkpoint_and_goes_on_when_resumed(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("pretrain.training.stop.monotonic", lambda: clock[0])

    def progress(state):
        clock[0] += 50

    recipe = _recipe("runtime.max_minutes=3")  # 180 s of steps of 50 s: the fourth ends after them
    folder = tmp_path / "parts"
    outcomes = [train(recipe, folder=folder, progress=progress, resume=True) for _ in range(3)]
    assert [(outcome.status, outcome.step) for outcome in outcomes] == [
        ("interrupted", 4),
        ("interrupted", 8),
        ("finished", 10),
    ]
    assert outcomes[0].note == "runtime.max_minutes"
    train(_recipe(), folder=tmp_path / "whole")
    for name, value in _weights(tmp_path / "whole").items():
        assert torch.equal(value, _weights(folder)[name]), name


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_the_signals_of_slurm_end_a_training_with_a_checkpoint(number, tmp_path):
    outcome = train(_recipe(), folder=tmp_path, progress=_interrupt_at(2, number))
    assert (outcome.status, outcome.step, outcome.note) == ("interrupted", 2, number.name)
    assert checkpoint.read(tmp_path / "checkpoints" / "last.pt")["step"] == 2


def test_checkpoints_are_announced_kept_up_to_the_limit_and_last_is_whole(tmp_path):
    announced = []
    recipe = _recipe("schedule.epochs=4", "checkpoint.keep=2", "checkpoint.every_steps=2")
    outcome = train(recipe, folder=tmp_path, on_checkpoint=lambda path, step: announced.append((path.name, step)))
    assert [step for _, step in announced] == [5, 10, 15, 20]
    assert [path.name for path in outcome.checkpoints] == ["step=00000015.pt", "step=00000020.pt"]
    payload = checkpoint.read(tmp_path / "checkpoints" / "last.pt")
    assert (payload["step"], payload["images_seen"]) == (20, 20 * 256)


def test_every_interval_logs_health_prototypes_schedules_and_speed(tmp_path):
    lines, log = _recorder()
    train(_recipe(), folder=tmp_path, log=log)
    steps = [step for step, metrics in lines if "loss/total" in metrics]
    assert steps == [3, 6, 9, 10]
    metrics = dict(lines[0][1])
    assert all(math.isfinite(value) for value in metrics.values())
    wanted = {
        "loss/total",
        "loss/over_lnK",
        "loss/kl",
        "health/target_entropy",
        "health/mean_target_entropy",
        "health/information",
        "health/feature_std",
        "health/effective_rank",
        "health/collapsed",
        "prototypes/usage_entropy",
        "prototypes/used",
        "prototypes/norm_q50",
        "prototypes/kappa_q50",
        "optim/lr",
        "optim/teacher_temperature",
        "speed/images_per_second",
    }
    assert wanted <= metrics.keys()
    assert any("prototypes/unique" in metrics for _, metrics in lines)
    assert all(name.count("/") == 1 for name in metrics)


def test_a_loss_that_is_not_finite_stops_with_metric_and_step_and_keeps_the_last_good_checkpoint(tmp_path):
    recipe = _recipe("checkpoint.every_steps=1", "runtime.log_every=5", "schedule.epochs=3")
    original = CheckpointFolder.write

    def poison(self, trainer, step, *, kept):
        original(self, trainer, step, kept=kept)
        if step == 3:
            with torch.no_grad():
                next(trainer.method.student.parameters()).fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFolder, "write", poison)
        with pytest.raises(DinobenchError, match="loss/total is not finite since step 4"):
            train(recipe, folder=tmp_path)
    payload = checkpoint.read(tmp_path / "checkpoints" / "last.pt")
    assert payload["step"] == 3
    assert all(torch.isfinite(value).all() for value in payload["student"].values())


def test_a_collapsed_run_is_named_and_stopped(tmp_path):
    # A teacher so warm that every target is flat.
    recipe = _recipe(
        "target.temperature=50.0",
        "schedule.epochs=6",
        "runtime.log_every=2",
        "runtime.stop_on_collapse=true",
        method="dino",
    )
    lines, log = _recorder()
    with pytest.raises(CheckFailed, match=r"collapsed \(uniform\)"):
        train(recipe, folder=tmp_path, log=log)
    assert lines[-1][1]["health/collapsed"] == 1.0
    assert all(metrics.get("health/collapsed", 0.0) == 0.0 for _, metrics in lines[:-1])


AS_PRESET = ()
SMALL = (
    "head.hidden=32",
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}",
    "optim.batch_size=128",
)


@pytest.mark.parametrize("sizes", [SMALL, pytest.param(AS_PRESET, marks=pytest.mark.slow)], ids=["small", "as preset"])
@pytest.mark.parametrize("method", ["dino", "dino_vmf", "dino_free"])
def test_a_healthy_run_never_triggers_the_collapse_stop(method, sizes, tmp_path):
    recipe = resolve(
        method,
        preset="digits",
        overrides=[*sizes, "schedule.epochs=8", "schedule.warmup_epochs=1", "runtime.log_every=10",
                   "runtime.device=cpu", "runtime.stop_on_collapse=true"],
    )  # fmt: skip
    lines, log = _recorder()
    assert train(recipe, folder=tmp_path, log=log).status == "finished"
    assert all(metrics.get("health/collapsed", 0.0) == 0.0 for _, metrics in lines)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.batch_size=2000", "1297 images, fewer than the batch of 2000"),
        ("views.local_size=7", "7"),
        ("data.name=digit", "did you mean 'digits'"),
        ("model.name=vit_smal_patch16_224", "did you mean vit_small_patch16_224"),
        ("model.kwargs={img_size: 16, patch_size: 8, embed_dim: 25, num_heads: 2}", "cannot be built"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(override, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train(_recipe(override), folder=tmp_path)
