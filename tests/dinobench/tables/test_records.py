from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dinobench.tables.cells import Cells
from dinobench.tables.definition import Table
from dinobench.tables.records import RecordStore
from pretrain.errors import DinobenchError

SCORES = {"digits_knn@1": {"top1": 90.0}}


@pytest.fixture
def cells(tiny: Table, cells_of: Callable[..., Cells]) -> Cells:
    return cells_of(tiny)


def test_a_record_belongs_to_its_cell_whatever_its_name(cells: Cells, write_record: Callable, tmp_path: Path) -> None:
    simclr = cells.all[1]
    path = write_record(simclr, SCORES)
    path.rename(path.with_name("anything.json"))
    store = RecordStore(tmp_path / "results")
    assert store.is_done(simclr)
    assert not store.is_done(cells.all[0])


def test_other_images_or_another_version_of_the_code_make_a_record_stale(
    cells: Cells, write_record: Callable, tmp_path: Path
) -> None:
    cell = cells.all[1]
    write_record(cell, SCORES, cell={"science": cell.science, "data": "other", "version": 1})
    assert RecordStore(tmp_path / "results").find(cell) is None
    write_record(cell, SCORES, cell={"science": cell.science, "data": cell.data_fingerprint, "version": 2})
    assert RecordStore(tmp_path / "results").find(cell) is None


def test_images_that_are_not_here_do_not_speak_against_a_record(
    cells: Cells, write_record: Callable, tmp_path: Path
) -> None:
    cell = cells.all[1]
    write_record(cell, SCORES)
    assert RecordStore(tmp_path / "results").is_done(replace(cell, data_fingerprint=None))


def test_a_suite_that_is_missing_or_was_redefined_leaves_the_cell_to_do(
    cells: Cells, write_record: Callable, tmp_path: Path
) -> None:
    dino = cells.all[0]
    path = write_record(dino, SCORES)
    record = RecordStore(tmp_path / "results").find(dino)
    assert record is not None
    assert record.lacks(dino.suites) == ["digits_prototypes@1"]
    fingerprint = record.content["results"]["digits_knn@1"]["suite_fingerprint"]
    path.write_text(path.read_text().replace(fingerprint, "0" * 12))
    record = RecordStore(tmp_path / "results").find(dino)
    assert record is not None
    assert record.lacks(dino.suites) == ["digits_knn@1", "digits_prototypes@1"]


@pytest.mark.promise("a damaged record of a table", "told by name, not trained again")
def test_a_damaged_record_is_told_not_taken_for_missing(cells: Cells, write_record: Callable, tmp_path: Path) -> None:
    path = write_record(cells.all[0], SCORES)
    path.write_text('{"name": "dino"}')
    with pytest.raises(DinobenchError, match="is not a record: it lacks"):
        RecordStore(tmp_path / "results").all()


def test_cells_with_other_overrides_have_records_of_their_own(cells: Cells, tmp_path: Path) -> None:
    store, cell = RecordStore(tmp_path), cells.all[0]
    names = {store.path(cell), store.path(replace(cell, seed=1)), store.path(replace(cell, overrides=()))}
    assert len(names) == 3
    assert store.path(replace(cell, overrides=())).name == "dino-s0.json"
