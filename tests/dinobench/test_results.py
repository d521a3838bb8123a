from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dinobench import results
from dinobench.results import Result, ResultStore
from pretrain.errors import DinobenchError

SHA = "a" * 64


@pytest.fixture
def store(tmp_path: Path, make_result: Callable[..., Result]) -> ResultStore:
    store = ResultStore(tmp_path)
    samples = pd.DataFrame({"index": [0, 1], "label": [3, 4], "prediction": [3, 5], "correct": [True, False]})
    store.save(make_result(), SHA, None, samples, {"unique": pd.DataFrame({"unique": [7]}), "empty": pd.DataFrame()})
    return store


def test_a_result_and_its_samples_lie_where_they_are_looked_for(store: ResultStore) -> None:
    found = sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*.*") if path.is_file())
    assert found == [
        f"evals/digits_knn@1/{SHA[:16]}.json",
        f"samples/digits_knn@1/{SHA[:16]}-unique.parquet",
        f"samples/digits_knn@1/{SHA[:16]}.parquet",
    ]
    frame = pd.read_parquet(store.root / f"samples/digits_knn@1/{SHA[:16]}.parquet")
    assert frame["correct"].tolist() == [True, False]


def test_tables_are_those_of_the_result_and_not_of_other_data(
    store: ResultStore, make_result: Callable[..., Result]
) -> None:
    other = make_result(receipt={"data": "cifar10"})
    seven, eight = pd.DataFrame({"unique": [7]}), pd.DataFrame({"unique": [8]})
    store.save(other, SHA, "cifar10", seven, {"unique": eight})
    assert [(name, table["unique"].tolist()) for name, table in store.tables(make_result()).items()] == [
        ("unique", [7])
    ]
    assert [(name, table["unique"].tolist()) for name, table in store.tables(other).items()] == [("unique", [8])]


def test_a_stored_result_says_that_it_is_one(store: ResultStore) -> None:
    found = store.find("digits_knn@1", "f00", SHA, None, 0)
    assert found is not None
    assert found.from_cache
    assert found.score == 90.0


@pytest.mark.parametrize(
    "question",
    [
        ("digits_knn@2", "f00", SHA, None, 0),
        ("digits_knn@1", "f00", "b" * 64, None, 0),
        ("digits_knn@1", "bad", SHA, None, 0),
        ("digits_knn@1", "f00", SHA, None, 1),
        ("digits_knn@1", "f00", SHA, "cifar10", 0),
    ],
    ids=["version", "checkpoint", "definition", "seed", "data"],
)
def test_a_result_of_anything_else_is_not_taken(store: ResultStore, question: tuple) -> None:
    assert store.find(*question) is None


def test_the_document_has_the_headline_under_its_own_name(make_result: Callable[..., Result]) -> None:
    document = json.loads(json.dumps(make_result().document(), allow_nan=False))
    assert document["top1"] == 90.0
    assert document["interval"] == [88.0, 92.0]
    assert document["n"] == 500
    assert document["receipt"]
    assert document["from_cache"] is False


@pytest.mark.promise("a result altered or of a newer schema", "refused by name")
def test_an_altered_or_newer_result_is_refused_by_name(store: ResultStore) -> None:
    path = next(store.root.glob("evals/*/*.json"))
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "scores": 3}))
    with pytest.raises(DinobenchError, match="is not a result"):
        store.all()
    path.write_text(json.dumps({**document, "schema_version": 99}))
    with pytest.raises(DinobenchError, match="has schema 99, this version of dinobench reads 1"):
        store.all()


def test_plain_values_survive_strict_json() -> None:
    value = {"a": np.float32(1.5), 3: (np.int64(2), float("nan")), "path": Path("x"), "none": None, "yes": True}
    assert results.plain(value) == {"a": 1.5, "3": [2, None], "path": "x", "none": None, "yes": True}


def test_metric_names_have_one_slash(make_result: Callable[..., Result]) -> None:
    assert make_result().metric("top1") == "knn/digits_top1"
