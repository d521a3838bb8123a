"""Sinkhorn-Knopp targets: the plain algorithm, the official values, two ranks, and logits that break the plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.objectives.losses import masked_cross_entropy, multi_view_cross_entropy
from pretrain.objectives.targets import Target, TargetConfig, sinkhorn_potentials


def _target(num_prototypes, centring="sinkhorn", **options):
    return Target(TargetConfig(centring=centring, **options), num_prototypes)


def _logits(rows=20, num_prototypes=7, seed=0):
    return torch.randn(rows, num_prototypes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _plain(logits, iterations):
    """SwAV's listing: rescale the matrix, prototypes then samples."""
    q = np.exp(logits.numpy())
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0, keepdims=True) * q.shape[1]
        q /= q.sum(1, keepdims=True) * q.shape[0]
    return torch.from_numpy(q * len(q))


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize(("rows", "num_prototypes"), [(20, 7), (3, 40), (1, 5)])
def test_scaling_vectors_give_what_rescaling_the_matrix_gives(rows, num_prototypes, iterations):
    logits = _logits(rows, num_prototypes)
    answer = _target(num_prototypes, iterations=iterations).double()(logits, 0.2)
    torch.testing.assert_close(answer, _plain(logits / 0.2, iterations), rtol=1e-10, atol=1e-14)


def test_it_is_a_softmax_of_the_centred_logits_and_a_normaliser_enters_it():
    target, logits, normaliser = _target(7).double(), _logits(), _logits(1)[0]
    centred = target.centred(logits, 0.3, normaliser)
    torch.testing.assert_close(centred.softmax(1), _plain(logits / 0.3 + normaliser, 3), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 10.0, 1e5])
