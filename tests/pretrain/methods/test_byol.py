"""BYOL: the paper's symmetrised loss, who gets a gradient, local views, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.data.loader import Batch
from pretrain.errors import UsageError
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

TINY = [
    "head.batch_norm=false",
    "head.hidden=16",
    "head.bottleneck=8",
    "optim.batch_size=8",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "runtime.precision=fp64",
    "runtime.device=cpu",
    "model.kwargs={img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
]


def _trainer(*overrides):
    recipe = resolve("byol", preset="digits", overrides=[*TINY, *overrides])
    return Trainer(recipe, Runtime.start(recipe.runtime), Plan(2, 3))


def _batch(step=0, local=0):
    generator = torch.Generator().manual_seed(step)
    sizes = [16, 16, *[8] * local]
    return Batch([torch.randn(8, 3, s, s, generator=generator, dtype=torch.float64) for s in sizes], torch.arange(8), 0)


def _outputs(method, batch):
    """Predictions of all views and projections of the global ones, through the networks' parts."""
    with torch.no_grad():
        student, teacher = method.student, method.teacher
        predictions = [student.predictor(student.head.mlp(student.backbone(view))).numpy() for view in batch.views]
        projections = [teacher.head.mlp(teacher.backbone(view)).numpy() for view in batch.views[:2]]
    return predictions, projections


def _distance(prediction, projection):
    """Equation 2, image by image."""
    rows = zip(prediction, projection, strict=True)
    return np.mean([np.sum((q / np.linalg.norm(q) - z / np.linalg.norm(z)) ** 2) for q, z in rows])


def test_loss_of_two_views_is_the_sum_of_both_directions():
    trainer, batch = _trainer(), _batch(1)
    trainer.step(_batch(0), 0)  # student and teacher differ from here on
    (q1, q2), (z1, z2) = _outputs(trainer.method, batch)
    loss, _ = trainer.method.loss(batch, 1)
    np.testing.assert_allclose(loss.item(), _distance(q1, z2) + _distance(q2, z1), rtol=1e-12)


def test_local_views_predict_both_global_ones():
    method, batch = _trainer("views.local=2").method, _batch(local=2)
    q, z = _outputs(method, batch)
    expected = sum(np.mean([_distance(q[v], z[g]) for v in range(4) if v != g]) for g in range(2))
    np.testing.assert_allclose(method.loss(batch, 0)[0].item(), expected, rtol=1e-12)


def test_gradients_reach_the_student_only():
    trainer = _trainer()
    before = {name: value.clone() for name, value in trainer.method.teacher.named_parameters()}
    loss, _ = trainer.method.loss(_batch(), 0)
    loss.backward()
    assert all(parameter.grad is None for parameter in trainer.method.teacher.parameters())
    assert all(parameter.grad is not None for parameter in trainer.method.student.parameters())
    assert trainer.method.teacher.predictor is None
    trainer.step(_batch(), 0)
    momentum = trainer.method.values(0)["optim/teacher_momentum"]
    student = dict(trainer.method.student.named_parameters())
    for name, value in trainer.method.teacher.named_parameters():
        torch.testing.assert_close(value, momentum * before[name] + (1 - momentum) * student[name])


def test_metrics_are_those_of_the_teacher():
    trainer, batch = _trainer(), _batch()
    _, (z1, z2) = _outputs(trainer.method, batch)
    trainer.step(batch, 0)
    np.testing.assert_allclose(trainer.method.health.read()["contrast/alignment"], _distance(z1, z2), rtol=1e-9)


@pytest.mark.parametrize(
    ("override", "advice"),
    [("head.num_prototypes=12", "set it to 0"), ("teacher.kind=none", r"teacher\.kind=student_copy")],
)
def test_what_it_cannot_use_is_refused_with_advice(override, advice):
    with pytest.raises(UsageError, match=advice):
        _trainer(override)
