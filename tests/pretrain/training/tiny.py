"""Trainings small enough for a test: recipes cut down in every size, random views, and a few steps in float64.

Imported by name, also in the processes that a test starts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.data.masks import MaskSampler
from pretrain.training.recipe import Recipe, resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

SIZES = [
    "head.batch_norm=false",
    "head.final_batch_norm=false",
    "head.hidden=16",
    "head.bottleneck=16",
    "optim.batch_size=8",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "optim.freeze_last_layer_epochs=0",
    "runtime.precision=fp64",
    "runtime.device=cpu",
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}",
    "model.drop_path=0",
    "regularizer.koleo_scope=global",
]
BATCH = 8


def tiny_recipe(method: str, *overrides: str) -> Recipe:
    """The digits recipe of a method with every size cut down, and with 12 prototypes where it has any."""
    usual = resolve(method, preset="digits")
    prototypes = ["head.num_prototypes=12"] if usual.head.num_prototypes else []
    return resolve(method, preset="digits", overrides=[*SIZES, *prototypes, *overrides])


def tiny_trainer(recipe: Recipe, rank: int = 0, world_size: int = 1) -> Trainer:
    """One rank of a training of two epochs with three steps each."""
    return Trainer(recipe, Runtime(torch.device("cpu"), recipe.runtime.precision, rank, world_size), Plan(2, 3))


def views_of(recipe: Recipe, step: int, rows: slice = slice(None)) -> Batch:
    """Random views and drawn masks of 8 images, or of some of these rows."""
    generator = torch.Generator().manual_seed(step)
    sizes = [view.size for view in recipe.views.views]
    views = [torch.randn(BATCH, 3, s, s, generator=generator, dtype=torch.float64)[rows] for s in sizes]
    index = torch.arange(BATCH)[rows]
    masks = None
    if recipe.masks.kind != "none":
        sampler = MaskSampler(recipe.masks, (4, 4), seed=0)
        masks = sampler(index, 0, step=step, first=int(index[0]), batch_size=BATCH)
    return Batch(views, index, 0, masks)


def run_steps(trainer: Trainer, steps: range = range(3)) -> dict[str, Tensor]:
    """Train on this rank's share of the images; gives student, teacher and centres."""
    share = BATCH // trainer.runtime.world_size
    rows = slice(trainer.runtime.rank * share, (trainer.runtime.rank + 1) * share)
    for step in steps:
        batch = views_of(trainer.recipe, step, rows)
        trainer.step(dataclasses.replace(batch, views=[v.to(trainer.runtime.dtype) for v in batch.views]), step)
    state = trainer.method.state_dict()
    return {name: value.clone() for name, value in state.items() if "health" not in name}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> None:
    """Both have the same tensors, up to a tolerance; the message names the one that differs."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)
