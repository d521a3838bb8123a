"""The verdict on collapse: each state by its name, and never on a healthy run."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.training.health import PATIENCE, Health, collapse_states, feature_spread

K, ROWS, DIM = 32, 256, 16


def _features(spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 1.0 + spread * torch.randn(ROWS, DIM, generator=generator)


def _sharp(labels):
    return torch.softmax(20.0 * torch.nn.functional.one_hot(labels, K).float(), -1)


def _metrics(target, features=None):
    health = Health(K)
    health.observe(target, 3.0 + target.log(), _features() if features is None else features)
    health.observe_loss(torch.tensor(1.0), 0)
    return health.read()


def test_entropies_of_known_targets():
    metrics = _metrics(_sharp(torch.arange(ROWS) % K))
    assert metrics["health/target_entropy"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["health/mean_target_entropy"] == pytest.approx(math.log(K), abs=1e-4)
    assert metrics["health/information"] == pytest.approx(math.log(K), abs=1e-4)
    assert metrics["prototypes/used"] == K
    assert metrics["prototypes/usage_entropy"] == pytest.approx(math.log(K), abs=1e-5)
    assert metrics["loss/kl"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["loss/over_lnK"] == pytest.approx(1 / math.log(K))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1000.0])
def test_entropy_from_logits_equals_the_sum_over_probabilities(scale):
    logits = scale * torch.randn(ROWS, K, generator=torch.Generator().manual_seed(0))
    target = logits.softmax(1)
    health = Health(K)
    health.observe(target, logits, _features())
    expected = torch.special.entr(target.double()).sum().item()
    assert health.image.sum_entropy.item() == pytest.approx(expected, rel=1e-4, abs=1e-4 * scale)


@pytest.mark.parametrize(
    ("state", "target", "features"),
    [
        ("uniform", torch.full((ROWS, K), 1 / K), None),
        ("constant", _sharp(torch.zeros(ROWS, dtype=torch.long)), None),
        ("features", _sharp(torch.arange(ROWS) % K), _features(spread=1e-4)),
    ],
)
def test_each_collapse_is_called_by_its_name(state, target, features):
    assert collapse_states(_metrics(target, features), K) == [state]


def test_sharp_targets_over_many_prototypes_are_healthy():
    assert collapse_states(_metrics(_sharp(torch.arange(ROWS) % 8)), K) == []


def test_no_verdict_on_fewer_intervals_than_patience():
    health = Health(K)
    flat = _metrics(torch.full((ROWS, K), 1 / K))
    assert [health.verdict(flat) for _ in range(PATIENCE)] == [None] * (PATIENCE - 1) + ["uniform"]
    healthy = _metrics(_sharp(torch.arange(ROWS) % 8))
    assert health.verdict(healthy) is None
    assert health.verdict(flat) is None, "the count starts anew after a healthy interval"


def test_a_restored_health_remembers_suspicious_intervals():
    first, second = Health(K), Health(K)
    flat = _metrics(torch.full((ROWS, K), 1 / K))
    for _ in range(PATIENCE - 1):
        first.verdict(flat)
    second.load_state_dict(first.state_dict())
    assert second.verdict(flat) == "uniform"


def test_reading_starts_a_new_interval():
    health = Health(K)
    for value in (1.0, 3.0):
        sharp = _sharp(torch.arange(ROWS) % K)
        health.observe(sharp, sharp.log(), _features())
        health.observe_loss(torch.tensor(value), 0)
    assert health.read()["loss/total"] == 2.0
    health.observe(torch.full((ROWS, K), 1 / K), torch.zeros(ROWS, K), _features())
    health.observe_loss(torch.tensor(5.0), 1)
    metrics = health.read()
    assert metrics["loss/total"] == 5.0
    assert metrics["health/target_entropy"] == pytest.approx(math.log(K), abs=1e-5)


def test_first_step_with_a_bad_loss_is_kept():
    health = Health(K)
    for step, value in enumerate([1.0, float("nan"), 2.0, float("inf")]):
        health.observe_loss(torch.tensor(value), step)
    assert int(health.first_bad_step) == 1


def test_isotropic_features_have_spread_one_and_full_rank():
    generator = torch.Generator().manual_seed(0)
    std, rank = feature_spread(torch.randn(4000, DIM, generator=generator))
    assert float(std) == pytest.approx(1.0, abs=0.02)
    assert float(rank) == pytest.approx(DIM, abs=0.2)


def test_features_on_a_line_have_rank_one():
    _, rank = feature_spread(torch.linspace(-1, 1, 50)[:, None] * torch.ones(DIM))
    assert float(rank) == pytest.approx(1.0, abs=1e-3)
