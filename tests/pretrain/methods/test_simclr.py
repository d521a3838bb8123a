"""SimCLR: the paper's sum over pairs, its metrics and what it refuses."""

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
    "head.final_batch_norm=false",
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
    recipe = resolve("simclr", preset="digits", overrides=[*TINY, *overrides])
    return Trainer(recipe, Runtime.start(recipe.runtime), Plan(2, 3))


def _batch():
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]
    return Batch(views, torch.arange(8), 0)


def _projections(method, batch):
    with torch.no_grad():
        return method.student(batch.views).z.numpy()


def test_loss_is_the_mean_over_ordered_pairs_of_equation_1():
    method, batch, tau = _trainer("objective.student_temperature=0.3").method, _batch(), 0.3
    z = _projections(method, batch).reshape(16, 8)
    terms = []
    for image in range(8):
        for i, j in ((image, image + 8), (image + 8, image)):
            others = sum(np.exp(z[i] @ z[k] / tau) for k in range(16) if k != i)
            terms.append(-np.log(np.exp(z[i] @ z[j] / tau) / others))
    loss, _ = method.loss(batch, 0)
    np.testing.assert_allclose(loss.item(), np.mean(terms), rtol=1e-12)


def test_alignment_and_uniformity_are_logged():
    trainer, batch = _trainer(), _batch()
    first, second = _projections(trainer.method, batch)
    aligned = np.mean([np.sum((a - b) ** 2) for a, b in zip(first, second, strict=True)])
    potentials = [
        np.log(np.mean([np.exp(-2 * np.sum((z[i] - z[j]) ** 2)) for i in range(8) for j in range(i)]))
        for z in (first, second)
    ]
    trainer.step(batch, 0)
    metrics = trainer.method.health.read()
    np.testing.assert_allclose(metrics["contrast/alignment"], aligned, rtol=1e-9)
    np.testing.assert_allclose(metrics["contrast/uniformity"], np.mean(potentials), rtol=1e-9)


def test_both_views_carry_a_gradient_to_every_parameter():
    method = _trainer().method
    loss, _ = method.loss(_batch(), 0)
    loss.backward()
    assert method.teacher is method.student and method.prototypes() is None
    for name, parameter in method.student.named_parameters():
        assert parameter.grad is not None, name
    views = [view.requires_grad_() for view in _batch().views]
    method.loss(Batch(views, torch.arange(8), 0), 0)[0].backward()
    assert all(view.grad.abs().sum() > 0 for view in views)


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("head.num_prototypes=12", "set it to 0"),
        ("teacher.kind=ema", r"set teacher\.kind=none"),
        ("objective.predictor=true", r"objective\.predictor=false"),
        ("views.local=2", r"set views\.local=0"),
    ],
)
def test_what_it_cannot_use_is_refused_with_advice(override, advice):
    with pytest.raises(UsageError, match=advice):
        _trainer(override)
