"""The step on a GPU: equal to the CPU's, without a host sync, in bf16 close to fp32. Skipped where there is none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pretrain.data.masks import Masks
from pretrain.methods.method import method_names
from pretrain.training.loop import create_loader
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

pytestmark = pytest.mark.gpu


def _trainer(*overrides, method="dino_vmf"):
    recipe = resolve(method, preset="digits", overrides=["model.drop_path=0", *overrides])
    return Trainer(recipe, Runtime.start(recipe.runtime), Plan(70, 20))


def _batches(trainer):
    return create_loader(trainer.recipe, trainer.runtime).batches(0)


def _double(batch, device):
    """The batch in double precision on a device."""
    views = [view.double().to(device) for view in batch.views]
    masks = batch.masks
    if masks is not None:
        masks = Masks(masks.mask.to(device), masks.index.to(device), masks.weight.to(device), masks.counts)
    return dataclasses.replace(batch, views=views, masks=masks)


def test_views_on_the_gpu_equal_those_on_the_cpu():
    cpu, gpu = (next(_batches(_trainer(f"runtime.device={device}"))) for device in ("cpu", "cuda"))
    assert torch.equal(cpu.index, gpu.index.cpu())
    for a, b in zip(cpu.views, gpu.views, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", method_names())
def test_loss_on_the_gpu_equals_the_cpu_in_double_precision(method):
    losses = []
    for device in ("cpu", "cuda"):
        trainer = _trainer(f"runtime.device={device}", "runtime.precision=fp64", method=method)
        batch = next(_batches(_trainer("runtime.device=cpu", method=method)))
        losses.append(trainer.method.loss(_double(batch, trainer.runtime.device), 0)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)


@pytest.mark.parametrize("method", method_names())
def test_bfloat16_stays_close_to_float32(method):
    losses = []
    for precision in ("fp32", "bf16"):
        trainer = _trainer("runtime.device=cuda", f"runtime.precision={precision}", method=method)
        with trainer.runtime.autocast():
            losses.append(trainer.method.loss(next(_batches(trainer)), 0)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize("method", method_names())
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
