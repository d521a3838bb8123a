"""The stages of a step account for all of its time, each once."""

from __future__ import annotations

import itertools

import pytest


@pytest.fixture
def stages(bench):
    return bench("stages")


def test_the_time_of_a_stage_is_without_those_within(stages, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(stages.time, "perf_counter", lambda: float(next(clock)))
    watch = stages.Stopwatch("cpu")
    with watch.stage("outer"):  # 0
        with watch.stage("inner"):  # 1
            pass  # 2
        with watch.stage("inner"), watch.stage("innermost"):  # 3, 4
            pass  # 5, 6
    # 7
    assert watch.read() == {"outer": 3.0, "inner": 3.0, "innermost": 1.0}
    assert watch.read() == {}


def test_a_stage_ends_with_an_exception(stages):
    watch = stages.Stopwatch("cpu")
    with pytest.raises(KeyError), watch.stage("outer"), watch.stage("inner"):
        raise KeyError
    with watch.stage("next"):
        pass
    assert set(watch.read()) == {"outer", "inner", "next", stages.OTHER}


def test_every_stage_of_a_step_is_seen_and_together_they_are_the_step(bench, stages):
    sizes, step, noise = bench("sizes"), bench("step"), bench("noise")
    recipe = sizes.SIZES["tiny"].recipe(4, "cpu", "fp32")
    training = step.OurTraining(recipe, noise.noise_set(8, 32))
    training.steps(1)
    watch = stages.Stopwatch("cpu")
    start = stages.time.perf_counter()
    with stages.watched(training.trainer, watch), watch.stage(stages.OTHER):
        with watch.stage(stages.VIEWS):
            batch = next(training.batches)
        training.step(batch)
    seconds, whole = watch.read(), stages.time.perf_counter() - start
    assert set(seconds) == set(stages.STAGES)
    assert all(value > 0 for value in seconds.values())
    assert 0.5 * whole < sum(seconds.values()) < whole
    assert seconds[stages.OTHER] < 0.3 * sum(seconds.values())
