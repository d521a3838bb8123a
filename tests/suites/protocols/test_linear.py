from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pretrain.errors import DinobenchError
from suites.protocols import linear
from suites.protocols.knn import rank_of
from suites.protocols.protocol import Context, Split

MakeSplit = Callable[..., Split]


def autograd_training(split: Split, rate: float, parameters: linear.Parameters, seed: int) -> nn.Linear:
    """The same training by torch.optim.SGD, CosineAnnealingLR and autograd, one rate at a time."""
    generator = torch.Generator().manual_seed(seed)
    classifier = nn.Linear(split.features.shape[1], 3)
    with torch.no_grad():
        classifier.weight.copy_(0.01 * torch.randn(3, split.features.shape[1], generator=generator))
        classifier.bias.zero_()
    scaled = rate * parameters.batch_size / 256
    optimiser = torch.optim.SGD(classifier.parameters(), lr=scaled, momentum=parameters.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, parameters.epochs)
    for _ in range(parameters.epochs):
        for chosen in torch.randperm(len(split), generator=generator).split(parameters.batch_size):
            optimiser.zero_grad()
            nn.functional.cross_entropy(classifier(split.features[chosen]), split.labels[chosen]).backward()
            optimiser.step()
        schedule.step()
    return classifier


def test_sweep_equals_one_sgd_training_per_rate(make_split: MakeSplit) -> None:
    split = make_split(100)
    parameters = linear.Parameters(epochs=4, batch_size=32)
    rates = [0.01, 0.3, 2.0]
    context, rows = Context(3, seed=5), torch.arange(100)
    sweep = linear.fit_sweep(split.features, split.labels, rows, rates, parameters, context).logits(split.features)
    for i, rate in enumerate(rates):
        expected = autograd_training(split, rate, parameters, seed=5)(split.features)
        torch.testing.assert_close(sweep[:, i], expected, rtol=1e-4, atol=1e-5)


def test_separable_classes_are_classified(make_split: MakeSplit) -> None:
    outcome = linear.run(make_split(), make_split(seed=1), linear.Parameters(epochs=20, batch_size=32), Context(3))
    assert outcome.scores["top1"] > 95
    assert outcome.scores["learning_rate"] in linear.DINO_RATES
    assert outcome.interval[0] <= outcome.scores["top1"] <= outcome.interval[1]
    assert 100 * outcome.samples["correct"].mean() == pytest.approx(outcome.scores["top1"])


def test_selection_never_reads_the_test_part(make_split: MakeSplit) -> None:
    parameters, test = linear.Parameters(epochs=5, batch_size=32), make_split(seed=1)
    shuffled = Split(test.features, test.labels.roll(1), test.index)
    found = [linear.run(make_split(), part, parameters, Context(3)).scores for part in (test, shuffled)]
    for name in ("learning_rate", "held_out_top1"):
        assert found[0][name] == found[1][name]


def test_same_seed_gives_the_same_scores_and_samples(make_split: MakeSplit) -> None:
    parameters = linear.Parameters(epochs=3, batch_size=32)
    runs = [
        linear.run(make_split(spread=1), make_split(seed=1, spread=1), parameters, Context(3, seed=2)) for _ in "ab"
    ]
    assert runs[0].scores == runs[1].scores
    assert runs[0].samples.equals(runs[1].samples)


def test_folds_are_disjoint_stratified_and_cover_train() -> None:
    labels = torch.arange(100) % 4
    parts = [linear.held_out_split(labels, 0.2, seed=3, fold=fold) for fold in range(5)]
    held = torch.cat([part for _, part in parts])
    assert torch.equal(held.sort().values, torch.arange(100))
    for fit, part in parts:
        assert labels[part].bincount().tolist() == [5, 5, 5, 5]
        assert not set(fit.tolist()) & set(part.tolist())


def test_a_class_of_one_image_stays_in_the_fit_part() -> None:
    fit, held = linear.held_out_split(torch.tensor([0, 0, 0, 0, 1]), 0.5, seed=0)
    assert 4 in fit.tolist()
    assert len(held) == 2


def test_tiny_train_sets_hold_out_at_least_one_image() -> None:
    fit, held = linear.held_out_split(torch.tensor([0, 0, 1]), 0.1, seed=0)
    assert (len(fit), len(held)) == (2, 1)


def test_one_image_per_class_cannot_select_a_rate() -> None:
    with pytest.raises(DinobenchError, match="two train images"):
        linear.held_out_split(torch.arange(3), 0.1, seed=0)


def test_ties_in_accuracy_are_broken_by_loss_then_by_the_smaller_rate() -> None:
    accuracy = torch.tensor([0.9, 0.9, 0.9, 0.1])
    assert linear.select(accuracy, torch.tensor([0.5, 0.4, 0.4, 0.1])) == 1
    assert linear.select(accuracy, torch.tensor([0.5, float("nan"), 0.4, 0.1])) == 2
    assert linear.select(accuracy, torch.full((4,), float("inf"))) is None


def test_a_sweep_that_diverges_everywhere_says_what_to_do(make_split: MakeSplit) -> None:
    parameters = linear.Parameters(learning_rates=(1e38,), epochs=2, batch_size=32)
    with pytest.raises(DinobenchError, match="smaller learning_rates"):
        linear.run(make_split(), make_split(seed=1), parameters, Context(3))


def test_standardised_scores_do_not_depend_on_the_scale_of_a_dimension(make_split: MakeSplit) -> None:
    scale = torch.tensor([1e-3, 1, 1e3, 1, 1, 1, 1, 1])
    parameters = linear.Parameters(epochs=5, batch_size=32, standardise=True)
    splits = [(make_split(), make_split(seed=1))]
    splits.append(tuple(Split(part.features * scale, part.labels, part.index) for part in splits[0]))  # type: ignore[arg-type]
    found = [linear.run(*pair, parameters, Context(3)).scores["top1"] for pair in splits]
    assert found[0] == pytest.approx(found[1])


def test_collapsed_features_do_not_crash() -> None:
    split = Split(torch.ones(30, 4), torch.arange(30) % 3, torch.arange(30))
    outcome = linear.run(split, split, linear.Parameters(epochs=2, batch_size=16, standardise=True), Context(3))
    assert outcome.scores["top1"] == pytest.approx(100 / 3)


def test_folds_that_do_not_fit_into_train_are_refused() -> None:
    with pytest.raises(ValueError, match="more than all of train"):
        linear.Parameters(held_out=0.5, num_folds=3)


def test_golden_dino_clip_lars_acc_accuracy_counts_like_the_official_one(golden):
    g = golden("dino_clip_lars_acc")
    rank = rank_of(torch.from_numpy(g["acc.target"])[:, None], torch.from_numpy(g["acc.logits"]))
    ours = [100 * (rank < k).double().mean().item() for k in (1, 5)]
    assert ours == pytest.approx(g["acc.top1_top5"].tolist(), abs=1e-6)
