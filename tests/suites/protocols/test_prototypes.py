from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from pretrain.errors import DinobenchError
from pretrain.models.checkpoint import LoadedModel
from suites.protocols import knn, prototypes
from suites.protocols.protocol import Context, Split

MakeSplit = Callable[..., Split]


@pytest.fixture
def context(model: LoadedModel) -> Context:
    return Context(3, ("a", "b", "c"), model=model)


@pytest.fixture
def splits(make_split: MakeSplit) -> tuple[Split, Split]:
    def widen(split: Split) -> Split:
        return Split(split.features.repeat(1, 2), split.labels, split.index)

    return widen(make_split()), widen(make_split(60, seed=1))


def test_counts_agree_with_the_assignment(context: Context, splits: tuple[Split, Split]) -> None:
    assert context.model is not None and context.model.head is not None
    outcome = prototypes.run(*splits, prototypes.Parameters(), context)
    head, scores = context.model.head, outcome.scores
    with torch.no_grad():
        chosen = head.logits(head.project(splits[0].features), 0.04).argmax(1)
    counts = chosen.bincount(minlength=24)
    share = counts[counts > 0] / len(chosen)
    assert scores["used"] + scores["dead"] == scores["num_prototypes"] == 24
    assert scores["used"] == (counts > 0).sum()
    assert scores["usage_entropy"] == pytest.approx(-(share * share.log()).sum().item(), abs=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["usage_entropy"]), rel=1e-5)
    assert outcome.tables["prototypes"]["images"].tolist() == counts.tolist()
    assert outcome.n == len(splits[0])
    assert any("n=90" in note and "equal n" in note for note in outcome.notes)


def test_precision_is_the_norm_over_the_teacher_temperature(context: Context, splits: tuple[Split, Split]) -> None:
    assert context.model is not None and context.model.prototypes is not None
    norms = context.model.prototypes.norms().detach()
    for parameters, temperature in ((prototypes.Parameters(), 0.04), (prototypes.Parameters(temperature=0.1), 0.1)):
        scores = prototypes.run(*splits, parameters, context).scores
        assert scores["kappa_q50"] == pytest.approx((norms / temperature).quantile(0.5).item(), rel=1e-5)
        assert scores["kappa_max"] == pytest.approx((norms / temperature).max().item(), rel=1e-5)


def test_purity_and_majority_vote_agree_with_a_plain_count(context: Context, splits: tuple[Split, Split]) -> None:
    train, test = splits
    outcome = prototypes.run(train, test, prototypes.Parameters(), context)
    table, samples = outcome.tables["prototypes"], outcome.samples
    assert context.model is not None and context.model.head is not None
    chosen, _ = prototypes.assign(context.model.head, train.features, 0.04, "cpu")
    hits = 0
    for number in range(24):
        members = train.labels[chosen == number]
        if len(members) == 0:
            assert table["majority"][number] == -1
            assert np.isnan(table["purity"][number])
            continue
        assert table["majority"][number] == members.bincount().argmax()
        hits += int(members.bincount().max())
    assert outcome.scores["purity"] == pytest.approx(100 * hits / len(train))
    assert (table["majority"].to_numpy()[samples["prototype"]] == samples["prediction"]).all()
    assert outcome.scores["top1"] == pytest.approx(100 * samples["correct"].mean())


def test_agreement_of_an_assignment_by_chance_is_none_after_adjustment(
    context: Context, splits: tuple[Split, Split]
) -> None:
    train, test = splits
    assert context.model is not None and context.model.head is not None
    chosen, _ = prototypes.assign(context.model.head, test.features, 0.04, "cpu")
    real = prototypes.run(train, test, prototypes.Parameters(), context).scores
    assert real["assignment_ami"] == pytest.approx(100 * adjusted_mutual_info_score(test.labels, chosen))
    generator = torch.Generator().manual_seed(0)
    shuffled = Split(test.features, test.labels[torch.randperm(len(test), generator=generator)], test.index)
    scores = prototypes.run(train, shuffled, prototypes.Parameters(), context).scores
    assert abs(scores["assignment_ami"]) < 3
    assert scores["assignment_nmi"] > 6
    assert scores["assignment_ami"] < real["assignment_ami"]


