from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from pretrain.data.images import ImageSet
from pretrain.data.transforms import EvalTransform
from pretrain.errors import DinobenchError
from pretrain.models.backbones import last_tokens
from pretrain.models.checkpoint import LoadedModel, load
from pretrain.models.heads import HeadConfig, ProjectionHead
from pretrain.models.patch_prototypes import PatchKind, PatchPrototypes
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


def with_patches(model: LoadedModel, kind: PatchKind = "separate", temperature: float | None = 0.07) -> LoadedModel:
    """The network with a patch head of 12 prototypes, of which the last 4 are copies."""
    torch.manual_seed(5)
    head = ProjectionHead(16, HeadConfig(hidden=8, bottleneck=16, num_prototypes=12, prototypes="free")).eval()
    with torch.no_grad():
        head.last_layer.weight[8:] = 2 * head.last_layer.weight[:4]
    if kind == "shared":
        assert model.head is not None
        head = model.head
    return replace(model, patch=PatchPrototypes(kind, head, head.last_layer, temperature, model.head))


@dataclass(frozen=True)
class WithImages(Context):
    train_images: ImageSet | None = None
    transform: EvalTransform | None = None


def test_patch_head_has_scores_of_its_own_from_weights_alone(context: Context, splits: tuple[Split, Split]) -> None:
    assert context.model is not None
    plain = prototypes.run(*splits, prototypes.Parameters(), context)
    found = prototypes.run(*splits, prototypes.Parameters(), replace(context, model=with_patches(context.model)))
    own = {name: value for name, value in found.scores.items() if name.startswith("patch_")}
    assert {name: value for name, value in found.scores.items() if name not in own} == plain.scores
    assert own["patch_unique"] == 8
    assert own["patch_kappa_max"] == pytest.approx(found.tables["patch_prototypes"]["norm"].max() / 0.07)
    assert "patch_used" not in own
    assert any("patch head (separate): utilisation not measured" in note for note in found.notes)
    assert found.tables["patch_unique"]["unique"].max() == 8
    assert set(found.tables["patch_prototypes"]) == {"prototype", "norm", "kappa"}


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_patch_tokens_are_assigned_to_the_patch_head(
    context: Context, splits: tuple[Split, Split], make_images: Callable[..., ImageSet], kind: PatchKind
) -> None:
    assert context.model is not None
    model, images = with_patches(context.model, kind), make_images(20)
    transform = EvalTransform(resize=16, crop=None, interpolation="bilinear")
    seeing = WithImages(3, ("a", "b", "c"), model=model, train_images=images, transform=transform)
    outcome = prototypes.run(*splits, prototypes.Parameters(), seeing)
    with torch.no_grad():
        (_, patches), *_ = last_tokens(model.backbone, transform.batch(images.array))
        assert patches is not None and model.patch is not None and model.patch.head is not None
        head = model.patch.head
        chosen = head.logits(head.project(patches.flatten(0, 1)), 0.07).argmax(1)
    table = outcome.tables["patch_prototypes"]
    assert table["tokens"].tolist() == chosen.bincount(minlength=len(table)).tolist()
    assert outcome.scores["patch_used"] == len(chosen.unique())
    assert outcome.scores["patch_used"] + outcome.scores["patch_dead"] == len(table)
    assert ("patch_unique" in outcome.scores) == (kind == "separate")
    assert any("over n=80 patch tokens of train" in note for note in outcome.notes)
    again = prototypes.run(*splits, prototypes.Parameters(patch_tokens=30), seeing)
    assert again.tables["patch_prototypes"]["tokens"].sum() == 30


def test_patch_head_without_temperature_or_mlp_is_told_of(context: Context, splits: tuple[Split, Split]) -> None:
    assert context.model is not None
    bare = with_patches(context.model, temperature=None)
    outcome = prototypes.run(*splits, prototypes.Parameters(), replace(context, model=bare))
    assert any("does not state its teacher temperature for patches" in note for note in outcome.notes)
    assert "patch_unique" in outcome.scores and "patch_kappa_max" not in outcome.scores
    assert bare.patch is not None
    alone = replace(bare, patch=replace(bare.patch, head=None))
    outcome = prototypes.run(*splits, prototypes.Parameters(), replace(context, model=alone))
    assert any("the MLP that leads to its prototypes is not in the checkpoint" in note for note in outcome.notes)


def test_prototypes_without_their_mlp_are_refused_as_such(context: Context, splits: tuple[Split, Split]) -> None:
    assert context.model is not None and context.model.prototypes is not None
    alone = replace(context.model, head=None)
    with pytest.raises(DinobenchError, match="prototypes without the MLP that leads to them"):
        prototypes.run(*splits, prototypes.Parameters(), replace(context, model=alone))


@pytest.mark.parametrize("layout", ["weight_norm", "parametrizations", "plain"])
def test_checkpoint_of_dino_in_each_layout_of_its_prototypes_is_scored_alike(
    tmp_path: Path, splits: tuple[Split, Split], model: LoadedModel, layout: str
) -> None:
    """weight_g and weight_v, their successors, and a plain weight (PROTOCOLS 6, DINOv3)."""
    assert model.head is not None
    head = {f"head.{name}": value for name, value in model.head.state_dict().items()}
    vectors = head.pop("head.last_layer.weight")
    norms, directions = vectors.norm(dim=1, keepdim=True), 3 * vectors
    names = {"weight_norm": ("weight_g", "weight_v")}.get(
        layout, ("parametrizations.weight.original0", "parametrizations.weight.original1")
    )
    stored = {"weight": vectors} if layout == "plain" else dict(zip(names, (norms, directions), strict=True))
    head |= {f"head.last_layer.{name}": value for name, value in stored.items()}
    teacher = head | {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    arguments = argparse.Namespace(teacher_temp=0.04)
    torch.save({"teacher": teacher, "args": arguments, "epoch": 3, "dino_loss": {}}, tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth", num_heads=2)
    found, expected = (
        prototypes.run(*splits, prototypes.Parameters(), Context(3, model=m)).scores for m in (loaded, model)
    )
    assert found == pytest.approx(expected, rel=1e-5)


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
