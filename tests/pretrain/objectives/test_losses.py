"""The losses against their plain loops, against the official values, and their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.objectives import losses
from pretrain.objectives.losses import masked_cross_entropy, multi_view_cross_entropy, multi_view_mse
from pretrain.objectives.targets import Target, TargetConfig
from pretrain.training.schedules import teacher_temperature


def cross_entropy(p, logits):
    return -(p * torch.log_softmax(logits, -1)).sum(-1)


def squared_distance(p, logits):
    return (p - torch.softmax(logits, -1)).square().sum(-1)


def pair_loop(z, weight, bias, target, temperature, pairs=None, distance=cross_entropy):
    """Equation 3 of DINO as it is written: every (teacher view, other student view) pair on its own."""
    terms = []
    for g, p in enumerate(target):
        for v, view in enumerate(z):
            if v != g if pairs is None else pairs[g, v]:
                logits = view @ weight.T / temperature + (0 if bias is None else bias)
                terms.append(distance(p, logits).mean())
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


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("teachers", "pairs"),
    [
        (1, [[1, 1, 1, 1]]),  # MSN: one target view, every anchor
        (2, [[0, 1, 1, 1], [1, 0, 1, 1]]),  # DINO's own
        (2, [[1, 0, 0, 0], [0, 1, 0, 0]]),  # a view with itself
        (3, [[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]),  # a student and a teacher view without a pair
    ],
)
def test_chosen_pairs_equal_the_pair_loop(teachers, pairs, with_bias):
    z, weight, bias, target = case(4, teachers, with_bias=with_bias)
    pairs = torch.tensor(pairs)
    inputs = [x for x in (z, weight, bias) if x is not None]
    ours, plain = (f(z, weight, bias, target, 0.1, pairs) for f in (multi_view_cross_entropy, pair_loop))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("views", "teachers"), [(2, 2), (5, 2), (4, 1)])
def test_squared_distance_equals_the_pair_loop(views, teachers, with_bias):
    z, weight, bias, target = case(views, teachers, with_bias=with_bias)
    inputs = [x for x in (z, weight, bias) if x is not None]
    ours = multi_view_mse(z, weight, bias, target, 0.1)
    plain = pair_loop(z, weight, bias, target, 0.1, distance=squared_distance)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def masked_case(rows=6, **options):
    z, weight, bias, target = case(views=2, teachers=1, batch=rows, **options)
    return z[0].detach().requires_grad_(), weight, bias, target[0], torch.linspace(0.1, 1, rows, dtype=torch.float64)


@pytest.mark.parametrize("with_bias", [True, False])
def test_masked_loss_equals_the_loop_over_patches(with_bias):
    z, weight, bias, target, row_weight = masked_case(with_bias=with_bias)
    inputs = [x for x in (z, weight, bias) if x is not None]
    ours = masked_cross_entropy(z, weight, bias, target, 0.1, row_weight, num_crops=4)
    plain = torch.zeros(())
    for m in range(len(z)):
        logits = weight @ z[m] / 0.1 + (0 if bias is None else bias)
        plain = plain + row_weight[m] * cross_entropy(target[m], logits) / 4
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_no_masked_patch_gives_a_zero_with_zero_gradients():
    z, weight, bias, target, row_weight = masked_case()
    loss = masked_cross_entropy(z[:0], weight, bias, target[:0], 0.1, row_weight[:0], num_crops=4)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (z, weight, bias)):
        assert not gradient.any()


def test_masked_loss_under_bfloat16_autocast_is_close_to_float32():
    z, weight, bias, target, row_weight = (x.detach().float() for x in masked_case(dim=64, prototypes=200))
    exact = masked_cross_entropy(z, weight, bias, target, 0.1, row_weight, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = masked_cross_entropy(z, weight, bias, target, 0.1, row_weight, 4)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=1e-2)


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


@pytest.mark.parametrize(("dtype", "tol"), [("f64", 1e-10), ("f32", 2e-6)])
@pytest.mark.parametrize("with_local", [True, False])
def test_golden_ibot_loss_two_centres_follow_the_official_steps(golden, dtype, tol, with_local):
    g = golden("ibot_loss")
    kind = torch.float64 if dtype == "f64" else torch.float32
    suffix = dtype if with_local else f"{dtype}_nolocal"
    batch, tau = int(g["batch"]), float(g["student_temp"])
    num_crops, k, k_patch = int(g["ngcrops"]) * batch, g["teacher_cls"].shape[-1], g["teacher_patch"].shape[-1]
    config = TargetConfig(centring="logit", momentum=float(g["center_momentum"]))
    target, patch_target = Target(config, k).to(kind), Target(config, k_patch).to(kind)

    def read(name, i):
        return torch.from_numpy(g[name][i]).to(kind)

    for i, epoch in enumerate(g["epochs"]):
        temperature, patch_temperature = (
            float(g[f"teacher_{name}_schedule"][epoch]) for name in ("temp", "patch_temp")
        )
        crops = [read("student_cls", i)] + [read("student_local_cls", i)] * with_local
        student = torch.cat(crops).unflatten(0, (-1, batch)).requires_grad_()
        probabilities = target(read("teacher_cls", i), temperature).unflatten(0, (-1, batch))
        cls = float(g["lambda1"]) * multi_view_cross_entropy(
            student, torch.eye(k, dtype=kind), None, probabilities, tau
        )

        masks = torch.from_numpy(g["masks_global"][i]).reshape(num_crops, -1)
        weight = (1 / masks.sum(1).clamp_min(1).to(kind)).repeat_interleave(masks.sum(1))
        patches, teacher_patches = read("student_patch", i).requires_grad_(), read("teacher_patch", i)
        q = patch_target.centred(teacher_patches[masks], patch_temperature, remember=False).softmax(-1)
        patch_target.remember_mean(teacher_patches.flatten(0, 1).mean(0), teacher_patches[..., 0].numel())
        identity = torch.eye(k_patch, dtype=kind)
        patch = masked_cross_entropy(patches[masks], identity, None, q, tau, weight, num_crops)
        patch = float(g["lambda2"]) * patch

        ours = [x.item() for x in (cls, patch, cls + patch)]
        np.testing.assert_allclose(ours, g[f"cls_patch_loss_{suffix}"][i], rtol=tol)
        gradients = torch.autograd.grad(cls + patch, (student, patches))
        if with_local:
            official = np.concatenate([g["grad_student_cls"][i], g["grad_student_local_cls"][i]])
            np.testing.assert_allclose(gradients[0].flatten(0, 1), official, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(gradients[1], g["grad_student_patch"][i], rtol=1e-4, atol=1e-6)
        for each, name in ((target, "center"), (patch_target, "center2")):
            each.update()
            np.testing.assert_allclose(each.center, g[f"{name}_{suffix}"][i], rtol=tol, atol=tol)
