from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from pretrain.errors import DinobenchError
from suites.protocols import logistic
from suites.protocols.linear import held_out_split
from suites.protocols.protocol import Context, Split

MakeSplit = Callable[..., Split]
SHORT = logistic.Parameters(first_exponent=-4, last_exponent=2, num_penalties=7)


def test_grid_is_the_official_one() -> None:
    np.testing.assert_allclose(logistic.Parameters().penalties, 10 ** np.linspace(-6, 5, 45))
    assert logistic.Parameters(num_penalties=1, first_exponent=2).penalties == [100]


def test_choice_and_scores_equal_those_of_scikit_learn(make_split: MakeSplit) -> None:
    train, test = make_split(90, spread=0.7), make_split(120, seed=1, spread=0.7)
    parameters = SHORT.model_copy(update={"tolerance": 1e-8})
    outcome = logistic.run(train, test, parameters, Context(3, seed=5))
    fit, held = held_out_split(train.labels, 0.1, seed=5)
    x, y = train.features.double().numpy(), train.labels.numpy()
    oracles = [LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(x[fit], y[fit]) for c in 10.0 ** np.arange(-4, 3)]
    table = outcome.tables["path"]
    np.testing.assert_allclose(table["held_out_top1"], [100 * oracle.score(x[held], y[held]) for oracle in oracles])
    probability = [oracle.predict_proba(x[held]) for oracle in oracles]
    loss = [-np.log(p[np.arange(len(held)), y[held]]).mean() for p in probability]
    np.testing.assert_allclose(table["held_out_loss"], loss, rtol=1e-4)
    order = sorted(range(7), key=lambda i: (-table["held_out_top1"][i], loss[i]))
    assert outcome.scores["C"] == pytest.approx(table["C"][order[0]])
    final = LogisticRegression(C=outcome.scores["C"], tol=1e-9, max_iter=5000).fit(x, y)
    prediction = final.predict(test.features.double().numpy())
    assert outcome.samples["prediction"].tolist() == prediction.tolist()
    assert outcome.scores["top1"] == pytest.approx(100 * (prediction == test.labels.numpy()).mean())


def test_notes_give_the_passes_of_path_and_cold_fit(make_split: MakeSplit) -> None:
    outcome = logistic.run(make_split(), make_split(seed=1), SHORT, Context(3))
    passes = outcome.tables["path"]["evaluations"].sum()
    assert f"the path took {passes} passes" in outcome.notes[0]
    assert "on 9 images of train" in outcome.notes[0]
    assert outcome.interval[0] <= outcome.scores["top1"] <= outcome.interval[1]


def test_selection_never_reads_the_test_part(make_split: MakeSplit) -> None:
    test = make_split(seed=1)
    shuffled = Split(test.features, test.labels.roll(1), test.index)
    found = [logistic.run(make_split(), part, SHORT, Context(3)) for part in (test, shuffled)]
    assert found[0].scores["C"] == found[1].scores["C"]
    assert found[0].tables["path"].equals(found[1].tables["path"])
    assert found[0].scores["top1"] > found[1].scores["top1"]


def test_an_edge_of_the_grid_and_unfinished_fits_are_told(make_split: MakeSplit) -> None:
    parameters = logistic.Parameters(first_exponent=-6, last_exponent=-5, num_penalties=2, max_evaluations=1)
    notes = logistic.run(make_split(), make_split(seed=1), parameters, Context(3)).notes
    assert any("edge of the grid" in note for note in notes)
    parameters = logistic.Parameters(first_exponent=3, num_penalties=2, max_evaluations=2)
    notes = logistic.run(make_split(), make_split(seed=1), parameters, Context(3)).notes
    assert "3 of 3 fits ended above the tolerance" in notes


def test_rows_are_centred_on_their_own_mean_and_scaled() -> None:
    x = torch.tensor([[1.0, 2.0, 6.0], [3.0, 0.0, 0.0]])
    assert torch.equal(logistic.prepare_rows(x, centre=False, scale=False), x.double())
    torch.testing.assert_close(
        logistic.prepare_rows(x, centre=False, scale=True), nn.functional.normalize(x.double(), dim=1)
    )
    both = logistic.prepare_rows(x, centre=True, scale=True)
    torch.testing.assert_close(both.mean(1), torch.zeros(2).double())
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2).double())
    torch.testing.assert_close(both[1], torch.tensor([2.0, -1.0, -1.0]).double() / 6**0.5)


def test_scale_of_the_features_is_gone_after_normalising_rows(make_split: MakeSplit) -> None:
    train, test = make_split(spread=0.7), make_split(seed=1, spread=0.7)
    parameters = SHORT.model_copy(update={"normalise_rows": True, "centre_rows": True, "intercept": False})
    scaled = [Split(part.features * 50, part.labels, part.index) for part in (train, test)]
    plain, other = logistic.run(train, test, parameters, Context(3)), logistic.run(*scaled, parameters, Context(3))
    assert plain.samples.equals(other.samples)


def test_labels_with_gaps_and_classes_unseen_in_train_are_scored(make_split: MakeSplit) -> None:
    train, test = (Split(s.features, s.labels * 5, s.index) for s in (make_split(), make_split(seed=1)))
    test.labels[0] = 3
    outcome = logistic.run(train, test, SHORT, Context(11))
    assert outcome.scores["top1"] > 90
    assert set(outcome.samples["prediction"]) <= {0, 5, 10}
    assert not outcome.samples["correct"][0]


def test_one_image_per_class_cannot_choose() -> None:
    split = Split(torch.eye(3), torch.arange(3), torch.arange(3))
    with pytest.raises(DinobenchError, match="two train images"):
        logistic.run(split, split, SHORT, Context(3))


def test_a_falling_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="last_exponent=-1.0 lies below first_exponent=2.0"):
        logistic.Parameters(first_exponent=2, last_exponent=-1)
