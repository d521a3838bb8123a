"""Regularisers: the official values, the plain forms, and inputs that break the plain forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretrain.objectives.regularizers import EPSILON, gram_loss, koleo, koleo_prototypes, mean_entropy


def _draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _plain_koleo(features):
    """Every distance by itself."""
    x = features / features.norm(dim=1, keepdim=True)
    total = torch.zeros(())
    for i in range(len(x)):
        others = torch.stack([(x[i] - x[j]).norm() for j in range(len(x)) if j != i])
        total = total - others.min().log()
    return total / len(x)


def test_golden_dinov2_koleo_values_and_gradients(golden):
    g = golden("dinov2_koleo")
    for name in ("a", "b", "c", "dup", "single"):
        features = torch.from_numpy(g[f"{name}.x"]).requires_grad_()
        loss = koleo(features)
        np.testing.assert_allclose(loss.item(), g[f"{name}.loss"], rtol=1e-5)
        if f"{name}.grad" in g:
            np.testing.assert_allclose(torch.autograd.grad(loss, features)[0], g[f"{name}.grad"], rtol=1e-4, atol=1e-6)
        if f"{name}.loss_f64" in g:
            np.testing.assert_allclose(koleo(features.double()).item(), g[f"{name}.loss_f64"], rtol=1e-9)


def test_golden_dinov2_koleo_is_summed_over_the_global_views(golden):
    g = golden("dinov2_koleo")
    total = sum(koleo(view) for view in torch.from_numpy(g["meta.x"]).chunk(2))
    np.testing.assert_allclose(0.1 * total, g["meta.loss_0p1_sum_of_chunks"], rtol=1e-5)


@pytest.mark.parametrize("spread", [koleo, koleo_prototypes])
def test_koleo_equals_the_plain_form(spread):
    features = _draw(20, 6).requires_grad_()
    ours, plain = spread(features), _plain_koleo(features)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, features)[0] for loss in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_koleo_under_autocast_is_float32():
    features = _draw(16, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = koleo(features), koleo_prototypes(features)
    assert rounded == (koleo(features), koleo_prototypes(features))


def test_koleo_of_one_image_moves_nothing():
    features = _draw(1, 8).requires_grad_()
    assert not torch.autograd.grad(koleo(features), features)[0].any()


@pytest.mark.parametrize("chunk", [1, 7, 50, 1024])
def test_chunks_of_prototypes_do_not_change_the_result(chunk):
    vectors = _draw(50, 5).requires_grad_()
    whole, parts = koleo_prototypes(vectors, chunk=50), koleo_prototypes(vectors, chunk=chunk)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, vectors)[0] for loss in (parts, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_koleo_of_prototypes_sees_directions_only():
    vectors = _draw(12, 5)
    scales = torch.linspace(0.1, 30, 12, dtype=torch.float64)[:, None]
    torch.testing.assert_close(koleo_prototypes(vectors * scales), koleo_prototypes(vectors))


def test_prototypes_at_right_angles_have_a_known_value():
    assert koleo_prototypes(torch.eye(6).double()).item() == pytest.approx(-0.5 * math.log(2), abs=1e-7)


def test_identical_prototypes_are_bounded_by_epsilon():
    vectors = torch.ones(10, 16).requires_grad_()
    loss = koleo_prototypes(vectors)
    assert loss.item() == pytest.approx(-math.log((math.sqrt(16) + 1) * EPSILON), rel=1e-4)
    assert torch.isfinite(torch.autograd.grad(loss, vectors)[0]).all()


def test_prototypes_of_norm_zero_take_no_gradient_and_spoil_none():
    vectors = torch.cat([_draw(8, 5), torch.zeros(3, 5, dtype=torch.float64)]).requires_grad_()
    loss = koleo_prototypes(vectors)
    (gradient,) = torch.autograd.grad(loss, vectors)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert gradient[:8].any() and not gradient[8:].any()


def test_descending_koleo_spreads_two_heaps_of_prototypes():
    vectors = (torch.eye(4).repeat(8, 1) + 0.01 * _draw(32, 4).float()).requires_grad_()
    start = koleo_prototypes(vectors).item()
    optimizer = torch.optim.SGD([vectors], lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        koleo_prototypes(vectors).backward()
        torch.nn.utils.clip_grad_norm_([vectors], 1.0)
        optimizer.step()
    assert koleo_prototypes(vectors).item() < start - 1


def test_mean_entropy_is_log_k_minus_the_entropy_of_the_mean_prediction():
    logits = (3 * _draw(20, 7)).requires_grad_()
    mean = logits.softmax(1).mean(0)
    plain = math.log(7) + (mean * mean.log()).sum()
    ours = mean_entropy(logits)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_mean_entropy_is_zero_for_even_use_and_log_k_for_one_prototype():
    assert mean_entropy(1e4 * torch.eye(8)).item() == pytest.approx(0, abs=1e-6)
    assert mean_entropy(1e4 * torch.eye(8)[:1].repeat(5, 1)).item() == pytest.approx(math.log(8), abs=1e-6)


def test_mean_entropy_of_an_unused_prototype_has_a_finite_gradient():
    logits = torch.zeros(4, 5)
    logits[:, 0] = -1e4
    logits.requires_grad_()
    assert torch.isfinite(torch.autograd.grad(mean_entropy(logits), logits)[0]).all()


GRAM_OPTIONS = {
    "default": {"negatives": "zero"},
    "no_remove": {},
    "only_teacher": {"negatives": "zero_teacher"},
    "nonorm": {"negatives": "zero", "normalise": False},
}


@pytest.mark.parametrize("variant", GRAM_OPTIONS)
@pytest.mark.parametrize("level", ["img_level", "batch_level"])
def test_golden_dinov3_gram(golden, variant, level):
    g = golden("dinov3_gram")
    student, teacher = (torch.from_numpy(g[name]) for name in ("student", "teacher"))
    loss = gram_loss(student, teacher, per_image=level == "img_level", **GRAM_OPTIONS[variant])
    np.testing.assert_allclose(loss, g[f"{variant}.{level}"], rtol=1e-5)


def test_gram_is_zero_at_the_teacher_and_gives_it_no_gradient():
    student, teacher = _draw(2, 9, 5).requires_grad_(), _draw(2, 9, 5, seed=1).requires_grad_()
    assert gram_loss(teacher, teacher) == 0
    gram_loss(student, teacher).backward()
    assert student.grad is not None and student.grad.any() and teacher.grad is None


def test_gram_ignores_a_rotation_of_the_features():
    student, teacher = _draw(2, 9, 5), _draw(2, 9, 5, seed=1)
    rotation = torch.linalg.qr(_draw(5, 5, seed=2))[0]
    torch.testing.assert_close(gram_loss(student @ rotation, teacher), gram_loss(student, teacher))
