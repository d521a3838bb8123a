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
