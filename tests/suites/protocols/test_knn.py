from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pretrain.errors import DinobenchError, UsageError
from suites.protocols import knn
from suites.protocols.protocol import Context, Split

Arrays = dict[str, np.ndarray]
BACKENDS = ["torch", "faiss"]


@pytest.fixture(scope="module")
def dino(golden: Callable[[str], Arrays]) -> Arrays:
    return golden("knn_dino")


@pytest.fixture(scope="module")
def dinov2(golden: Callable[[str], Arrays]) -> Arrays:
    return golden("knn_dinov2")


def tensors(arrays: Arrays, num_test: int | None = None) -> list[torch.Tensor]:
    names = ("train_features", "train_labels", "test_features", "test_labels")
    train_x, train_y, test_x, test_y = (torch.from_numpy(arrays[name]) for name in names)
    return [train_x, train_y, test_x[:num_test], test_y[:num_test]]


def top1_top5(arrays: Arrays, backend: knn.Backend, num_classes: int, num_test: int | None = None) -> np.ndarray:
    data = tensors(arrays, num_test)
    ks = [int(k) for k in arrays["k"]]
    temperature = float(arrays["T"])
    ranks, _ = knn.classify(*data, k=ks, num_classes=num_classes, temperature=temperature, backend=backend)
    scores = [[(ranks[k] < best).double().mean().item() * 100 for best in (1, min(5, k))] for k in ks]
    return np.array(scores)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["numclasses1000", "numclassesC"])
def test_golden_knn_dino_top1_is_exact_and_top5_within_its_ties(dino: Arrays, backend: knn.Backend, name: str) -> None:
    num_classes = 1000 if name == "numclasses1000" else int(dino["num_classes"])
    found, expected = top1_top5(dino, backend, num_classes), dino[f"top1_top5_{name}"]
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-9)
    slack = 100 * dino["n_tie_order_dependent_top5"] / len(dino["test_labels"])
    assert (np.abs(found[:, 1] - expected[:, 1]) <= slack + 1e-9).all()


@pytest.mark.parametrize("num_test", [100, 199])
def test_golden_knn_dino_subsets_of_the_queries(dino: Arrays, num_test: int) -> None:
    found, expected = top1_top5(dino, "torch", 1000, num_test), dino[f"subset{num_test}_top1_top5"]
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-9)
    slack = 100 * dino["n_tie_order_dependent_top5"] / num_test
    assert (np.abs(found[:, 1] - expected[:, 1]) <= slack + 1e-9).all()


@pytest.mark.parametrize("num_test", [0, 1, 99])
def test_golden_knn_dino_any_number_of_queries_works_where_the_official_code_fails(dino: Arrays, num_test: int) -> None:
    assert "zero" in str(dino["error_when_99_test"])
    ranks, predictions = knn.classify(*tensors(dino, num_test), k=[5], num_classes=1000)
    everything, _ = knn.classify(*tensors(dino), k=[5], num_classes=1000)
    assert len(predictions[5]) == num_test
    assert torch.equal(ranks[5], everything[5][:num_test])


def dinov2_scores(dino: Arrays, dinov2: Arrays, backend: knn.Backend) -> dict[int, torch.Tensor]:
    train_x, train_y, test_x, _ = tensors(dino)
    ks = [int(k) for k in dinov2["nb_knn"]]
    neighbours = knn.find_neighbours(train_x, test_x, max(ks), backend=backend)
    options = {"temperature": float(dinov2["T"]), "weighting": "dinov2", "chunk": 100}
    chunks = list(knn.class_scores(neighbours, train_y, ks, int(dinov2["num_classes"]), **options))
    return {k: torch.cat([chunk[k] for chunk in chunks]) for k in ks}


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_knn_dinov2_probabilities(dino: Arrays, dinov2: Arrays, backend: knn.Backend) -> None:
    for k, score in dinov2_scores(dino, dinov2, backend).items():
        np.testing.assert_allclose(score.numpy(), dinov2[f"probas_k{k}"], rtol=1e-4, atol=1e-5)


def test_golden_knn_dinov2_micro_and_macro_accuracy(dino: Arrays, dinov2: Arrays) -> None:
    label = torch.from_numpy(dino["test_labels"])
    for k, score in dinov2_scores(dino, dinov2, "torch").items():
        rank = knn.rank_of(label[:, None], score)
        # A true class without votes is ranked among the other classes without votes in an order of nobody's choosing.
        free = (score.gather(1, label[:, None]).squeeze(1) == 0) & ((score > 0).sum(1) < 5)
        for average in ("micro", "macro"):
            for best, expected, ties in zip((1, 5), dinov2[f"{average}_k{k}_top1_top5"], (0 * free, free), strict=True):
                found, slack = (mean(hit.double(), label, average) for hit in (rank < best, ties))
                assert abs(found - expected) <= slack + 1e-6, (k, average, best)


def mean(hit: torch.Tensor, label: torch.Tensor, average: str) -> float:
    if average == "micro":
        return hit.mean().item()
    return torch.stack([hit[label == c].mean() for c in label.unique()]).mean().item()


