from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinobench.comparison.query import select, split_query
from pretrain.errors import DinobenchError, UsageError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, measurer_in: Callable[[Path], Any]) -> Path:
    measurer = measurer_in(tmp_path_factory.mktemp("query") / "runs")
    for method in ("dino", "dino_vmf"):
        for seed in (0, 1):
            measurer.run(method, seed, 90.0)
    return measurer.output


def chosen(output: Path, *arguments: str) -> list[tuple[str, int | None]]:
    return [(candidate.method, candidate.seed) for candidate in select(arguments, output).candidates]


def test_terms_narrow_and_their_values_widen(runs: Path) -> None:
    assert chosen(runs, "method=dino,dino_vmf", "seed=1") == [("dino", 1), ("dino_vmf", 1)]
    assert chosen(runs, "method=dino seed=0 data=digits") == [("dino", 0)]
    assert chosen(runs, "method=dino", "method=dino_vmf") == chosen(runs, "method=dino*")
    assert len(chosen(runs, "head.normaliser=vmf")) == 2


def test_a_query_chooses_among_named_paths(runs: Path) -> None:
    paths = [str(path) for path in sorted(runs.iterdir())]
    assert chosen(Path("nowhere"), *paths, "seed=0") == [("dino", 0), ("dino_vmf", 0)]
    assert len(chosen(Path("nowhere"), str(runs))) == 4


def test_suites_are_chosen_by_name_or_version(runs: Path) -> None:
    for asked in ("digits_knn", "digits_knn@1", "*_knn"):
        (first, *_) = select([f"suite={asked}"], runs).candidates
        assert set(first.checkpoints[-1].scores) == {"digits_knn@1"}
    (first, *_) = select(["method=dino"], runs, ["digits_prototypes"]).candidates
    assert set(first.checkpoints[-1].scores) == {"digits_prototypes@1"}


def test_what_was_not_measured_is_named(runs: Path, measurer: Any) -> None:
    shutil.copytree(runs, measurer.output)
    bare = measurer.run("dino_sk", 0, 80.0, steps=())
    selection = select(["suite=digits_knn"], measurer.output)
    assert len(selection.candidates) == 4
    assert bare.name in selection.notes[0]
    with pytest.raises(DinobenchError, match="nothing to compare: left out, no stored result of digits_linear"):
        select(["suite=digits_linear"], measurer.output)


def test_mistakes_are_named(runs: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'method'"):
        split_query(["metod=dino"])
    with pytest.raises(DinobenchError, match="methods found: dino, dino_vmf"):
        select(["method=simclr"], runs)
    with pytest.raises(DinobenchError, match="no run and no record in"):
        select(["method=dino"], runs / "absent")


def test_a_file_name_with_an_equals_sign_is_a_path(tmp_path: Path) -> None:
    file = tmp_path / "step=1.pt"
    file.touch()
    assert split_query([str(file), "checkpoints/step=2.pt"]) == ([file, Path("checkpoints/step=2.pt")], {})


def test_records_have_no_recipe_to_ask() -> None:
    records = Path(__file__).parents[3] / "results" / "digits" / "records"
    assert {method for method, _ in chosen(records, "method=dino,byol", "data=digits")} == {"dino", "byol"}
    with pytest.raises(UsageError, match="holds no recipe"):
        chosen(records, "optim.lr=0.001")
