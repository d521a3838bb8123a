from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pretrain.objectives.contrastive import uniformity
from suites.protocols import representation
from suites.protocols.protocol import Context, Split

MakeSplit = Callable[..., Split]
PARAMETERS = representation.Parameters()


def gaussian(num: int, dim: int, *, seed: int = 0, offset: float = 0.0) -> Split:
    """Features whose scale falls with the dimension."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, dim)
    features = torch.randn(num, dim, generator=generator) * scale + offset
    return Split(features, torch.empty(0, dtype=torch.long), torch.arange(num))


def plain_rankme(z: Tensor) -> float:
    singular = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize(("num", "dim"), [(200, 12), (10, 30)], ids=["more images than dimensions", "fewer"])
def test_ranks_are_the_papers_formulas_on_the_singular_values(num: int, dim: int) -> None:
    split = gaussian(num, dim, offset=0.5)
    outcome = representation.run(split, split, PARAMETERS, Context(0))
    assert outcome.scores["rankme"] == pytest.approx(plain_rankme(split.features), rel=1e-6)
    centred = (split.features - split.features.mean(0)).double().numpy()
    p = np.linalg.svd(centred, compute_uv=False)
    p = (p / p.sum())[p > 1e-9]
    assert outcome.scores["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    assert outcome.scores["num_dimensions"] == dim
    assert outcome.n == num


def test_rank_of_equal_orthogonal_directions_is_their_number() -> None:
    z = torch.eye(6).repeat(5, 1)[:, :4]
    split = Split(z, torch.empty(0, dtype=torch.long), torch.arange(len(z)))
    assert representation.run(split, split, PARAMETERS, Context(0)).scores["rankme"] == pytest.approx(4, abs=1e-4)


def test_an_offset_of_all_images_changes_rankme_and_not_the_effective_rank() -> None:
    runs = [
        representation.run(s, s, PARAMETERS, Context(0)).scores for s in (gaussian(300, 8), gaussian(300, 8, offset=50))
    ]
    assert runs[1]["rankme"] < 0.5 * runs[0]["rankme"]
    assert runs[1]["effective_rank"] == pytest.approx(runs[0]["effective_rank"], rel=1e-3)


def test_uniformity_equals_the_mean_over_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = gaussian(50, 8), gaussian(70, 8, seed=1)
    expected = uniformity(test.features.double()).item()
    whole = representation.run(train, test, PARAMETERS, Context(0))
    assert whole.scores["uniformity"] == pytest.approx(expected, abs=1e-5)
    assert math.log(whole.samples["potential"].mean()) == pytest.approx(expected, abs=1e-5)
    orthogonal = Split(torch.eye(64), torch.empty(0, dtype=torch.long), torch.arange(64))
    assert representation.run(train, orthogonal, PARAMETERS, Context(0)).scores["uniformity"] == pytest.approx(-4)


def test_potential_in_blocks_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.nn.functional.normalize(gaussian(50, 3).features, dim=1)
    expected = ((-2 * torch.cdist(x.double(), x.double()).square()).exp().sum(1) - 1) / 49
    monkeypatch.setattr(representation, "CHUNK_VALUES", 50 * 7)
    np.testing.assert_allclose(representation.pair_potential(x, 2.0), expected, rtol=1e-5)


def test_interval_is_that_of_a_resampling_without_its_bias() -> None:
    split = gaussian(400, 6, offset=0.3)
    outcome = representation.run(split, split, PARAMETERS, Context(0))
    low, high = outcome.interval
    assert (low + high) / 2 == pytest.approx(outcome.scores["rankme"])
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 400, (400, 400), generator=generator)
    deviation = np.std([plain_rankme(split.features[rows]) for rows in draws])
    assert (high - low) / 2 / 1.96 == pytest.approx(deviation, rel=0.15)


def test_spectrum_table_holds_falling_values_whose_entropy_is_the_rank(make_split: MakeSplit) -> None:
    outcome = representation.run(make_split(), make_split(seed=1), PARAMETERS, Context(3))
    table = outcome.tables["spectrum"]
    assert table["component"].tolist() == list(range(1, 9))
    assert table["singular_value"].is_monotonic_decreasing
    assert table["p"].sum() == pytest.approx(1)
    assert table["share_of_variance"].sum() == pytest.approx(1)
    assert outcome.scores["rankme"] == pytest.approx(np.exp(-(table["p"] * np.log(table["p"])).sum()), rel=1e-4)
    variance = make_split().features.double().var(0, correction=0).sum() * 90
    assert table["singular_value"].iloc[0] ** 2 * 8 > variance  # of the uncentred features, in their own units


def test_labels_change_no_score_and_appear_in_the_samples(make_split: MakeSplit) -> None:
    splits = make_split(), make_split(seed=1)
    bare = [Split(split.features, torch.empty(0, dtype=torch.long), split.index) for split in splits]
    with_labels, without = (representation.run(*pair, PARAMETERS, Context(3)) for pair in (splits, bare))
    assert with_labels.scores == without.scores
    assert with_labels.samples["label"].tolist() == splits[1].labels.tolist()
    assert "label" not in without.samples


def test_larger_sets_are_drawn_from_by_seed() -> None:
    split = gaussian(300, 8)
    parameters = representation.Parameters(num_images=50, num_pair_images=40)
    first, again, other = (representation.run(split, split, parameters, Context(0, seed=s)) for s in (1, 1, 2))
    assert first.scores == again.scores != other.scores
    assert (first.n, len(first.samples)) == (50, 40)
    chosen = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:50]
    assert first.scores["rankme"] == pytest.approx(plain_rankme(split.features[chosen]), rel=1e-6)
    assert any("n=50 train images, uniformity over 40" in note for note in first.notes)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_collapsed_features_have_no_rank_and_do_not_crash(value: float) -> None:
    split = Split(torch.full((30, 4), value), torch.empty(0, dtype=torch.long), torch.arange(30))
    outcome = representation.run(split, split, PARAMETERS, Context(0))
    assert outcome.scores["rankme"] == pytest.approx(value, abs=1e-4)
    assert outcome.scores["effective_rank"] == 0
    assert outcome.scores["uniformity"] == pytest.approx(0, abs=1e-5)
    assert all(math.isfinite(bound) for bound in outcome.interval)


def test_where_alignment_is_to_be_found_is_said() -> None:
    notes = representation.run(gaussian(30, 4), gaussian(30, 4), PARAMETERS, Context(0)).notes
    assert any("alignment needs two views" in note for note in notes)
