"""The pair-free loss against the pair loop, against the official values, and its limits."""

from __future__ import annotations

import pytest
import torch

from pretrain.objectives import losses
from pretrain.objectives.losses import multi_view_cross_entropy
from pretrain.objectives.targets import Target, TargetConfig
from pretrain.training.schedules import teacher_temperature


def pair_loop(z, weight, bias, target, temperature):
    """Equation 3 of DINO as it is written: every (teacher view, other student view) pair on its own."""
    terms = []
    for g, p in enumerate(target):
        for v, view in enumerate(z):
            if v != g:
                logits = view @ weight.T / temperature + (0 if bias is None else bias)
                terms.append(-(p * torch.log_softmax(logits, -1)).sum(-1).mean())
    return sum(terms) / len(terms)


def case(views=5, teachers=2, batch=3, dim=6, prototypes=11, scale=1.0, with_bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    z = torch.nn.functional.normalize(draw(views, batch, dim), dim=-1).mul(scale).requires_grad_()
    weight = draw(prototypes, dim).requires_grad_()
    bias = draw(prototypes).requires_grad_() if with_bias else None
    return z, weight, bias, torch.softmax(4 * draw(teachers, batch, prototypes), -1)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("views", "teachers"), [(2, 2), (5, 2), (12, 2), (4, 1)])
def test_loss_and_gradients_equal_the_pair_loop(views, teachers, with_bias):
    z, weight, bias, target = case(views, teachers, with_bias=with_bias)
    inputs = [x for x in (z, weight, bias) if x is not None]
    ours, plain = (f(z, weight, bias, target, 0.1) for f in (multi_view_cross_entropy, pair_loop))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    z, weight, bias, target = case(views=3, batch=2, dim=3, prototypes=5)
    assert torch.autograd.gradcheck(lambda *x: multi_view_cross_entropy(*x, target, 0.3), (z, weight, bias))


def test_chunks_do_not_change_the_result(monkeypatch):
    z, weight, bias, target = case()
    whole = torch.autograd.grad(multi_view_cross_entropy(z, weight, bias, target, 0.1), (z, weight, bias))
    monkeypatch.setattr(losses, "MAX_CHUNK_LOGITS", 2 * len(weight))
    chunked = torch.autograd.grad(multi_view_cross_entropy(z, weight, bias, target, 0.1), (z, weight, bias))
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_order_of_images_does_not_matter():
    z, weight, bias, target = case(batch=6)
    order = torch.randperm(6)
    shuffled = multi_view_cross_entropy(z[:, order], weight, bias, target[:, order], 0.1)
    torch.testing.assert_close(shuffled, multi_view_cross_entropy(z, weight, bias, target, 0.1))


def test_one_hot_targets_give_the_ordinary_cross_entropy():
    z, weight, bias, _ = case(views=2)
    labels = torch.tensor([[1, 4, 7], [2, 2, 0]])
    target = torch.nn.functional.one_hot(labels, 11).double()
    logits = z @ weight.T / 0.1 + bias
    plain = torch.nn.functional.cross_entropy(logits.flip(0).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(multi_view_cross_entropy(z, weight, bias, target, 0.1), plain)


def test_a_student_that_matches_its_target_gets_no_gradient():
    z, weight, bias, _ = case(views=2)
    with torch.no_grad():
        target = torch.softmax(z @ weight.T / 0.1 + bias, -1).flip(0)
    (dz,) = torch.autograd.grad(multi_view_cross_entropy(z, weight, bias, target, 0.1), z)
    torch.testing.assert_close(dz, torch.zeros_like(dz), atol=1e-12, rtol=0)


def test_a_constant_normaliser_changes_nothing():
    z, weight, _, target = case()
    shifted = multi_view_cross_entropy(z, weight, torch.full((11,), 7.0, dtype=torch.float64), target, 0.1)
    torch.testing.assert_close(shifted, multi_view_cross_entropy(z, weight, None, target, 0.1))


def test_extreme_logits_stay_finite():
    z, weight, bias, target = (x.detach().float() for x in case(scale=1e3))
    z.requires_grad_()
    loss = multi_view_cross_entropy(z, weight, bias, target, 0.1)
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, z)[0]).all()


def test_bfloat16_autocast_is_close_to_float32():
    z, weight, bias, target = (x.detach().float().requires_grad_() for x in case(dim=64, prototypes=200))
    exact = multi_view_cross_entropy(z, weight, bias, target.detach(), 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = multi_view_cross_entropy(z, weight, bias, target.detach(), 0.1)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=1e-2)
    for a, b in zip(torch.autograd.grad(rounded, (z, weight)), torch.autograd.grad(exact, (z, weight)), strict=True):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999


@pytest.mark.parametrize(("dtype", "loss_tol", "center_tol"), [("f64", 1e-10, 1e-10), ("f32", 2e-6, 2e-6)])
def test_golden_dino_loss_center_and_gradient_follow_the_official_steps(golden, dtype, loss_tol, center_tol):
    g = golden("dino_loss")
    kind = torch.float64 if dtype == "f64" else torch.float32
    k, batch = int(g["out_dim"]), int(g["batch"])
    temperatures = teacher_temperature(
        float(g["warmup_teacher_temp"]),
        float(g["teacher_temp"]),
        int(g["warmup_teacher_temp_epochs"]),
        int(g["nepochs"]),
    )
    torch.testing.assert_close(torch.from_numpy(temperatures), torch.from_numpy(g["teacher_temp_schedule"]))
    target = Target(TargetConfig(centring="logit", momentum=float(g["center_momentum"])), k).to(kind)
    # The golden holds logits, not bottleneck outputs: with K unit prototypes of dimension K the two are the same.
    identity = torch.eye(k, dtype=kind)
    for i, epoch in enumerate(g["epochs"]):
        student = torch.from_numpy(g["student"][i]).to(kind).unflatten(0, (int(g["ncrops"]), batch)).requires_grad_()
        teacher = torch.from_numpy(g["teacher"][i]).to(kind)
        probabilities = target(teacher, float(temperatures[epoch])).unflatten(0, (-1, batch))
        loss = multi_view_cross_entropy(student, identity, None, probabilities, float(g["student_temp"]))
        torch.testing.assert_close(loss.item(), float(g[f"loss_{dtype}"][i]), rtol=loss_tol, atol=0)
        (gradient,) = torch.autograd.grad(loss, student)
        official = torch.from_numpy(g["grad_student_f32"][i]).to(kind)
        torch.testing.assert_close(gradient.flatten(0, 1), official, rtol=1e-4, atol=1e-6)
        target.update()
        center = torch.from_numpy(g[f"center_after_{dtype}"][i])
        torch.testing.assert_close(target.center, center, rtol=center_tol, atol=center_tol)
