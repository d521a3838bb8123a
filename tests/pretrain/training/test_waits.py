"""What limits a training: the clock is advanced by hand, so that every share is known."""

from __future__ import annotations

import itertools
import os
import time
from types import SimpleNamespace

import pytest
import torch

from pretrain.data.images import ImageSet
from pretrain.data.views_batched import BatchedViews
from pretrain.training import waits
from pretrain.training.loop import train
from pretrain.training.recipe import resolve
from pretrain.training.trainer import Trainer
from pretrain.training.waits import BatchWaits, Shares

SHORT = [
    "schedule.epochs=2",
    "schedule.steps_per_epoch=4",
    "schedule.warmup_epochs=0",
    "optim.batch_size=10",
    "head.hidden=32",
    "head.num_prototypes=24",
    "model.kwargs={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "runtime.log_every=2",
    "runtime.device=cpu",
    "runtime.workers=0",
]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    for module in ("pretrain.training.waits", "pretrain.data.loader"):
        monkeypatch.setattr(f"{module}.monotonic", lambda: now[0])
    return now


def _takes(clock, monkeypatch, owner, name, seconds):
    """Let a function take so many seconds by the clock."""
    original = getattr(owner, name)

    def slow(*arguments):
        clock[0] += seconds
        return original(*arguments)

    monkeypatch.setattr(owner, name, slow)


def _train(tmp_path, *overrides):
    lines, shown = [], []
    outcome = train(
        resolve("dino_vmf", preset="digits", overrides=[*SHORT, *overrides]),
        folder=tmp_path,
        log=lambda metrics, step: lines.append(metrics),
        progress=shown.append,
    )
    found = [
        (metrics["speed/data_wait_fraction"], metrics["speed/decode_wait_fraction"])
        for metrics in lines
        if "loss/total" in metrics
    ]
    return outcome, found, shown


