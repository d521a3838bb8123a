"""The step on a GPU: equal to the CPU's, without a host sync, in bf16 close to fp32. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from pretrain.data.datasets import open_dataset
from pretrain.data.loader import Batch, Loader
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

pytestmark = pytest.mark.gpu


def _trainer(*overrides, method="dino_vmf"):
    recipe = resolve(method, preset="digits", overrides=["model.drop_path=0", *overrides])
    return Trainer(recipe, Runtime.start(recipe.runtime), Plan(70, 20))


def _batches(trainer):
    images = open_dataset("digits").resized(16)
    loader = Loader(images, trainer.recipe.views, batch_size=64, seed=0, device=trainer.runtime.device)
    return loader.batches(0)


def test_views_on_the_gpu_equal_those_on_the_cpu():
    cpu, gpu = (next(_batches(_trainer(f"runtime.device={device}"))) for device in ("cpu", "cuda"))
    assert torch.equal(cpu.index, gpu.index.cpu())
    for a, b in zip(cpu.views, gpu.views, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dino", "dino_vmf"])
def test_loss_on_the_gpu_equals_the_cpu_in_double_precision(method):
    losses = []
    for device in ("cpu", "cuda"):
        trainer = _trainer(f"runtime.device={device}", "runtime.precision=fp64", method=method)
        batch = next(_batches(_trainer("runtime.device=cpu")))
        views = [view.double().to(trainer.runtime.device) for view in batch.views]
        losses.append(trainer.method.loss(Batch(views, batch.index, 0), 0)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_bfloat16_stays_close_to_float32():
    losses = []
    for precision in ("fp32", "bf16"):
        trainer = _trainer("runtime.device=cuda", f"runtime.precision={precision}")
        with trainer.runtime.autocast():
            losses.append(trainer.method.loss(next(_batches(trainer)), 0)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize("method", ["dino", "dino_vmf", "dino_free"])
def test_a_step_never_waits_for_the_device(method):
    trainer = _trainer("runtime.device=cuda", method=method)
    batches = _batches(trainer)
    for step in range(3):  # the first steps build constants and optimiser state
        trainer.step(next(batches), step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3, 6):
            trainer.step(next(batches), step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