def test_golden_knn_dinov2_few_shot_draws_and_accuracies(dino: Arrays, dinov2: Arrays) -> None:
    train_x, train_y, test_x, test_y = tensors(dino)
    num_classes, temperature = int(dinov2["num_classes"]), float(dinov2["T"])
    for per_class in (int(n) for n in dinov2["n_per_class"]):
        name, tries = (str(per_class), int(dinov2["n_tries"])) if per_class > 0 else ("full", 1)
        ks = [int(key.split(".")[2][1:]) for key in dinov2 if key.startswith(f"few.{name}.k")]
        for number in range(tries):
            chosen = knn.draw_per_class(train_y, per_class, number) if per_class > 0 else torch.arange(len(train_y))
            if per_class > 0:
                np.testing.assert_array_equal(chosen.numpy(), dinov2[f"few.{name}.try{number}.indices"])
            options = {"num_classes": num_classes, "temperature": temperature, "weighting": "dinov2"}
            ranks, _ = knn.classify(train_x[chosen], train_y[chosen], test_x, test_y, k=ks, **options)
            for k in ks:
                expected = dinov2[f"few.{name}.k{k}.top1_per_try"][number]
                assert (ranks[k] == 0).double().mean().item() == pytest.approx(expected, abs=1e-6)


def test_golden_knn_dinov2_few_shot_scores_of_the_protocol(dino: Arrays, dinov2: Arrays) -> None:
    train_x, train_y, test_x, test_y = tensors(dino)
    train, test = Split(train_x, train_y, torch.arange(len(train_y))), Split(test_x, test_y, torch.arange(len(test_y)))
    per_class = tuple(int(n) for n in dinov2["n_per_class"] if n > 0)
    tries = int(dinov2["n_tries"])
    ks = tuple(int(k) for k in dinov2["nb_knn"])
    parameters = knn.Parameters(
        k=ks, headline_k=ks[0], temperature=float(dinov2["T"]), weighting="dinov2", per_class=per_class, num_tries=tries
    )
    scores = knn.run(train, test, parameters, Context(num_classes=int(dinov2["num_classes"]))).scores
    checked = 0
    for key, values in dinov2.items():
        match = re.fullmatch(r"few\.(\d+)\.k(\d+)\.top1_per_try", key)
        if match is None:
            continue
        name = f"top1_shot{match[1]}_k{match[2]}"
        assert scores[name] == pytest.approx(100 * values.mean(), abs=1e-4)
        assert scores[f"{name}_sd"] == pytest.approx(100 * values.std(ddof=1), abs=1e-4)
        checked += 1
    assert checked == sum(1 for name in scores if re.fullmatch(r"top1_shot\d+_k\d+", name)) > 0


def test_more_images_per_class_than_there_are_is_refused_by_class(make_split: Callable[..., Split]) -> None:
    train = make_split(30)
    parameters = knn.Parameters(k=(5,), headline_k=5, per_class=(11,))
    with pytest.raises(DinobenchError, match=r"11 train images per class are drawn, but class 'a' has 10"):
        knn.run(train, train, parameters, Context(3, ("a", "b", "c")))
    with pytest.raises(ValueError, match="each once"):
        knn.Parameters(per_class=(5, 5))


def test_both_weightings_predict_the_same_class(dino: Arrays) -> None:
    predictions = [
        knn.classify(*tensors(dino), k=[10, 20], num_classes=14, weighting=weighting)[1]
        for weighting in ("dino", "dinov2")
    ]
    assert all(torch.equal(predictions[0][k], predictions[1][k]) for k in (10, 20))


def test_equal_votes_give_the_lower_label() -> None:
    train, labels = torch.eye(4), torch.tensor([3, 1, 2, 0])
    query = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    ranks, predictions = knn.classify(train, labels, query, torch.tensor([2]), k=[2], num_classes=4)
    assert predictions[2].item() == 1
    assert ranks[2].item() == 1


def test_no_one_hot_of_neighbours_by_classes_is_needed_for_many_classes() -> None:
    labels = torch.arange(3000)
    ranks, _ = knn.classify(torch.eye(3000), labels, torch.eye(3000)[:5], labels[:5], k=[1, 200], num_classes=3000)
    assert (ranks[1] == 0).all()


def test_run_reports_every_k_and_the_pinned_one_as_top1(dino: Arrays) -> None:
    train_x, train_y, test_x, test_y = tensors(dino)
    train = Split(train_x, train_y, torch.arange(len(train_y)))
    test = Split(test_x, test_y, torch.arange(len(test_y)))
    outcome = knn.run(train, test, knn.Parameters(k=(10, 20), headline_k=20), Context(num_classes=14))
    assert list(outcome.scores) == ["top1", "top5", "top1_k10", "top5_k10", "top1_k20", "top5_k20"]
    assert outcome.scores["top1"] == outcome.scores["top1_k20"] == pytest.approx(25.68093385)
    assert outcome.n == len(outcome.samples) == len(test_y)
    assert outcome.interval[0] < outcome.scores["top1"] < outcome.interval[1]
    assert 100 * outcome.samples["correct"].mean() == pytest.approx(outcome.scores["top1"])


def test_more_neighbours_than_train_images_is_refused_with_both_numbers() -> None:
    with pytest.raises(UsageError, match="k=20 needs 20 train images, this set has 5"):
        knn.classify(torch.eye(5), torch.arange(5), torch.eye(5), torch.arange(5), k=[20], num_classes=5)


def test_headline_k_must_be_one_of_the_sweep() -> None:
    with pytest.raises(ValueError, match="headline_k=20"):
        knn.Parameters(k=(1, 5))
