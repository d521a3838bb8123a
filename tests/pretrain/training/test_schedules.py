"""Schedules against the official arrays, and their errors."""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.errors import UsageError
from pretrain.training.schedules import Plan, cosine, teacher_temperature


def test_golden_dino_schedules_of_lr_decay_and_momentum(golden):
    g = golden("dino_schedules")
    epochs, niter, warmup = int(g["epochs"]), int(g["niter_per_ep"]), int(g["warmup_epochs"])
    base = g["base_lr"] * g["batch_size_per_gpu"] * g["world_size"] / 256
    np.testing.assert_allclose(cosine(base, g["min_lr"], epochs, niter, warmup), g["lr_schedule"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(cosine(*g["wd"], epochs, niter), g["wd_schedule"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(cosine(*g["momentum"], epochs, niter), g["momentum_schedule"], rtol=0, atol=1e-12)
    started = cosine(0.1, 0.001, epochs, niter, warmup_epochs=2, start=0.01)
    np.testing.assert_allclose(started, g["lr_start_nonzero_schedule"], rtol=0, atol=1e-12)


def test_golden_dino_schedules_of_the_teacher_temperature(golden):
    g = golden("dino_schedules")
    epochs, warmup = len(g["teacher_temp_schedule"]), int(g["teacher_temp_warmup_epochs"])
    first, last = g["teacher_temp_schedule"][[0, -1]]
    ours = teacher_temperature(first, last, warmup, epochs)
    np.testing.assert_allclose(ours, g["teacher_temp_schedule"], rtol=0, atol=1e-12)
    constant = g["teacher_temp_schedule_nowarm"]
    np.testing.assert_allclose(teacher_temperature(constant[0], constant[-1], 0, len(constant)), constant, atol=1e-12)


def test_golden_dinov2_schedules_are_cosines_per_step(golden):
    """The three values past the end, the final one each, belong to no step of a training."""
    g = golden("dinov2_schedules")
    epochs, niter, warmup = int(g["epochs"]), int(g["epoch_length"]), int(g["warmup_epochs"])
    plan = Plan(epochs, niter)
    assert len(g["lr"]) == plan.total_steps + 3
    for name, base, warm in (("lr", g["base_lr"], warmup), ("wd", g["wd"][0], 0), ("momentum", g["momentum"][0], 0)):
        ours = cosine(float(base), g[name][-1], epochs, niter, warm)
        np.testing.assert_allclose(ours, g[name][: plan.total_steps], rtol=0, atol=1e-12)
    frozen = [plan.epoch(step) < int(g["freeze_last_layer_epochs"]) for step in range(plan.total_steps)]
    last_layer = np.where(frozen, 0.0, cosine(float(g["base_lr"]), g["lr"][-1], epochs, niter, warmup))
    np.testing.assert_allclose(last_layer, g["last_layer_lr"][: plan.total_steps], rtol=0, atol=1e-12)
    # Two epochs of zeros, one of warm-up from .02 to .1, then the cosine to .01.
    after_zeros = cosine(0.1, 0.01, epochs - 2, niter, warmup_epochs=1, start=0.02)
    expected = g["with_freeze_iters"][: plan.total_steps]
    np.testing.assert_allclose(np.concatenate([np.zeros(2 * niter), after_zeros]), expected, rtol=0, atol=1e-12)


def test_golden_dinov2_schedules_of_the_teacher_temperature_per_step(golden):
    g = golden("dinov2_schedules")
    epochs, niter, warmup = int(g["epochs"]), int(g["epoch_length"]), int(g["warmup_teacher_temp_epochs"])
    first, last = g["teacher_temp"][[0, -1]]
    ours = teacher_temperature(first, last, warmup, epochs, niter)
    np.testing.assert_allclose(ours, g["teacher_temp"][: epochs * niter], rtol=0, atol=1e-12)


def test_learning_rate_starts_at_zero_peaks_twice_and_never_ends():
    values = cosine(1.0, 0.0, epochs=4, steps_per_epoch=5, warmup_epochs=2)
    assert values[0] == 0.0
    assert values[9] == values[10] == 1.0
    assert values[-1] > 0.0


@pytest.mark.parametrize("schedule", [lambda: cosine(1, 0, 3, 5, 4), lambda: teacher_temperature(0.04, 0.07, 30, 10)])
def test_warmup_longer_than_training_names_the_key(schedule):
    with pytest.raises(UsageError, match="warmup_epochs=.* is longer than the training"):
        schedule()


def test_plan_counts_steps_and_epochs():
    plan = Plan(epochs=3, steps_per_epoch=7)
    assert plan.total_steps == 21
    assert [plan.epoch(step) for step in (0, 6, 7, 20)] == [0, 0, 1, 2]
