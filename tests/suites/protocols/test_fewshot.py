from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from pretrain.errors import DinobenchError
from suites.protocols import fewshot
from suites.protocols.protocol import Context, Split
from suites.suite import Suite, load_suite

MakeSplit = Callable[..., Split]


def test_vectorised_draws_equal_a_loop_over_draws(make_split: MakeSplit) -> None:
    train, test = make_split(spread=1), make_split(seed=1, spread=1)
    outcome = fewshot.run(train, test, fewshot.Parameters(shots=(2,), num_draws=7), Context(3, seed=4))
    chosen = [rows.view(3, 2) for rows in fewshot.draw(train.labels, [2, 2, 2], 7, seed=4)]
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
    drawn = fewshot.draw(labels, [5, 1, 10, 2], 30, seed=0)
    assert len(drawn) == 30
    assert len({tuple(rows.tolist()) for rows in drawn}) > 20
    for rows in drawn:
        assert labels[rows].tolist() == [0] * 5 + [1] + [2] * 10 + [3] * 2
        assert len(set(rows.tolist())) == len(rows)


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


def test_percents_take_their_share_of_every_class_and_at_least_one_image(make_split: MakeSplit) -> None:
    train = make_split(130)
    train.labels[:40] = 0
    parameters = fewshot.Parameters(shots=(), percents=(0.5, 10), num_draws=3)
    sizes = fewshot.labelled_rows(train, parameters, Context(3))
    counts = train.labels.bincount()
    assert list(sizes) == ["percent0_5", "percent10"]
    assert all(train.labels[rows].bincount().tolist() == [1, 1, 1] for rows in sizes["percent0_5"])
    for rows in sizes["percent10"]:
        assert train.labels[rows].bincount().tolist() == [round(count / 10) for count in counts.tolist()]
    scores = fewshot.run(train, make_split(seed=1), parameters, Context(3)).scores
    assert {"percent0_5", "percent0_5_sd", "percent10", "percent10_sd"} == set(scores)


def test_logistic_is_msns_problem(make_split: MakeSplit) -> None:
    train, test = make_split(spread=0.7), make_split(seed=1, spread=0.7)
    parameters = fewshot.Parameters(shots=(5,), num_draws=2, classifier="logistic", logistic_penalty=0.05)
    outcome = fewshot.run(train, test, parameters, Context(3))

    def prepare(x: torch.Tensor) -> np.ndarray:
        rows = x.double().numpy()
        rows = rows - rows.mean(1, keepdims=True)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    accuracy = []
    for rows in fewshot.draw(train.labels, [5, 5, 5], 2, seed=0):
        # cyanure's mean loss + lambda / 2 ||W||^2 with lambda = 0.05 / n is scikit-learn's C = 1 / (lambda n) = 20
        oracle = LogisticRegression(C=20, fit_intercept=False, tol=1e-8, max_iter=5000)
        oracle.fit(prepare(train.features[rows]), train.labels[rows].numpy())
        accuracy.append(100 * oracle.score(prepare(test.features), test.labels.numpy()))
    assert outcome.scores["shot5"] == pytest.approx(np.mean(accuracy))
    assert outcome.scores["shot5_sd"] == pytest.approx(np.std(accuracy, ddof=1))


@pytest.mark.parametrize("shots", [2, 20], ids=["fewer images than dimensions", "more"])
def test_ridge_equals_scikit_learn(make_split: MakeSplit, shots: int) -> None:
    train, test = make_split(spread=0.7), make_split(seed=1, spread=0.7)
    rows = fewshot.draw(train.labels, [shots] * 3, 1, seed=0)[0]
    parameters = fewshot.Parameters(classifier="ridge", ridge_penalty=0.3)
    found = fewshot.ridge(train.features, train.labels, [rows], test.features, parameters)[:, 0]
    x, queries = (torch.nn.functional.normalize(part.features.double(), dim=1).numpy() for part in (train, test))
    oracle = RidgeClassifier(alpha=0.3, tol=1e-10, solver="svd").fit(x[rows], train.labels[rows].numpy())
    assert found.tolist() == oracle.predict(queries).tolist()
    one_hot = torch.nn.functional.one_hot(train.labels[rows]).double()
    weight, bias = fewshot.ridge_fit(torch.from_numpy(x[rows]), one_hot, 0.3)
    scores = 2 * (torch.from_numpy(queries) @ weight + bias) - 1  # its targets are -1 and 1
    np.testing.assert_allclose(scores, oracle.decision_function(queries), atol=1e-8)


