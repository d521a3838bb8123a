"""Centring: the three rules, two ranks, and prototypes that nobody uses. Sinkhorn-Knopp has its own file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pretrain.objectives.losses import multi_view_cross_entropy
from pretrain.objectives.targets import Target, TargetConfig
from pretrain.training import runtime
from pretrain.training.schedules import teacher_temperature

PROBABILITY_RULES = ["prob_logmean_ema", "prob_ema_log"]
EVERY_RULE = ["logit", *PROBABILITY_RULES, "sinkhorn", "softmax_batch", "none"]


def _target(centring, num_prototypes=7, momentum=0.9):
    return Target(TargetConfig(centring=centring, momentum=momentum), num_prototypes).double()


def _logits(rows=5, num_prototypes=7, seed=0):
    return torch.randn(rows, num_prototypes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("centring", EVERY_RULE)
def test_rows_are_distributions_and_carry_no_gradient(centring):
    target = _target(centring)
    probabilities = target(_logits().requires_grad_(), 0.07)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5, dtype=torch.float64))
    assert not probabilities.requires_grad


def test_logit_centre_is_the_average_of_raw_logits():
    target, logits = _target("logit"), _logits()
    target(logits, 0.07)
    assert not target.center.any(), "the centre moves after the loss, not before"
    target.update()
    torch.testing.assert_close(target.center, 0.1 * logits.mean(0))


def test_log_mean_rule_averages_the_log_of_the_batch_mean_probability():
    target, logits, normaliser = _target("prob_logmean_ema"), _logits(), _logits(1)[0]
    probabilities = target(logits, 0.07, normaliser)
    tempered = logits / 0.07 + normaliser
    torch.testing.assert_close(probabilities, tempered.softmax(1))
    target.update()
    torch.testing.assert_close(target.center, 0.1 * tempered.softmax(1).mean(0).log())
    torch.testing.assert_close(target(logits, 0.07, normaliser), (tempered - target.center).softmax(1))


def test_ema_log_rule_is_the_log_of_the_averaged_probability():
    target, logits = _target("prob_ema_log"), _logits()
    torch.testing.assert_close(target(logits, 0.07), (logits / 0.07).softmax(1))
    target.update()
    expected = (0.9 / 7 + 0.1 * (logits / 0.07).softmax(1).mean(0)).log()
    torch.testing.assert_close(target.center, expected)


@pytest.mark.parametrize("centring", PROBABILITY_RULES)
def test_without_memory_the_centre_is_one_column_step_of_sinkhorn(centring):
    target, logits = _target(centring, momentum=0.0), _logits()
    soft = target(logits, 0.5)
    target.update()
    columns = soft / soft.mean(0)
    torch.testing.assert_close(target(logits, 0.5), columns / columns.sum(1, keepdim=True))


@pytest.mark.parametrize("centring", PROBABILITY_RULES)
def test_an_unused_prototype_does_not_poison_the_centre(centring):
    target = Target(TargetConfig(centring=centring), 4)
    logits = torch.zeros(3, 4)
    logits[:, 0] = -1e4
    for _ in range(3):
        assert torch.isfinite(target(logits, 0.04)).all()
        target.update()
    assert torch.isfinite(target.center).all()


@pytest.mark.parametrize("centring", ["logit", *PROBABILITY_RULES])
def test_micro_batches_move_the_centre_like_one_batch(centring):
    whole, parts = _target(centring), _target(centring)
    logits = _logits(8)
    whole(logits, 0.07)
    for part in logits.split(2):
        parts(part, 0.07)
    for target in (whole, parts):
        target.update()
    torch.testing.assert_close(parts.center, whole.center)


@pytest.mark.parametrize("centring", EVERY_RULE)
def test_a_step_without_rows_changes_nothing(centring):
    target, logits = _target(centring), _logits()
    target(logits, 0.07)
    target.update()
    center, answer = target.center.clone(), target(logits, 0.07)
    target = _target(centring)
    target.center.copy_(center)
    assert target(logits[:0], 0.07).shape == (0, 7)
    target.update()
    target.update()
    torch.testing.assert_close(target(logits, 0.07), answer, rtol=0, atol=0)


@pytest.mark.parametrize("centring", ["logit", *PROBABILITY_RULES])
def test_an_empty_micro_batch_adds_nothing(centring):
    with_it, without = _target(centring), _target(centring)
    for target in (with_it, without):
        target(_logits(), 0.07)
    with_it(_logits()[:0], 0.07)
    for target in (with_it, without):
        target.update()
    torch.testing.assert_close(with_it.center, without.center, rtol=0, atol=0)


@pytest.mark.parametrize("centring", ["logit", *PROBABILITY_RULES])
def test_rows_that_are_not_remembered_do_not_move_the_centre(centring):
    target = _target(centring)
    before = target.center.clone()
    target.centred(_logits(), 0.07, remember=False)
    target.update()
    torch.testing.assert_close(target.center, before, rtol=0, atol=0)


def test_the_mean_of_the_logits_stands_for_its_rows():
    by_rows, by_mean, logits = _target("logit"), _target("logit"), _logits(8)
    by_rows(logits, 0.07)
    by_mean.remember_mean(logits[:6].mean(0), 6)
    by_mean.remember_mean(logits[6:].mean(0), 2)
    by_mean.remember_mean(logits[:0].mean(0), 0)  # the mean of no rows is NaN
    for target in (by_rows, by_mean):
        target.update()
    torch.testing.assert_close(by_mean.center, by_rows.center)


@pytest.mark.parametrize("centring", PROBABILITY_RULES)
def test_a_mean_probability_is_not_had_from_the_mean_of_the_logits(centring):
    with pytest.raises(ValueError, match=f"target.centring={centring} averages probabilities"):
        _target(centring).remember_mean(_logits().mean(0), 5)


def test_equal_norms_make_the_vmf_normaliser_irrelevant():
    constant = torch.full((7,), -3.0, dtype=torch.float64)
    for centring in ("logit", *PROBABILITY_RULES):
        with_it, without = _target(centring), _target(centring)
        for _ in range(2):
            a, b = with_it(_logits(), 0.07, constant), without(_logits(), 0.07)
            torch.testing.assert_close(a, b)
            with_it.update()
            without.update()


UNEVEN = [[0, 8], [5, 3], [0, 0, 8]]
"""Rows of rank 0 and rank 1 at each step; at the last one both have none."""


def _centre_after(centring, steps):
    target = _target(centring)
    for rows in steps:
        target(rows, 0.07)
        target.update()
    return target.state_dict()["center"].numpy()


def _targets_and_centre(centring, steps, synchronous):
    """Of one rank: what it made of its rows at each step, and where its centre ended."""
    target, made = _target(centring), []
    for rows in steps:
        made.append(target(rows, 0.07))
        target.update()
        if synchronous:
            target.settle()
    return torch.cat([*made, target.state_dict()["center"][None]]).numpy()


def _one_rank(rank, golden, folder):
    ranks = golden["teacher"].shape[1]
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{folder}/group")
    temperatures = teacher_temperature(0.04, 0.07, 2, 5)
    teacher, student = (torch.from_numpy(golden[k][:, rank]).double() for k in ("teacher", "student"))
    batch, k = teacher.shape[1] // 2, teacher.shape[-1]
    target = Target(TargetConfig(centring="logit"), k).double()
    losses = []
    for i in range(len(teacher)):
        probabilities = target(teacher[i], temperatures[i]).unflatten(0, (-1, batch))
        z = student[i].unflatten(0, (-1, batch))
        losses.append(multi_view_cross_entropy(z, torch.eye(k).double(), None, probabilities, 0.1).item())
        target.update()
    log_sum = runtime.begin_logsumexp(torch.tensor([-1e4 * rank, float(rank)]))()
    splits = [_logits(8, seed=step).split(sizes)[rank] for step, sizes in enumerate(UNEVEN)]
    np.savez(
        f"{folder}/{rank}.npz",
        losses=losses,
        center=target.state_dict()["center"].numpy(),
        log_sum=log_sum.numpy(),
        **{centring: _centre_after(centring, splits) for centring in ("logit", *PROBABILITY_RULES)},
        **{
            f"{centring}.{synchronous}": _targets_and_centre(centring, splits[:2] * 3, synchronous)
            for centring in ("logit", *PROBABILITY_RULES)
            for synchronous in (False, True)
        },
    )
    torch.distributed.destroy_process_group()


def test_golden_dist2_dino_two_ranks_share_one_centre(golden, tmp_path, start_ranks):
    g = golden("dist2_dino")
    ranks = g["teacher"].shape[1]
    start_ranks(_one_rank, g, str(tmp_path), ranks=ranks)
    for rank in range(ranks):
        answer = np.load(tmp_path / f"{rank}.npz")
        np.testing.assert_allclose(answer["losses"], g["losses_per_rank"][rank], rtol=2e-6)
        np.testing.assert_allclose(answer["center"], g[f"rank{rank}.center"][0], rtol=1e-5, atol=1e-7)
        expected = [0.0, math.log(sum(math.exp(r) for r in range(ranks)))]
        np.testing.assert_allclose(answer["log_sum"], expected, rtol=1e-6)
        for centring in ("logit", *PROBABILITY_RULES):
            single = _centre_after(centring, [_logits(8, seed=0), _logits(8, seed=1)])
            np.testing.assert_allclose(answer[centring], single, rtol=1e-10)
            np.testing.assert_array_equal(answer[f"{centring}.False"], answer[f"{centring}.True"])