# The first batch is not counted: an interval of two steps has one wait at first, then two.
def test_slow_decoding_is_told_with_what_helps(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    _takes(clock, monkeypatch, ImageSet, "image", 0.3)  # 3 s for a batch
    _takes(clock, monkeypatch, Trainer, "step", 1)
    outcome, found, shown = _train(tmp_path, "views.backend=pil")
    assert [pair[0] for pair in found] == pytest.approx([3 / 5, *[6 / 8] * 3])
    assert [pair[1] for pair in found] == pytest.approx([pair[0] for pair in found])
    assert [progress.data_wait for progress in shown[::2]] == pytest.approx([0.0, 3 / 5, 6 / 8, 6 / 8])
    told = "limited by: data loading (72 % of the time spent waiting); try runtime.workers=2"
    assert outcome.limited_by == told  # 21 s of 29 s


def test_slow_views_are_told_apart_from_decoding(tmp_path, clock, monkeypatch):
    _takes(clock, monkeypatch, BatchedViews, "__call__", 3)
    _takes(clock, monkeypatch, Trainer, "step", 1)
    outcome, found, _ = _train(tmp_path)
    assert found == [(pytest.approx(3 / 5), 0.0), *[(pytest.approx(6 / 8), 0.0)] * 3]
    assert outcome.limited_by == "limited by: making the views (72 % of the time spent waiting)"


def test_a_slow_step_is_told_with_the_share_of_waiting(tmp_path, clock, monkeypatch):
    _takes(clock, monkeypatch, BatchedViews, "__call__", 1)
    _takes(clock, monkeypatch, Trainer, "step", 3)
    outcome, found, _ = _train(tmp_path)
    assert [pair[0] for pair in found] == pytest.approx([1 / 7, *[2 / 8] * 3])
    told = "limited by: the training step (77 % of the time, 23 % spent waiting for data)"  # 7 s of 31 s
    assert outcome.limited_by == told


def _loader(workers=4, device="cpu", world_size=1, in_memory=False, backend="batched"):
    return SimpleNamespace(
        device=torch.device(device), workers=workers, world_size=world_size, in_memory=in_memory, decode_seconds=0.0,
        views=SimpleNamespace(backend=backend),
    )  # fmt: skip


def _limit(clock, loader, decoding, views, step):
    """What is told of a training whose batches and steps take these seconds."""

    def batches():
        for number in itertools.count():
            clock[0] += decoding + views
            loader.decode_seconds += decoding
            yield number

    measured, source = BatchWaits(loader), batches()
    for _ in range(11):
        measured.next(source)
        clock[0] += step
    shares = measured.read()
    assert shares == Shares(
        *[pytest.approx(10 * part / (10 * (decoding + views) + 11 * step)) for part in (decoding, views)]
    )
    return measured.limit()


LOADING = "data loading ({} % of the time spent waiting)"


@pytest.mark.parametrize(
    ("loader", "seconds", "told"),
    [
        # Workers that kept up would be waited for by no step; in turn with the steps they may take as long.
        ({}, (2, 0, 8), f"{LOADING.format(19)}; try runtime.workers=8 or data.cache=device"),
        ({"workers": 0}, (2, 0, 8), "the training step (81 % of the time, 19 % spent waiting for data)"),
        ({}, (0, 2, 8), "the training step (81 % of the time, 19 % spent waiting for data)"),
        ({}, (2, 3, 5), f"{LOADING.format(19)}; try runtime.workers=8 or data.cache=device"),
        ({"workers": 0}, (6, 0, 1), f"{LOADING.format(85)}; try runtime.workers=2 or data.cache=device"),
        ({"workers": 16}, (6, 0, 1), f"{LOADING.format(85)}; try data.cache=device"),
        ({"world_size": 4}, (6, 0, 1), f"{LOADING.format(85)}; try data.cache=device"),
        ({"workers": 16, "backend": "pil"}, (6, 0, 1), f"{LOADING.format(85)}"),
        ({"workers": 10, "backend": "pil"}, (6, 0, 1), f"{LOADING.format(85)}; try runtime.workers=16"),
        ({"in_memory": True}, (0, 6, 1), "making the views (85 % of the time spent waiting)"),
        ({}, (0.5, 0.1, 9), "the training step (94 % of the time, 6 % spent waiting for data)"),
    ],
)  # fmt: skip
def test_what_is_told(clock, monkeypatch, loader, seconds, told):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert _limit(clock, _loader(**loader), *seconds) == f"limited by: {told}"


def test_of_several_ranks_the_one_that_waits_longest_counts(clock, monkeypatch):
    monkeypatch.setattr(waits, "all_reduce_max", lambda seconds: seconds.maximum(torch.tensor([5.0, 0.0, 20.0])))
    measured, batches = BatchWaits(_loader()), iter(range(9))
    for _ in range(3):
        measured.next(batches)
        clock[0] += 5
    assert measured.read() == Shares(0.25, 0.0)
    assert measured.limit().startswith("limited by: data loading (25 %")


def test_before_anything_is_measured_nothing_is_told():
    measured = BatchWaits(_loader())
    assert measured.read() == Shares() and measured.limit() == ""


def test_by_the_real_clock():
    loader = _loader()

    def batches():
        while True:
            time.sleep(0.02)
            loader.decode_seconds += 0.02
            yield None

    measured, source = BatchWaits(loader), batches()
    for _ in range(5):
        measured.next(source)
    assert measured.read().waiting > 0.8


def _slow(seconds):
    while True:
        time.sleep(seconds)
        yield None


@pytest.mark.gpu
def test_a_gpu_waits_where_it_has_nothing_to_do():
    torch.ones(8, device="cuda").add_(1)  # CUDA starts now
    measured, batches = BatchWaits(_loader(device="cuda")), _slow(0.05)
    for _ in range(5):
        measured.next(batches)
        torch.ones(8, device="cuda").add_(1)
    torch.cuda.synchronize()
    shares = measured.read()
    assert shares.waiting > 0.8 and shares.decoding == 0.0


@pytest.mark.gpu
def test_a_host_that_waits_while_the_gpu_works_costs_nothing():
    torch.cuda._sleep(1)  # CUDA starts now
    measured, batches = BatchWaits(_loader(device="cuda")), _slow(0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            measured.next(batches)
            torch.cuda._sleep(200_000_000)  # about 0.1 s
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert measured.read().waiting < 0.05
