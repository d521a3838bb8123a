"""MSN: the official loss on dropped patches, sharpening, me-max, shared prototypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.data.loader import Batch
from pretrain.data.masks import Masks
from pretrain.errors import UsageError
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

TINY = [
    "head.batch_norm=false",
    "head.hidden=16",
    "head.bottleneck=8",
    "head.num_prototypes=12",
    "target.temperature=0.025",
    "optim.batch_size=8",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "runtime.precision=fp64",
    "runtime.device=cpu",
]
VIT = "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}"
TAU, SHARPEN = 0.1, 0.25


def _trainer(*overrides):
    recipe = resolve("msn", preset="digits", overrides=[*TINY, VIT, *overrides])
    return Trainer(recipe, Runtime.start(recipe.runtime), Plan(2, 3))


def _batch(step=0):
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(8, 3, s, s, generator=generator, dtype=torch.float64) for s in (16, 16, 8, 8)]
    mask = torch.zeros(2, 8, 16, dtype=torch.bool)
    mask[1] = torch.rand(8, 16, generator=generator).argsort(1) < 4
    return Batch(views, torch.arange(8), 0, Masks.of(mask))


def _softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _sharpened(p):
    return p ** (1 / SHARPEN) / (p ** (1 / SHARPEN)).sum(1, keepdims=True)


def _balanced(p):
    """Sinkhorn-Knopp that starts from probabilities [R, K]: marginals 1/K and 1/R, three times."""
    q = p.T / p.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdims=True) / q.shape[0]
        q = q / q.sum(0, keepdims=True) / q.shape[1]
    return q.T * q.shape[1]


def _expected(method, batch, sinkhorn=True):
    """Cross-entropy and me-max from the networks' outputs, anchor by anchor."""
    with torch.no_grad():
        anchors = method.student_outputs(batch)
        target = method.teacher.head.project(method.teacher.backbone(batch.views[0])).numpy()
    prototypes = method.student.head.last_layer.weight.detach().numpy()
    prototypes = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    p = _sharpened(_softmax(target @ prototypes.T / TAU))
    p = _balanced(p) if sinkhorn else p
    q = _softmax(anchors.z.numpy() @ prototypes.T / TAU)
    entropies = [-np.sum(p[image] * np.log(q[a, image])) for a in range(len(q)) for image in range(len(p))]
    mean = q.reshape(-1, q.shape[-1]).mean(0)
    return np.mean(entropies), np.log(len(mean)) + np.sum(mean * np.log(mean))


@pytest.mark.parametrize("centring", ["sinkhorn", "none"])
def test_loss_is_the_cross_entropy_of_all_anchors_plus_me_max(centring):
    trainer, batch = _trainer(f"target.centring={centring}", "regularizer.mean_entropy=0.7"), _batch(1)
    trainer.step(_batch(0), 0)  # student and teacher differ from here on
    image, me_max = _expected(trainer.method, batch, sinkhorn=centring == "sinkhorn")
    loss, metrics = trainer.method.loss(batch, 1)
    np.testing.assert_allclose(metrics["loss/image"].item(), image, rtol=1e-9)
    np.testing.assert_allclose(metrics["loss/mean_entropy"].item(), me_max, rtol=1e-9)
    np.testing.assert_allclose(loss.item(), image + 0.7 * me_max, rtol=1e-9)


def test_without_me_max_the_cross_entropy_is_the_loss():
    method, batch = _trainer("regularizer.mean_entropy=0").method, _batch()
    loss, metrics = method.loss(batch, 0)
    assert "loss/mean_entropy" not in metrics
    np.testing.assert_allclose(loss.item(), _expected(method, batch)[0], rtol=1e-9)


def test_sharpening_is_a_lower_temperature():
    method, batch = _trainer("target.centring=none").method, _batch()
    with torch.no_grad():
        teacher = method.teacher_outputs(batch)
        target = method.image_targets(teacher, 0)[0].numpy()
    assert method.teacher_temperature(0) == TAU * SHARPEN
    sharpened = _sharpened(_softmax((teacher.z[0] @ teacher.vectors.T).numpy() / TAU))
    np.testing.assert_allclose(target, sharpened, rtol=1e-10)


def test_anchors_do_not_depend_on_the_patches_they_lost():
    method, batch = _trainer().method, _batch()
    with torch.no_grad():
        before = method.student_outputs(batch)
        hidden = batch.masks.mask[1].view(8, 4, 1, 4, 1).expand(8, 4, 4, 4, 4).reshape(8, 1, 16, 16)
        batch.views[1] = batch.views[1] + 5 * hidden
        after = method.student_outputs(batch)
        batch.views[1] = batch.views[1] + 5 * ~hidden
        kept_changed = method.student_outputs(batch)
    assert before.z.shape == (3, 8, 8)  # the second global view and two local ones
    torch.testing.assert_close(after.z, before.z)
    assert (kept_changed.z[0] - before.z[0]).abs().max() > 1e-3
    assert torch.equal(kept_changed.z[1:], before.z[1:])


def test_gradients_reach_the_student_only_and_its_prototypes_by_the_anchors():
    method, batch = _trainer("regularizer.mean_entropy=0").method, _batch()
    with torch.no_grad():
        target = method.image_targets(method.teacher_outputs(batch), 0)[0]
    method.loss(batch, 0)[0].backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    found = method.student.head.last_layer.weight.grad.clone()
    method.student.zero_grad()
    anchors = method.student_outputs(batch)
    predictions = (anchors.z @ anchors.vectors.T / TAU).log_softmax(-1)
    (-(target * predictions).sum(-1).mean()).backward()
    torch.testing.assert_close(found, method.student.head.last_layer.weight.grad, rtol=1e-8, atol=1e-12)


def test_the_teacher_holds_the_students_prototypes_and_follows_in_the_rest():
    trainer = _trainer()
    start = trainer.method.student.head.last_layer.weight.clone()
    trainer.step(_batch(0), 0)
    trainer.step(_batch(1), 1)
    student, teacher = trainer.method.student, trainer.method.teacher
    assert torch.equal(teacher.head.last_layer.weight, student.head.last_layer.weight)
    assert trainer.method.prototypes() is teacher.head.last_layer
    assert not torch.equal(student.head.last_layer.weight, start)
    assert not torch.equal(teacher.backbone.cls_token, student.backbone.cls_token)


def test_prototypes_are_not_decayed():
    trainer = _trainer()
    prototypes = trainer.method.student.head.last_layer.weight
    (group,) = [g for g in trainer.optimizer.param_groups if any(p is prototypes for p in g["params"])]
    assert group["decay_multiplier"] == 0


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (["masks.kind=none"], r"set masks\.kind=fixed and masks\.views=\[1\]"),
        (["masks.views=[0, 1]"], r"masks\.views=\[1\]"),
        (["model.name=resnet18", "model.kwargs={}", "model.init=timm"], r"set model\.name to a ViT"),
        (["teacher.kind=none"], r"needs teacher\.kind=ema"),
        (["target.centring=logit"], r"needs target\.centring=sinkhorn or none"),
        (["regularizer.koleo=0.1"], r"regularizer\.mean_entropy"),
    ],
)
def test_what_it_cannot_use_is_refused_with_advice(overrides, advice):
    with pytest.raises(UsageError, match=advice):
        _trainer(*overrides)
