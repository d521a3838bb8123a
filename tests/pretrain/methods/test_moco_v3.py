"""MoCo v3: algorithm 1 of the paper, and the frozen patch embedding."""

from __future__ import annotations

import numpy as np
import torch

from pretrain.data.loader import Batch
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

TINY = [
    "head.batch_norm=false",
    "head.final_batch_norm=false",
    "head.hidden=16",
    "head.bottleneck=8",
    "optim.batch_size=8",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "runtime.precision=fp64",
    "runtime.device=cpu",
]
VIT = "model.kwargs={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"


def _trainer(*overrides):
    recipe = resolve("moco_v3", preset="digits", overrides=[*TINY, *overrides])
    return Trainer(recipe, Runtime.start(recipe.runtime), Plan(2, 3))


def _batch(step=0):
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    return Batch(views, torch.arange(8), 0)


def _unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _contrast(queries, keys, tau):
    """`ctr` of algorithm 1, query by query."""
    q, k = _unit(queries), _unit(keys)
    terms = [-np.log(np.exp(q[i] @ k[i] / tau) / sum(np.exp(q[i] @ other / tau) for other in k)) for i in range(len(q))]
    return 2 * tau * np.mean(terms)


def test_loss_is_algorithm_1():
    trainer, batch, tau = _trainer(VIT, "objective.student_temperature=0.4"), _batch(1), 0.4
    trainer.step(_batch(0), 0)
    student, teacher = trainer.method.student, trainer.method.teacher
    with torch.no_grad():
        q1, q2 = (student.predictor(student.head.mlp(student.backbone(view))).numpy() for view in batch.views)
        k1, k2 = (teacher.head.mlp(teacher.backbone(view)).numpy() for view in batch.views)
    loss, metrics = trainer.method.loss(batch, 1)
    np.testing.assert_allclose(loss.item(), _contrast(q1, k2, tau) + _contrast(q2, k1, tau), rtol=1e-12)
    assert set(metrics) == {"contrast/alignment", "contrast/uniformity"}
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_projector_and_predictor_end_with_a_batch_norm_without_scale():
    student = _trainer(VIT, "head.batch_norm=true", "head.final_batch_norm=true").method.student
    for mlp, layers in ((student.head.mlp, 3), (student.predictor, 2)):
        kinds = [type(module).__name__ for module in mlp]
        assert kinds == [*["Linear", "BatchNorm1d", "ReLU"] * (layers - 1), "Linear", "BatchNorm1d"]
        assert not mlp[-1].affine


def test_the_patch_embedding_stays_as_drawn_in_both_networks():
    trainer = _trainer(VIT)
    start = {name: value.clone() for name, value in trainer.method.student.named_parameters()}
    for step in range(3):
        trainer.step(_batch(step), step)
    student = dict(trainer.method.student.named_parameters())
    frozen = {name for name, value in student.items() if torch.equal(value, start[name])}
    assert frozen == {"backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    for name in frozen:
        assert torch.equal(trainer.method.teacher.get_parameter(name), start[name])
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(value) for name, value in student.items() if name not in frozen}


def test_the_patch_embedding_is_trained_when_asked():
    trainer = _trainer(VIT, "method.parameters.freeze_patch_embed=false")
    before = trainer.method.student.backbone.patch_embed.proj.weight.clone()
    trainer.step(_batch(), 0)
    assert not torch.equal(before, trainer.method.student.backbone.patch_embed.proj.weight)


def test_a_backbone_without_patches_trains_whole():
    trainer = _trainer("model.name=resnet18", "model.kwargs={}", "model.init=timm")
    assert all(parameter.requires_grad for parameter in trainer.method.student.parameters())
