from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dinobench.tables.cells import Cells
from dinobench.tables.records import RecordStore
from dinobench.tables.retrain import choose, retrain
from dinobench.tables.worker import Workplace
from pretrain.errors import DinobenchError


@pytest.fixture
def cells(make_table: Callable, cells_of: Callable[..., Cells]) -> Cells:
    overrides = ["evaluation.suites=[]"]
    return cells_of(make_table(at={"digits": {"preset": "digits", "seeds": 5, "overrides": overrides}}))


@pytest.fixture
def store(cells: Cells, write_record: Callable, tmp_path: Path) -> RecordStore:
    """Seeds of DINO 8 points apart."""
    for cell, score in zip(cells.of("made", "DINO"), (76.0, 84.0, 92.0), strict=False):
        write_record(cell, {"digits_knn@1": {"top1": score}})
    return RecordStore(tmp_path / "results")


def test_commits_take_turns_over_the_recorded_cells(cells: Cells, store: RecordStore) -> None:
    chosen = [choose(cells, store, commit).seed for commit in ("0", "1", "2", "3", "a1b2c3")]
    assert set(chosen[:3]) == {0, 1, 2}
    assert chosen[3] == chosen[0]
    assert chosen[4] == choose(cells, store, "a1b2c3").seed


def test_what_is_no_commit_is_refused(cells: Cells, store: RecordStore, tmp_path: Path) -> None:
    with pytest.raises(DinobenchError, match="not the hash of a commit"):
        choose(cells, store, "main")
    with pytest.raises(DinobenchError, match="no training of these tables is recorded"):
        choose(cells, RecordStore(tmp_path / "empty"), "a1")


@pytest.mark.parametrize(("recorded", "holds"), [(91.0, True), (70.0, True), (60.0, False)])
def test_the_spread_over_seeds_is_what_may_differ(
    recorded: float, holds: bool, cells: Cells, write_record: Callable, tmp_path: Path, fake_loop: Any, measured: Any
) -> None:
    # the measurement of the test always finds 91.5; seeds of standard deviation near 8 allow about 24 points
    own = cells.of("made", "DINO")
    spread = (recorded, recorded + 8, recorded + 16)
    for cell, score in zip(own, spread, strict=False):
        write_record(cell, {"digits_knn@1": {"top1": score}})
    place = Workplace(tmp_path / "apart" / "runs", tmp_path / "apart" / "results")
    (compared,) = retrain(own[0], cells, RecordStore(tmp_path / "results"), place, lambda text: None)
    assert (compared.recorded, compared.found, compared.allowed) == (recorded, 91.5, pytest.approx(24))
    assert compared.holds is holds
    assert fake_loop.calls == [False]


def test_two_points_are_always_allowed(
    cells: Cells, write_record: Callable, tmp_path: Path, fake_loop: Any, measured: Any
) -> None:
    cell = cells.of("made", "vMF")[0]
    write_record(cell, {"digits_knn@1": {"top1": 90.0}})
    place = Workplace(tmp_path / "apart" / "runs", tmp_path / "apart" / "results")
    (compared,) = retrain(cell, cells, RecordStore(tmp_path / "results"), place, lambda text: None)
    assert (compared.allowed, compared.holds) == (2.0, True)


def test_a_place_that_has_the_record_already_is_refused(cells: Cells, store: RecordStore, tmp_path: Path) -> None:
    cell = choose(cells, store, "0")
    with pytest.raises(DinobenchError, match="give an empty folder"):
        retrain(cell, cells, store, Workplace(tmp_path / "runs", store.root), lambda text: None)
