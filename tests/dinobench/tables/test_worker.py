from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinobench.tables.cells import Cell, Cells
from dinobench.tables.definition import Table
from dinobench.tables.records import RecordStore
from dinobench.tables.worker import Interrupted, Workplace, run_cell
from pretrain.errors import DinobenchError

ROOT = Path(__file__).parents[3]


def silent(text: str) -> None:
    """Say nothing."""


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / "runs", tmp_path / "results")


@pytest.fixture
def cell(tiny: Table, cells_of: Callable[..., Cells]) -> Cell:
    return cells_of(tiny).all[0]


def test_a_cell_is_trained_measured_and_recorded_once(
    cell: Cell, place: Workplace, fake_loop: Any, measured: Any
) -> None:
    assert run_cell(cell, place, silent)
    assert RecordStore(place.records).is_done(cell)
    assert run_cell(cell, place, silent)
    assert fake_loop.calls == [False]
    assert measured.suites == ["digits_knn", "digits_prototypes"]


def test_the_run_folder_may_go_once_the_record_is_there(
    cell: Cell, place: Workplace, fake_loop: Any, measured: Any
) -> None:
    import shutil

    run_cell(cell, place, silent)
    shutil.rmtree(place.output)
    run_cell(cell, place, silent)
    assert fake_loop.calls == [False]


def test_a_record_has_the_keys_of_the_committed_ones(
    cell: Cell, place: Workplace, fake_loop: Any, measured: Any
) -> None:
    run_cell(cell, place, silent)
    record = json.loads(RecordStore(place.records).path(cell).read_text())
    committed = json.loads((ROOT / "results/digits/records/dino-s0.json").read_text())
    assert record.keys() >= committed.keys()
    assert record["results"]["digits_knn@1"].keys() >= committed["results"]["digits_knn@1"].keys() - {"parameters"}
    assert record["cell"] == {"science": cell.science, "data": cell.data_fingerprint, "version": 1}
    assert (record["command"], record["steps"]) == (cell.command, 4)
    assert str(place.output) not in RecordStore(place.records).path(cell).read_text()


@pytest.mark.promise("a cell of a table interrupted", "goes on from its checkpoint")
def test_an_interrupted_training_goes_on_from_its_checkpoint(
    cell: Cell, place: Workplace, fake_loop: Any, measured: Any
) -> None:
    fake_loop.stop_at = 2
    with pytest.raises(Interrupted, match="SIGTERM"):
        run_cell(cell, place, silent)
    assert not list(place.records.rglob("*.json"))
    fake_loop.stop_at = None
    run_cell(cell, place, silent)
    assert fake_loop.calls == [False, True]
    assert RecordStore(place.records).is_done(cell)


def test_a_cell_that_another_process_has_is_left_to_it(
    cell: Cell, place: Workplace, fake_loop: Any, measured: Any
) -> None:
    with place.lock(cell.key):
        assert run_cell(cell, place, silent) is False
    assert fake_loop.calls == []


def test_a_run_folder_of_another_version_of_the_code_is_not_taken(
    cell: Cell, place: Workplace, fake_loop: Any, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinobench.tables import cells as module

    run_cell(cell, place, silent)
    monkeypatch.setitem(module.METHOD_VERSIONS, cell.method, 2)
    run_cell(cell, place, silent)
    assert fake_loop.calls == [False, False]
    assert len(list(place.output.glob("dino-*"))) == 2
    assert RecordStore(place.records).is_done(cell)


def test_a_suite_that_cannot_be_measured_leaves_no_record(
    cell: Cell, place: Workplace, fake_loop: Any, measured: Any
) -> None:
    measured.fail = "digits_knn"
    with pytest.raises(DinobenchError, match="digits_knn@1 not measured: data set absent"):
        run_cell(cell, place, silent)
    assert not RecordStore(place.records).is_done(cell)
    measured.fail = ""
    run_cell(cell, place, silent)
    assert fake_loop.calls == [False]
    assert measured.suites.count("digits_prototypes") == 1


def test_released_weights_are_measured_without_training(
    cell: Cell, place: Workplace, fake_loop: Any, measured: Any, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"weights")
    weights = {"name": "dino_vits16", "weights": "dino_vits16", "checkpoint": file, "science": "5" * 64}
    released = replace(cell, scale="paper", released=True, overrides=(), **weights)
    run_cell(released, place, silent)
    assert fake_loop.calls == []
    record = json.loads((place.records / "paper" / "records" / "dino_vits16.json").read_text())
    assert (record["provenance"]["path"], record["steps"]) == ("weights.pth", 7)
