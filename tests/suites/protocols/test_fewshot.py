from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pretrain.errors import DinobenchError
from suites.protocols import fewshot
from suites.protocols.protocol import Context, Split

MakeSplit = Callable[..., Split]


def test_vectorised_draws_equal_a_loop_over_draws(make_split: MakeSplit) -> None:
    train, test = make_split(spread=1), make_split(seed=1, spread=1)
    outcome = fewshot.run(train, test, fewshot.Parameters(shots=(2,), num_draws=7), Context(3, seed=4))
    chosen = fewshot.draw(train.labels, torch.arange(3), 2, 7, seed=4)
    normalise = torch.nn.functional.normalize
    features, queries = normalise(train.features, dim=1), normalise(test.features, dim=1)
    accuracy = []
    for indices in chosen:  # [C, shots]
        means = torch.stack([normalise(features[part].mean(0), dim=0) for part in indices])
        accuracy.append(100 * ((queries @ means.T).argmax(1) == test.labels).double().mean())
    assert outcome.scores["shot2"] == pytest.approx(torch.stack(accuracy).mean().item())
    assert outcome.scores["shot2_sd"] == pytest.approx(torch.stack(accuracy).std().item())


def test_draws_take_different_images_of_the_right_class() -> None:
    labels = torch.arange(40) % 4
    chosen = fewshot.draw(labels, torch.arange(4), 5, 30, seed=0)
    assert chosen.shape == (30, 4, 5)
    assert torch.equal(labels[chosen], torch.arange(4).view(1, 4, 1).expand(30, 4, 5))
    assert all(len(set(row.tolist())) == 5 for row in chosen.flatten(0, 1))


def test_more_shots_are_more_accurate_and_less_spread(make_split: MakeSplit) -> None:
    outcome = fewshot.run(make_split(spread=1), make_split(seed=1, spread=1), fewshot.Parameters(), Context(3))
    assert outcome.scores["shot5"] > outcome.scores["shot1"]
    assert outcome.scores["shot5_sd"] < outcome.scores["shot1_sd"]
    assert 100 * outcome.samples["correct"].mean() == pytest.approx(outcome.scores["shot1"])
    assert outcome.interval[0] < outcome.scores["shot1"] < outcome.interval[1]


def test_labels_with_gaps_are_kept(make_split: MakeSplit) -> None:
    train, test = (Split(s.features, s.labels * 5, s.index) for s in (make_split(), make_split(seed=1)))
    outcome = fewshot.run(train, test, fewshot.Parameters(), Context(11))
    assert outcome.scores["shot5"] > 90
    assert set(outcome.samples["prediction"]) <= {0, 5, 10}


def test_a_class_with_too_few_images_is_named() -> None:
    split = Split(torch.eye(7), torch.tensor([0, 0, 0, 0, 0, 1, 1]), torch.arange(7))
    with pytest.raises(DinobenchError, match="class 'cat' has 2 train images"):
        fewshot.run(split, split, fewshot.Parameters(), Context(2, ("dog", "cat")))


def test_collapsed_features_give_chance() -> None:
    split = Split(torch.ones(30, 4), torch.arange(30) % 3, torch.arange(30))
    assert fewshot.run(split, split, fewshot.Parameters(), Context(3)).scores["shot1"] == pytest.approx(100 / 3)