def test_knn_by_norm_sorts_the_test_images_by_the_norm_of_their_prototype(
    context: Context, splits: tuple[Split, Split]
) -> None:
    train, test = splits
    outcome = prototypes.run(train, test, prototypes.Parameters(), context)
    table = outcome.tables["knn_by_norm"]
    assert table["n"].tolist() == [12] * 5
    assert table["norm_min"].is_monotonic_increasing
    options = {"k": (20,), "num_classes": 3}
    ranks, _ = knn.classify(train.features, train.labels, test.features, test.labels, **options)
    overall = 100 * (ranks[20] == 0).double().mean().item()
    assert np.average(table["top1"], weights=table["n"]) == pytest.approx(overall)
    assert outcome.scores["knn_norm_p80_100"] == table["top1"].iloc[-1]


def test_knn_by_norm_does_not_apply_to_normalised_prototypes(
    make_model: Callable[..., LoadedModel], splits: tuple[Split, Split]
) -> None:
    for kind in ("cosine", "weight_norm"):
        outcome = prototypes.run(*splits, prototypes.Parameters(), Context(3, model=make_model(kind=kind)))
        assert "knn_by_norm" not in outcome.tables
        assert any("not applicable" in note for note in outcome.notes)
        assert outcome.scores["kappa_min"] == pytest.approx(1 / 0.04, rel=1e-4)


def test_unique_prototypes_are_swept_over_the_cosine_distance(context: Context, splits: tuple[Split, Split]) -> None:
    assert context.model is not None and context.model.head is not None
    with torch.no_grad():
        context.model.head.last_layer.weight[12:] = context.model.head.last_layer.weight[:12]
    outcome = prototypes.run(*splits, prototypes.Parameters(), context)
    table = outcome.tables["unique"]
    assert outcome.scores["unique"] == 12
    assert table["unique"].is_monotonic_decreasing
    assert table["share"].iloc[0] == 0.5
    assert any("greedy cover" in note for note in outcome.notes)


def test_interval_holds_the_perplexity(context: Context, splits: tuple[Split, Split]) -> None:
    outcome = prototypes.run(*splits, prototypes.Parameters(), context)
    assert outcome.interval[0] < outcome.scores["perplexity"] < outcome.interval[1]


def test_unlabelled_images_leave_out_what_needs_labels(context: Context, splits: tuple[Split, Split]) -> None:
    bare = [Split(split.features, torch.empty(0, dtype=torch.long), split.index) for split in splits]
    outcome = prototypes.run(bare[0], bare[1], prototypes.Parameters(), context)
    assert "purity" not in outcome.scores
    assert outcome.scores["used"] > 0
    assert any("no labels" in note for note in outcome.notes)


def test_a_checkpoint_without_head_or_temperature_is_refused(context: Context, splits: tuple[Split, Split]) -> None:
    assert context.model is not None
    with pytest.raises(DinobenchError, match="needs a head"):
        prototypes.run(*splits, prototypes.Parameters(), replace(context, model=replace(context.model, head=None)))
    with pytest.raises(DinobenchError, match=r"parameters\.temperature"):
        bare = replace(context.model, temperature=None)
        prototypes.run(*splits, prototypes.Parameters(), replace(context, model=bare))


def test_constant_features_use_one_prototype(context: Context) -> None:
    split = Split(torch.ones(30, 16), torch.arange(30) % 3, torch.arange(30))
    scores = prototypes.run(split, split, prototypes.Parameters(), context).scores
    assert (scores["used"], scores["perplexity"]) == (1, 1)
    assert scores["purity"] == pytest.approx(100 / 3)