@pytest.mark.parametrize(("rows", "num_prototypes"), [(50, 1), (400, 8), (8, 400), (1, 50)])
def test_many_iterations_stay_in_the_range_of_float32(rows, num_prototypes, scale):
    logits = scale * _logits(rows, num_prototypes).float()
    logits[: rows // 3] -= 20 * scale
    logits[:, : num_prototypes // 4] += 30 * scale
    answer = _target(num_prototypes, iterations=200)(logits, 1.0)
    torch.testing.assert_close(answer.sum(1), torch.ones(rows))


def test_many_iterations_use_every_prototype_alike():
    answer = _target(7, iterations=200).double()(_logits(), 0.3)
    torch.testing.assert_close(answer.sum(0), torch.full((7,), 20 / 7, dtype=torch.float64))


def test_softmax_batch_is_a_softmax_over_the_batch_then_over_prototypes():
    logits = _logits()
    expected = (logits / 0.3).softmax(0)
    expected = expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(_target(7, "softmax_batch").double()(logits, 0.3), expected)


def test_float64_logits_stay_float64_in_a_float32_target():
    logits = _logits()
    answer = _target(7)(logits, 0.3)
    assert answer.dtype == torch.float64
    torch.testing.assert_close(answer, _plain(logits / 0.3, 3), rtol=1e-10, atol=1e-14)


def test_autocast_does_not_round_the_potentials():
    logits = _logits().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = _target(7)(logits, 0.1)
    torch.testing.assert_close(answer, _target(7)(logits, 0.1), rtol=0, atol=0)


@pytest.mark.parametrize("offset", [0.0, 500.0, -500.0])
def test_logits_that_overflow_float32_equal_the_float64_answer(offset):
    # The plain form fails above 88.
    logits = 10 * _logits()
    answer = _target(7)((logits + offset).float(), 1.0)
    torch.testing.assert_close(answer.double(), _plain(logits, 3), rtol=1e-4, atol=1e-5)


def test_a_prototype_nobody_comes_near_stays_at_zero_and_the_others_are_right():
    logits = _logits(num_prototypes=6)
    dead = torch.cat([logits, torch.full((20, 1), -1e4, dtype=torch.float64)], 1).float()
    answer = _target(7).centred(dead, 0.5)
    assert torch.isfinite(answer).all()
    probabilities = answer.softmax(1)
    assert probabilities[:, 6].max() == 0
    torch.testing.assert_close(probabilities[:, :6].double(), _plain(logits / 0.5, 3), rtol=1e-4, atol=1e-6)


def test_a_sample_far_below_the_others_still_gets_a_distribution():
    logits = _logits().float()
    logits[3] -= 300
    answer = _target(7)(logits, 0.5)
    torch.testing.assert_close(answer.sum(1), torch.ones(20))


def test_each_sample_on_a_prototype_of_its_own_keeps_it():
    logits = torch.eye(5) * 1e3
    torch.testing.assert_close(_target(5)(logits, 0.04), torch.eye(5))


def test_no_rows_give_no_targets():
    assert _target(7)(torch.zeros(0, 7), 0.04).shape == (0, 7)


@pytest.mark.parametrize("centring", ["sinkhorn", "softmax_batch", "none"])
def test_no_centre_is_kept(centring):
    target, logits = _target(7, centring), _logits().float()
    before = target(logits, 0.1)
    target.remember_mean(logits.mean(0), 20)
    target.update()
    assert not target.has_memory and not target.center.any()
    torch.testing.assert_close(target(logits, 0.1), before, rtol=0, atol=0)


def test_golden_dinov2_dino_loss_sinkhorn(golden):
    g = golden("dinov2_dino_loss")
    for logits, temperature, step in zip(g["teacher"], g["teacher_temps"], range(3), strict=True):
        rows = torch.from_numpy(logits)
        for iterations in (1, 3, 10):
            answer = _target(int(g["out_dim"]), iterations=iterations)(rows, float(temperature))
            np.testing.assert_allclose(answer, g[f"sk_iters{iterations}"][step], rtol=1e-4, atol=1e-6)
        # Without an iteration the official code does not normalise the samples.
        uncentred = _target(int(g["out_dim"]), "none")(rows, float(temperature))
        joint = g["sk_iters0"][step]
        np.testing.assert_allclose(uncentred, joint / joint.sum(1, keepdims=True), rtol=1e-4, atol=1e-6)


def test_golden_dinov2_dino_loss_sinkhorn_losses_are_the_mean_over_pairs(golden):
    g = golden("dinov2_dino_loss")
    k, batch, num_local = int(g["out_dim"]), int(g["batch"]), int(g["nlocal"])
    for step, scaled in enumerate(g["sk_dino_local_global_scaled"]):
        target = _target(k)(torch.from_numpy(g["teacher"][step]), float(g["teacher_temps"][step]))
        student = np.concatenate([g["student_global"][step], g["student_local"][step]])
        student = torch.from_numpy(student).unflatten(0, (2 + num_local, batch))
        # The golden pairs the stored rows; exchanging the two teacher views makes these DINO's pairs g != v.
        swapped = target.unflatten(0, (2, batch)).flip(0)
        loss = multi_view_cross_entropy(student, torch.eye(k), None, swapped, float(g["student_temp"]))
        np.testing.assert_allclose(loss, scaled.sum(), rtol=1e-5)


def test_golden_dinov2_dino_loss_centring(golden):
    g = golden("dinov2_dino_loss")
    k, batch, num_local = int(g["out_dim"]), int(g["batch"]), int(g["nlocal"])
    tau, eye = float(g["student_temp"]), torch.eye(k)
    target = _target(k, "logit", momentum=float(g["center_momentum"]))
    for step, temperature in enumerate(g["teacher_temps"]):
        np.testing.assert_allclose(target.center, g["centering_center_used"][step], rtol=1e-5, atol=1e-7)
        q = target(torch.from_numpy(g["teacher"][step]), float(temperature)).unflatten(0, (2, batch))
        np.testing.assert_allclose(q, g["centering_q"][step], rtol=1e-4, atol=1e-6)
        local = torch.from_numpy(g["student_local"][step]).unflatten(0, (num_local, batch)).requires_grad_()
        whole = torch.from_numpy(g["student_global"][step]).unflatten(0, (2, batch)).requires_grad_()
        # Raw values of the official forward(): sums over terms; all (teacher, local) pairs, and equal rows as one term.
        local_sum = 2 * num_local * multi_view_cross_entropy(local, eye, None, q, tau, torch.ones(2, num_local))
        global_sum = multi_view_cross_entropy(whole, eye, None, q, tau, torch.eye(2))
        for name, loss, rows in (("local", local_sum, local), ("global", global_sum, whole)):
            np.testing.assert_allclose(loss.item(), g[f"centering_loss_{name}_sum"][step], rtol=1e-5)
            (gradient,) = torch.autograd.grad(loss, rows)
            np.testing.assert_allclose(gradient.flatten(0, 1), g[f"grad_{name}"][step], rtol=1e-4, atol=1e-6)
        target.update()
    np.testing.assert_allclose(target.center, g["centering_center_final"], rtol=1e-5, atol=1e-7)


def test_golden_dinov2_ibot_patch_loss(golden):
    g = golden("dinov2_ibot_patch_loss")
    k, tau, temperature = int(g["out_dim"]), float(g["student_temp"]), float(g["teacher_temp"])
    teacher, student = (torch.from_numpy(g[name]).flatten(0, 1)[g["mask_indices"]] for name in _PATCHES)
    student.requires_grad_()
    masks = torch.from_numpy(g["masks"])
    np.testing.assert_array_equal(masks.flatten().nonzero().squeeze(1), g["mask_indices"])
    weight = (1 / masks.sum(1).clamp_min(1)).repeat_interleave(masks.sum(1))
    np.testing.assert_allclose(weight, g["masks_weight"], rtol=1e-6)

    def loss(q, row_weight):
        return masked_cross_entropy(student, torch.eye(k), None, q, tau, row_weight, len(masks))

    q = _target(k)(teacher, temperature)
    np.testing.assert_allclose(q, g["sk_q"], rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss(q, weight), student)
    np.testing.assert_allclose(gradient, g["sk_grad_student"], rtol=1e-4, atol=1e-7)
    for name in ("sk_forward_masked", "sk_forward_masked_noweight"):
        np.testing.assert_allclose(loss(q, weight).item(), g[name], rtol=1e-5)
    np.testing.assert_allclose(loss(q, 2 * weight).item(), g["sk_forward_masked_w_double_weight"], rtol=1e-5)
    plain = _target(k, "none")(teacher, temperature)
    np.testing.assert_allclose(loss(plain, weight).item(), g["dense_forward"], rtol=1e-5)


def test_golden_dinov2_ibot_patch_loss_centre_is_of_masked_patches(golden):
    g = golden("dinov2_ibot_patch_loss")
    teacher = torch.from_numpy(g["teacher_all"]).flatten(0, 1)[g["mask_indices"]]
    target = _target(int(g["out_dim"]), "logit", momentum=float(g["center_momentum"]))
    for call in range(3):
        np.testing.assert_allclose(target.center, g["center_used"][call], rtol=1e-5, atol=1e-7)
        q = target(teacher + 0.1 * call, float(g["teacher_temp"]))
        np.testing.assert_allclose(q, g["center_q"][call], rtol=1e-4, atol=1e-6)
        target.update()
    np.testing.assert_allclose(target.center, g["center_final"], rtol=1e-5, atol=1e-7)


_PATCHES = ("teacher_all", "student_all")


def _one_rank(rank, golden, folder):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/group")
    teacher = torch.from_numpy(golden["teacher"])  # [step, rank, 2B, K]
    k = teacher.shape[-1]
    target = _target(k)
    answer = {"sk": torch.stack([target(rows, 0.07) for rows in teacher[:, rank]])}
    patches = teacher[0].flatten(0, 1)
    answer["ibot_sk"] = target(patches[:7] if rank == 0 else patches[7:], 0.07)
    # All rows on rank 1: rank 0 takes part with none.
    answer["uneven"] = target(patches[: rank * len(patches)], 0.07)
    answer["nowhere"] = target(patches[:0], 0.07)
    answer["potentials"] = sinkhorn_potentials(patches[: rank * len(patches)], 3)
    centred = _target(k, "logit")
    centred(teacher[0, rank], 0.07)
    centred.update()
    answer["center1"] = centred.state_dict()["center"][None]
    np.savez(f"{folder}/{rank}.npz", **{name: value.numpy() for name, value in answer.items()})
    torch.distributed.destroy_process_group()


def test_golden_dist2_dinov2_ranks_balance_one_matrix(golden, tmp_path, start_ranks):
    g = golden("dist2_dinov2")
    start_ranks(_one_rank, g, str(tmp_path))
    patches = torch.from_numpy(g["teacher"][0]).flatten(0, 1)
    answers = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    for rank, answer in enumerate(answers):
        for name in ("sk", "ibot_sk", "center1"):
            np.testing.assert_allclose(answer[name], g[f"rank{rank}.{name}"], rtol=1e-4, atol=1e-6)
        assert answer["nowhere"].shape == (0, patches.shape[1])
        np.testing.assert_allclose(answer["potentials"], sinkhorn_potentials(patches, 3), rtol=1e-5, atol=1e-5)
    assert len(answers[0]["uneven"]) == 0
    single = _target(patches.shape[1])(patches, 0.07)
    np.testing.assert_allclose(answers[1]["uneven"], single, rtol=1e-5, atol=1e-7)
