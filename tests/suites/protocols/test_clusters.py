from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from suites.protocols import clusters
from suites.protocols.protocol import Context, Split

MakeSplit = Callable[..., Split]


@pytest.mark.parametrize("seed", range(5))
def test_nmi_equals_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    label, found = generator.integers(0, 6, 300), generator.integers(0, 4, 300)
    found = np.where(generator.random(300) < 0.5, label % 4, found)
    expected = normalized_mutual_info_score(label, found)
    assert clusters.normalised_mutual_information(clusters.contingency(label, found)[None])[0] == pytest.approx(
        expected
    )


def test_nmi_of_one_cluster_is_zero_and_of_one_class_and_cluster_one() -> None:
    nmi = clusters.normalised_mutual_information
    assert nmi(np.array([[[5], [5]]])) == [0]
    assert nmi(np.array([[[5]]])) == [1]


def test_separate_classes_are_found(make_split: MakeSplit) -> None:
    parameters = clusters.Parameters(num_seeds=2, num_inits=2)
    outcome = clusters.run(make_split(spread=5), make_split(seed=1, spread=5), parameters, Context(3))
    assert outcome.scores["nmi"] > 95
    assert outcome.n == 90
    assert list(outcome.samples.columns) == ["index", "label", "cluster"]


def test_interval_holds_the_score_and_is_the_bootstrap_over_images(make_split: MakeSplit) -> None:
    train, test = make_split(spread=1), make_split(seed=1, spread=1)
    parameters = clusters.Parameters(num_seeds=2, num_inits=2)
    outcome = clusters.run(train, test, parameters, Context(3))
    found = clusters.cluster(train.features, test.features, 3, parameters, seed=0)
    label, generator = test.labels.numpy(), np.random.default_rng(1)
    values = []
    for _ in range(150):
        chosen = generator.integers(0, len(label), len(label))
        values.append(np.mean([100 * normalized_mutual_info_score(label[chosen], f[chosen]) for f in found]))
    shift = outcome.scores["nmi"] - np.mean(values)
    expected = np.percentile(values, [2.5, 97.5]) + shift
    assert outcome.interval == pytest.approx(expected, abs=2.5)
    assert outcome.interval[0] < outcome.scores["nmi"] < outcome.interval[1]


def test_same_seed_gives_the_same_clusters(make_split: MakeSplit) -> None:
    parameters = clusters.Parameters(num_seeds=2, num_inits=2)
    runs = [clusters.run(make_split(), make_split(seed=1), parameters, Context(3, seed=1)) for _ in range(2)]
    assert runs[0].scores == runs[1].scores
    assert runs[0].samples.equals(runs[1].samples)


def test_collapsed_features_score_zero_without_a_warning() -> None:
    split = Split(torch.ones(30, 4), torch.arange(30) % 3, torch.arange(30))
    assert clusters.run(split, split, clusters.Parameters(num_seeds=1), Context(3)).scores["nmi"] == pytest.approx(0)