def of_files(split: Split) -> Split:
    """The split as if of image files."""
    return replace(split, path=lambda row: f"train/c{int(split.labels[row])}/c{int(split.labels[row])}_{row}.JPEG")


def write_lists(folder: Path, split: Split, number: int) -> tuple[Path, ...]:
    assert split.path is not None
    rows = fewshot.draw(split.labels, [4, 4, 4], number, seed=8)
    for i, chosen in enumerate(rows):
        names = (split.path(int(row)).rsplit("/", 1)[-1] for row in chosen)
        (folder / f"{i}.txt").write_text("\n".join(names))
    return tuple(folder / f"{i}.txt" for i in range(number))


@pytest.mark.parametrize("classifier", ["nearest_mean", "logistic", "ridge"])
def test_lists_score_the_images_they_name(make_split: MakeSplit, tmp_path: Path, classifier: str) -> None:
    train, test = of_files(make_split(spread=1)), make_split(seed=1, spread=1)
    files = write_lists(tmp_path, train, 3)
    parameters = fewshot.Parameters(shots=(), lists={"shot4": files}, classifier=classifier)
    outcome = fewshot.run(train, test, parameters, Context(3, ("c0", "c1", "c2")))
    drawn = fewshot.Parameters(shots=(4,), num_draws=3, classifier=classifier)
    expected = fewshot.run(train, test, drawn, Context(3, seed=8)).scores
    assert outcome.scores == pytest.approx(expected)
    assert outcome.notes == ["shot4: mean over the lists 0.txt, 1.txt, 2.txt"]


def test_one_list_has_no_spread(make_split: MakeSplit, tmp_path: Path) -> None:
    train = of_files(make_split())
    parameters = fewshot.Parameters(shots=(), lists={"percent1": write_lists(tmp_path, train, 1)})
    assert list(fewshot.run(train, make_split(seed=1), parameters, Context(3)).scores) == ["percent1"]


def test_lists_need_image_files(make_split: MakeSplit, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png")
    parameters = fewshot.Parameters(lists={"shot4": (tmp_path / "list.txt",)})
    with pytest.raises(DinobenchError, match="lists of images need a data set of image files"):
        fewshot.run(make_split(), make_split(seed=1), parameters, Context(3))


def test_fingerprint_follows_the_images_of_a_list_and_not_its_place(tmp_path: Path) -> None:
    def fingerprint(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        parameters = {"shots": [], "lists": {"shot1": [str(tmp_path / name)]}}
        suite = {"name": "mine", "version": 1, "protocol": "fewshot", "headline": "shot1", "parameters": parameters}
        return Suite.model_validate(suite).fingerprint()

    assert fingerprint("here.txt", "a.png\nb.png") == fingerprint("there.txt", "b.png\na.png\n")
    assert fingerprint("here.txt", "a.png\nb.png") != fingerprint("there.txt", "a.png\nc.png")


def test_fields_added_later_are_pinned_where_they_are_set() -> None:
    suite = load_suite("digits_fewshot")
    assert suite.resolved_parameters().model_dump(mode="json") == {"shots": [1, 5], "num_draws": 50}
    for change in ({"classifier": "ridge"}, {"percents": [1]}, {"logistic_penalty": 0.0025}, {"ridge_penalty": 2}):
        changed = suite.model_copy(update={"parameters": {**suite.parameters, **change}})
        assert changed.fingerprint() != suite.fingerprint()


def test_sizes_must_be_there_positive_and_of_different_names(tmp_path: Path) -> None:
    for wrong in ({"shots": ()}, {"shots": (0,)}, {"percents": (-1,)}, {"lists": {"shot1": (tmp_path / "a",)}}):
        with pytest.raises(ValueError, match="expected positive sizes of different names"):
            fewshot.Parameters(**wrong)
    with pytest.raises(ValueError, match="at least one file"):
        fewshot.Parameters(lists={"mine": ()})
    with pytest.raises(ValueError, match="cannot read the list"):
        fewshot.Parameters(lists={"mine": (tmp_path / "absent",)})
